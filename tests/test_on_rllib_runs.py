"""PPO, SPO and SAC on RLlib's own: whole runs, stops, callbacks and checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.policy.policy import Policy
from ray.rllib.policy.sample_batch import DEFAULT_POLICY_ID
from test_on_rllib import (
    LIMIT,
    NAMES,
    SevenSteps,
    config_of,
)

from qvpo_rllib.core.errors import ENDS_TRAINING, NonFiniteError

BEST = np.array([0.4, -0.6])
BANDIT = {
    "ppo": {"hidden": [16], "lr": 1e-2, "train_batch_size": 200, "minibatch_size": 100,
            "num_epochs": 5, "normalize_observations": False},
    "spo": {"hidden": [16], "lr": 1e-2, "lr_end": None, "train_batch_size": 200,
            "minibatch_size": 100, "num_epochs": 5, "normalize_observations": False},
    "sac": {"hidden": [32, 32], "actor_lr": 3e-3, "critic_lr": 3e-3, "batch_size": 64,
            "warmup_steps": 200, "auto_alpha": True},
}  # fmt: skip


class Bandit(gym.Env[Any, Any]):
    """One state, episodes of one step, reward -|a - BEST|²."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.ones(1, np.float32), -float(((action - BEST) ** 2).sum()), True, False, {}


gym.register("Bandit-v0", Bandit)


def weights_of(algorithm: Any) -> dict[str, Any]:
    found: dict[str, Any] = algorithm.get_policy().get_weights()
    return found


def assert_equal_weights(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])


@pytest.mark.parametrize(
    ("name", "env_steps"),
    [
        ("ppo", 6000),
        pytest.param("spo", 6000, marks=pytest.mark.slow),
        ("sac", 900),
    ],
)
def test_the_best_action_of_a_bandit_is_found(
    name: str, env_steps: int, build: Callable[[Any], Any]
) -> None:
    config = config_of(name, env="Bandit-v0")
    config.training(**BANDIT[name]).evaluation(evaluation_interval=None)
    config.reporting(min_sample_timesteps_per_iteration=env_steps)
    algorithm = build(config)
    state = np.ones((1, 1), np.float32)
    before = algorithm.get_policy().act(state)[0]
    algorithm.train()
    after = algorithm.get_policy().act(state)[0]
    assert np.linalg.norm(before - BEST) > 0.5
    assert np.linalg.norm(after - BEST) < 0.1


class Learning(RLlibCallback):  # type: ignore[misc]
    """Notes what the workers and the learner call, and lengths of episodes."""

    seen: ClassVar[dict[str, set[int]]] = {}

    def on_postprocess_trajectory(self, **arguments: Any) -> None:
        self.seen["trajectory"] = {1}

    def on_learn_on_batch(self, **arguments: Any) -> None:
        self.seen["batch"] = {1}

    def on_episode_step(self, *, episode: Any, **arguments: Any) -> None:
        self.seen.setdefault("step", set()).add(episode.length)

    def on_episode_end(self, *, episode: Any, **arguments: Any) -> None:
        self.seen.setdefault("end", set()).add(episode.length)


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_callbacks_see_trajectories_batches_and_lengths(
    name: str, build: Callable[[Any], Any]
) -> None:
    Learning.seen.clear()
    config = config_of(name, env="SevenSteps-v0").callbacks(Learning)
    build(config.evaluation(evaluation_interval=None)).train()
    steps = set(range(1, LIMIT + 1))
    assert Learning.seen["step"] - {LIMIT} == steps - {LIMIT}  # the last may be the end's alone
    assert Learning.seen["end"] == {LIMIT}
    assert Learning.seen["trajectory"] == Learning.seen["batch"] == {1}


class Telling(SevenSteps):
    """Says in its infos what the time is and which action it got."""

    action_space = gym.spaces.Box(-1, 3, (1,), np.float32)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return super().reset(seed=seed, options=options)[0], {"time": 0}

    def step(self, action: Any) -> Any:
        return (*super().step(action)[:4], {"time": self.time, "action": action.copy()})


gym.register("Telling-v0", Telling)


class Last(RLlibCallback):  # type: ignore[misc]
    """Notes (callback, length, observation, info's time), and checks the action."""

    seen: ClassVar[list[tuple[str, int, int, int]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.created: set[int] = set()

    def note(self, name: str, episode: Any) -> None:
        obs, info = episode.last_observation_for(), episode.last_info_for()
        self.seen.append((name, episode.length, int(obs[0]), info["time"]))
        action = episode.last_action_for("agent0")
        if episode.length <= 0:
            assert action is None
            return
        assert abs(action).max() <= 1
        np.testing.assert_allclose(1 + 2 * action, info["action"], rtol=1e-5, atol=1e-6)

    def on_episode_created(self, *, episode: Any, env_index: int, **arguments: Any) -> None:
        if env_index in self.created:  # RLlib makes the first one after its reset
            assert episode.last_observation_for() is None
            assert episode.last_action_for() is None
            assert episode.last_info_for() is None
        self.created.add(env_index)

    def on_episode_start(self, *, episode: Any, **arguments: Any) -> None:
        self.note("start", episode)

    def on_episode_step(self, *, episode: Any, **arguments: Any) -> None:
        self.note("step", episode)

    def on_episode_end(self, *, episode: Any, **arguments: Any) -> None:
        self.note("end", episode)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_envs", [1, 2])
def test_training_episodes_know_their_last_step(
    name: str, num_envs: int, build: Callable[[Any], Any]
) -> None:
    Last.seen.clear()
    config = config_of(name, env="Telling-v0").callbacks(Last).evaluation(evaluation_interval=None)
    build(config.env_runners(num_envs_per_env_runner=num_envs)).train()
    episode = [("start", -1, 0, 0), *(("step", t, t, t) for t in range(1, LIMIT + 1))]
    episode.append(("end", LIMIT, LIMIT, LIMIT))
    assert set(Last.seen) == set(episode)
    if num_envs == 1:
        assert Last.seen[: 3 * len(episode)] == 3 * episode


@pytest.mark.parametrize(
    ("name", "env", "message"),
    [
        ("sac", "LateShape", r"step 30 .* shape \(3,\).* declares shape \(2,\)"),
        ("ppo", "NanObservation", "observation .*nan"),
    ],
)
def test_what_a_restart_would_meet_again_ends_training(
    name: str, env: str, message: str, build: Callable[[Any], Any]
) -> None:
    """RLlib alone restarts the workers for ever."""
    config = config_of(name, env=f"environments:{env}-v0").env_runners(num_env_runners=1)
    config.reporting(min_sample_timesteps_per_iteration=300)
    algorithm = build(config.evaluation(evaluation_interval=None))
    with pytest.raises(ENDS_TRAINING, match=rf"environments:{env}-v0 \(worker \d.*{message}"):
        algorithm.train()
    assert algorithm.env_runner_group.num_remote_worker_restarts() == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_run_trains_evaluates_and_goes_on_from_its_checkpoint(
    name: str, build: Callable[[Any], Any], tmp_path: Path
) -> None:
    first = build(config_of(name))
    before = {n: v.copy() for n, v in weights_of(first).items()}
    first.train()
    result = first.train()
    assert result["num_env_steps_sampled_lifetime"] == first.env_steps == 120
    assert len(result["evaluation"]["env_runners"]["hist_stats"]["episode_reward"]) == 3
    assert first.updates == {"ppo": 12, "spo": 12, "sac": 80}[name]
    after = weights_of(first)
    assert any((before[n] != after[n]).any() for n in before)
    first.save_checkpoint(str(tmp_path / "saved"))
    about = (tmp_path / "saved" / "rllib_checkpoint.json").read_text()
    assert str(tmp_path) not in about  # a checkpoint may be moved

    again = build(config_of(name))
    again.restore(str(tmp_path / "saved"))
    assert_equal_weights(weights_of(again), after)
    assert (again.env_steps, again.updates) == (120, first.updates)
    assert again.get_policy().get_state()["num_grad_updates"] == first.updates
    # The same episodes by the same policy.
    evaluations = [
        a.evaluate()["env_runners"]["hist_stats"]["episode_reward"] for a in (first, again)
    ]
    assert evaluations[0] == evaluations[1]
    if name == "sac":
        assert len(again.local_replay_buffer) == 120
    updates = again.updates
    again.train()
    assert again.env_steps == 180
    assert again.updates > updates

    policy = Policy.from_checkpoint(str(tmp_path / "saved" / "policies" / DEFAULT_POLICY_ID))
    obs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    np.testing.assert_array_equal(policy.act(obs), first.get_policy().act(obs))
    with pytest.raises(ValueError, match=r"k=2 is not allowed: .*takes one action in each state"):
        policy.act(obs, k=2)


def test_a_seed_decides_everything_and_another_one_changes_it(build: Callable[[Any], Any]) -> None:
    runs = []
    for seed in (0, 0, 1):
        algorithm = build(config_of("ppo").debugging(seed=seed, log_level="ERROR"))
        algorithm.train()
        runs.append(weights_of(algorithm))
    assert_equal_weights(runs[0], runs[1])
    assert any((runs[0][name] != runs[2][name]).any() for name in runs[0])


def test_remote_workers_share_networks_and_statistics(build: Callable[[Any], Any]) -> None:
    algorithm = build(config_of("spo").env_runners(num_env_runners=2))
    algorithm.train()
    theirs = algorithm.env_runner_group.foreach_env_runner(
        lambda worker: worker.get_policy().get_weights(), local_env_runner=False
    )
    own = weights_of(algorithm)
    assert own["observations.number"] == algorithm.env_steps == 60
    for weights in theirs:
        assert_equal_weights(weights, own)
    states = algorithm.env_runner_group.foreach_env_runner(
        lambda worker: worker.async_env.get_sub_environments()[0].unwrapped.np_random.random(),
        local_env_runner=False,
    )
    assert len(set(states)) == 2


def test_a_loss_that_is_not_finite_ends_training(build: Callable[[Any], Any]) -> None:
    algorithm = build(config_of("ppo"))
    with torch.no_grad():
        for parameter in algorithm.get_policy().model._value_branch.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="loss became nan"):
        algorithm.train()


def test_a_foreign_or_damaged_checkpoint_is_refused(
    build: Callable[[Any], Any], tmp_path: Path
) -> None:
    algorithm = build(config_of("ppo"))
    algorithm.save_checkpoint(str(tmp_path / "saved"))
    other = build(config_of("spo"))
    with pytest.raises(ValueError, match="algorithm='PPO'"):
        other.load_checkpoint(str(tmp_path / "saved"))
    file = tmp_path / "saved" / "algorithm_state.pkl"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"algorithm_state\.pkl"):
        algorithm.load_checkpoint(str(tmp_path / "saved"))
