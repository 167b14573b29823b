"""Environments that people write, as RLlib hands them over: in all seven algorithms."""

from pathlib import Path
from typing import Any

import pytest
from environments import Counting
from ray.rllib.callbacks.callbacks import RLlibCallback
from test_seven_algorithms import config_of, seven


class Halving(Counting):
    """Changes the action that it is given, in place. Takes part of its arguments away."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(length=10)
        self.mass = config["robot"].pop("mass")
        self.received: list[float] = []

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.received.append(float(action[0]))
        action *= 0.5
        return super().step(action)


def envs_of(algorithm: Any) -> list[Any]:
    worker = algorithm.env_runner
    envs = getattr(worker, "envs", None) or worker.async_env.get_sub_environments()
    return [env.unwrapped for env in envs]


@seven
def test_an_environment_may_change_its_action_and_its_arguments(name: str, build: Any) -> None:
    """Each of several gets arguments of its own, and each repeat of an action the action."""
    config = config_of(name, frame_skip=2).environment(Halving, env_config={"robot": {"mass": 3.0}})
    config.env_runners(num_envs_per_env_runner=3).evaluation(evaluation_interval=None)
    algorithm = build(config)
    algorithm.train()
    for env in envs_of(algorithm):
        assert env.mass == 3.0
        assert env.received[0::2] == env.received[1::2]
    config = config_of(name).environment(Halving, env_config={"robot": {"mass": 3.0}})
    build(config.evaluation(evaluation_interval=None)).train()


@seven
def test_an_evaluation_environment_that_does_not_suit_is_refused_at_once(
    name: str, build: Any
) -> None:
    config = config_of(name)
    config.evaluation(evaluation_config={"env": "environments:Counting-v0"})
    with pytest.raises(ValueError, match=r"Counting-v0 \(evaluation\) has observations of shape"):
        build(config)


def test_an_evaluation_environment_has_arguments_of_its_own() -> None:
    config = config_of("qvpo")
    config.environment("Hopper-v5", env_config={"forward_reward_weight": 2.0})
    assert config.get_evaluation_config_object().env_config == {"forward_reward_weight": 2.0}
    config.evaluation(evaluation_config={"env": "InvertedPendulum-v5"})
    assert config.get_evaluation_config_object().env_config == {}
    config.evaluation(evaluation_config={"env_config": {"reset_noise_scale": 0.1}})
    assert config.get_evaluation_config_object().env_config == {"reset_noise_scale": 0.1}


def test_the_environment_of_build_algo_is_trainings_alone(build: Any) -> None:
    config = config_of("td3").environment(None)
    config.evaluation(evaluation_config={"env": "environments:InParts-v0"})
    with pytest.raises(ValueError, match=r"InParts-v0 \(evaluation\) has observations"):
        config.build_algo("InvertedPendulum-v5")
    assert config.env == "InvertedPendulum-v5"


class SavesAtOnce(RLlibCallback):
    """Uses the algorithm as soon as RLlib says that it is there."""

    def on_algorithm_init(self, *, algorithm: Any, **kwargs: Any) -> None:
        self.calls = getattr(self, "calls", 0) + 1
        algorithm.save(algorithm.config.env_config["path"])
        self.updates = algorithm.updates


class Placed(Counting):
    """Its argument is for the callback."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(length=10)


@seven
def test_an_algorithm_is_whole_when_callbacks_are_told_of_it(
    name: str, build: Any, tmp_path: Path
) -> None:
    config = config_of(name).callbacks(SavesAtOnce)
    algorithm = build(config.environment(Placed, env_config={"path": str(tmp_path / "saved")}))
    assert (algorithm.callbacks.calls, algorithm.callbacks.updates) == (1, 0)
    build(config.copy(copy_frozen=False)).restore(str(tmp_path / "saved"))


def test_a_creator_that_returns_nothing_is_told_so(build: Any, tiny_config: Any) -> None:
    from ray import tune

    tune.register_env("nothing", lambda config: None)
    with pytest.raises(ValueError, match="nothing returned None, but must make and return"):
        build(tiny_config("nothing"))


@pytest.mark.parametrize("workers", ["num_env_runners", "evaluation_num_env_runners"])
def test_what_a_remote_environments_constructor_raises_is_shown(workers: str, build: Any) -> None:
    """RLlib alone fails at the first of no answers."""
    config = config_of("td3").environment("environments:Limited-v0", env_config={"limited": "no"})
    wrong = {"limitted": "no"}
    if workers == "num_env_runners":
        config.environment(env_config=wrong).env_runners(num_env_runners=1)
    else:
        config.evaluation(evaluation_num_env_runners=1, evaluation_config={"env_config": wrong})
    with pytest.raises(TypeError, match="unexpected keyword argument 'limitted'"):
        build(config)


class Burning(Counting):
    """Its first step raises, in every process."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(length=10)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        raise RuntimeError("the motor is on fire")


@pytest.mark.parametrize("name", ["ppo", pytest.param("sac", marks=pytest.mark.slow)])
def test_workers_that_fail_again_and_again_end_training(name: str, build: Any) -> None:
    """RLlib alone restarts them a thousand times, and nobody sees why."""
    config = config_of(name, num_workers=1).environment(Burning)
    config.fault_tolerance(
        delay_between_env_runner_restarts_s=0.1, num_consecutive_env_runner_failures_tolerance=1
    )
    algorithm = build(config.env_runners(rollout_fragment_length="auto"))
    with pytest.raises(RuntimeError, match=r"(?s)restarted 2 times.*the motor is on fire"):
        algorithm.train()
