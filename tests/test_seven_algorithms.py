"""What all seven algorithms offer is the same for all: refusals, runs, evaluation, checkpoints."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.env.env_context import EnvContext
from ray.rllib.utils import test_utils

from qvpo_rllib import cli
from qvpo_rllib.algorithms import ALGORITHMS

ENV = "InvertedPendulum-v5"
OFF_POLICY = {"hidden": (8,), "batch_size": 8, "warmup_steps": 20, "replay_capacity": 500}
ON_POLICY = {"hidden": (8,), "train_batch_size": 20, "minibatch_size": 20, "num_epochs": 1}
DIFFUSION = {**OFF_POLICY, "engine": "eager", "diffusion_steps": 2}
TINY: dict[str, dict[str, Any]] = {
    "qvpo": {**DIFFUSION, "num_policy_samples": 2, "num_uniform_samples": 1, "k_eval": 2},
    "dipo": {**DIFFUSION, "action_steps": 1},
    "qsm": DIFFUSION,
    "td3": {**OFF_POLICY, "engine": "eager"},
    "ppo": ON_POLICY,
    "spo": ON_POLICY,
    "sac": OFF_POLICY,
}
# Other values of options that a run may change when it goes on from a checkpoint.
OF_REPLAY = {"actor_lr": 2e-5, "critic_lr": 3e-5, "gamma": 0.7, "tau": 0.3, "grad_clip": 0.4}
OF_PPO = {
    "lr": 2e-5,
    "gamma": 0.7,
    "lambda_": 0.6,
    "clip_param": 0.4,
    "entropy_coeff": 0.03,
    "vf_loss_coeff": 0.2,
    "grad_clip": 0.4,
}
OTHER: dict[str, dict[str, Any]] = {
    **{name: OF_REPLAY for name in ("qvpo", "dipo", "qsm", "td3")},
    "ppo": OF_PPO,
    "spo": OF_PPO,
    "sac": {**OF_REPLAY, "alpha_lr": 4e-5, "auto_alpha": True},
}
seven = pytest.mark.parametrize("name", ALGORITHMS)


class Counting(RLlibCallback):
    """Counts its calls."""

    calls: dict[str, int]

    def on_algorithm_init(self, *, algorithm: Any, **kwargs: Any) -> None:
        self.calls = {}

    def on_train_result(self, *, algorithm: Any, result: dict[str, Any], **kwargs: Any) -> None:
        result["seen_by_a_callback"] = True

    def on_episode_end(self, *, episode: Any, **kwargs: Any) -> None:
        episode.custom_metrics["seen"] = 1.0


def config_of(name: str, num_workers: int = 0, **options: Any) -> Any:
    config = ALGORITHMS[name].load().get_default_config()
    config.environment(ENV).training(**{**TINY[name], **options})
    config.env_runners(num_env_runners=num_workers)
    config.reporting(min_sample_timesteps_per_iteration=60, metrics_num_episodes_for_smoothing=10)
    config.evaluation(evaluation_interval=1, evaluation_duration=2)
    return config.debugging(seed=0, log_level="ERROR").callbacks(Counting)


def weights_of(algorithm: Any) -> dict[str, Any]:
    state = algorithm.get_policy().model.state_dict()
    return {name: value.detach().cpu().numpy().copy() for name, value in state.items()}


def assert_same_weights(one: Any, other: Any) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def options_in_force(policy: Any) -> dict[str, Any]:
    """The options of `OTHER`, each read from where an update reads it."""

    def rate(optimizer: Any) -> float:
        return float(optimizer.param_groups[0]["lr"])

    if hasattr(policy, "learner"):
        learner = policy.learner
        found = {name: getattr(learner.hp, name) for name in ("gamma", "tau", "grad_clip")}
        found["actor_lr"] = rate(learner.actor_optimizer)
        return found | {"critic_lr": rate(learner.critic_optimizer)}
    found = {name: policy.config[name] for name in ("gamma", "grad_clip")}
    if hasattr(policy, "alpha_optim"):
        rates = {rate(optimizer) for optimizer in policy.critic_optims}
        found |= {"tau": policy.config["tau"], "actor_lr": rate(policy.actor_optim)}
        found |= {"critic_lr": rates.pop(), "alpha_lr": rate(policy.alpha_optim)}
        assert not rates
        return found | {"auto_alpha": found["alpha_lr"] > 0}
    found |= {name: policy.config[name] for name in ("clip_param", "vf_loss_coeff")}
    found |= {"lambda_": policy.config["lambda"], "entropy_coeff": policy.entropy_coeff}
    assert policy.cur_lr == rate(policy._optimizers[0])
    return found | {"lr": policy.cur_lr}


@pytest.fixture(scope="module", params=ALGORITHMS)
def trained(request: Any, build_shared: Callable[[Any], Any]) -> tuple[str, Any, dict[str, Any]]:
    """Name, algorithm and the result of its first iteration, 60 env steps with an evaluation."""
    algorithm = build_shared(config_of(request.param))
    return request.param, algorithm, algorithm.train()


# --- refusals, before anything starts ----------------------------------------------------------


@seven
def test_what_nothing_reads_is_refused_by_name(name: str) -> None:
    label = ALGORITHMS[name].label
    option = next(iter(set(TINY[name]) - {"hidden"} - set(DIFFUSION) or {"batch_size"}))
    misspelt = option[:-1] + "_"
    with pytest.raises(ValueError, match=f"'{misspelt}'.*Did you mean"):
        config_of(name).training(**{misspelt: 1})
    with pytest.raises(ValueError, match=f"'{misspelt}'.*Did you mean"):
        config_of(name).update_from_dict({misspelt: 1})
    with pytest.raises(ValueError, match=f"{label} does not read 'model': use hidden instead"):
        config_of(name).training(model={"fcnet_hiddens": [3]})
    with pytest.raises(ValueError, match=f"{label} does not read 'model': use hidden instead"):
        config_of(name).update_from_dict({"model": {"fcnet_hiddens": [3]}})
    with pytest.raises(ValueError, match=f"{label} runs on RLlib's old API stack"):
        config_of(name).update_from_dict({"enable_rl_module_and_learner": True})


@seven
def test_a_configuration_knows_its_algorithm_and_so_does_a_users_subclass(name: str) -> None:
    algorithm = ALGORITHMS[name].load()
    own = type("Own", (algorithm.config_class,), {})
    assert algorithm.config_class().algo_class is own().algo_class is algorithm


@seven
def test_a_whole_configuration_is_taken_as_it_is(name: str) -> None:
    """As Ray Tune hands it to a trial, validated or not."""
    given = config_of(name)
    for values in (given.to_dict(), given.validate() or given.to_dict()):
        taken = ALGORITHMS[name].load().get_default_config().update_from_dict(values)
        taken.validate()
        assert taken.hyperparameters() == given.hyperparameters()


@seven
@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("resources", {"num_gpus": 2}, "num_gpus=2 is not allowed"),
        ("env_runners", {"remote_worker_envs": True}, "remote_worker_envs=True is not supported"),
        ("env_runners", {"observation_filter": "MeanStdFilter"}, "observation_filter="),
        ("environment", {"normalize_actions": False}, "normalize_actions=False is not supported"),
        ("learners", {"num_learners": 1}, "num_learners=1 is not supported"),
        ("evaluation", {"evaluation_duration_unit": "timesteps"}, "whole episodes"),
        ("environment", {"env": "InvertedPendulm-v5"}, "Did you mean 'InvertedPendulum-v5'"),
        ("multi_agent", {"policies": {"a", "b"}}, "Several policies"),
    ],
)
def test_settings_of_rllib_that_mean_nothing_here_are_refused(
    name: str, method: str, settings: dict[str, Any], message: str
) -> None:
    config = config_of(name)
    getattr(config, method)(**settings)
    with pytest.raises(ValueError, match=message):
        config.validate()


@seven
def test_spaces_are_refused_for_a_reason_that_is_true(name: str, capsys: Any) -> None:
    assert cli.main(["train", "--algo", name, "--env", "CartPole-v1"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "Discrete(2)" in error
    assert "continuous actions" in error
    assert "QVPO" not in error.replace("qvpo", "") or name == "qvpo"


@seven
@pytest.mark.parametrize("env", ["CartPole-v1", "Blackjack-v1"])
def test_spaces_are_refused_before_anything_is_trained(name: str, env: str) -> None:
    """Discrete actions, and observations that are no box: RLlib's own algorithms would train."""
    with pytest.raises(ValueError, match=r"continuous actions|observation"):
        ALGORITHMS[name].load().validate_env(gym.make(env), EnvContext({}, worker_index=0))


@seven
def test_a_gpu_that_is_not_there_is_refused(name: str, build: Callable[[Any], Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = config_of(name).resources(num_gpus=1)
    with pytest.raises(ValueError, match="finds no CUDA device here"):
        build(config)


@pytest.fixture(scope="module")
def locked_directory(tmp_path_factory: Any) -> Iterator[Path]:
    """A directory that another process has locked."""
    path = tmp_path_factory.mktemp("locked")
    program = (
        "import pathlib, sys; from qvpo_rllib.files import DirectoryLock\n"
        "lock = DirectoryLock(pathlib.Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        yield path
        other.communicate()


@seven
def test_a_directory_that_another_program_writes_is_refused(
    name: str, locked_directory: Path, capsys: Any
) -> None:
    assert cli.main(["train", "--algo", name, "--run-dir", str(locked_directory)]) == 2
    assert "Another program is writing to" in " ".join(capsys.readouterr().err.split())


# --- a run -------------------------------------------------------------------------------------


def test_a_result_has_the_same_names(trained: Any) -> None:
    _, algorithm, result = trained
    assert result["num_env_steps_sampled_lifetime"] == algorithm.env_steps == 60
    assert result["ledger"]["ingested"] == 60
    assert result["ledger"]["done"] == algorithm.updates > 0
    assert result["faults"]["restarts"] == 0
    stats = result["info"]["learner"]["default_policy"]["learner_stats"]
    assert stats
    assert all(np.isfinite(v) or v == float("inf") for v in stats.values())
    for episodes in (result["env_runners"], result["evaluation"]["env_runners"]):
        assert {"episode_return_mean", "episode_len_mean", "hist_stats"} <= set(episodes)
    assert len(result["evaluation"]["env_runners"]["hist_stats"]["episode_reward"]) == 2


def test_rllibs_own_checks_hold(trained: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """RLlib's `check_train_results`, `check_compute_single_action`, `check_inference_w_connectors`.

    Left out: `check_supported_spaces` runs discrete and nested spaces, which are refused here
    (`test_spaces_are_refused_for_a_reason_that_is_true`); `check_learning_achieved` and
    `check_reproducibilty` train for minutes, which the reports and tests/test_exact_resume.py do;
    `check_off_policyness`, `check_train_results_new_api_stack` and `ModelChecker` are for the new
    API stack or for models of RLlib's catalogue.
    """
    _, algorithm, result = trained
    test_utils.check_train_results(result)
    policy = algorithm.get_policy()
    test_utils.check_inference_w_connectors(policy, ENV, max_steps=5)
    if hasattr(policy, "learner"):
        # A diffusion policy draws without `explore` too: the same noise each time.
        act = policy.act
        monkeypatch.setattr(
            policy,
            "act",
            lambda obs, *, explore=False: act(
                obs, explore=explore, generator=torch.Generator().manual_seed(0)
            ),
        )
        for method, arguments in (
            ("export_model", (str(tmp_path),)),
            ("compute_gradients", (None,)),
            ("compute_log_likelihoods", (None, None)),
        ):
            with pytest.raises(ValueError, match=f"has no {method}: "):
                getattr(policy, method)(*arguments)
    else:
        with pytest.raises(ValueError, match="has no ONNX"):
            policy.export_model(str(tmp_path), onnx=11)
        policy.export_model(str(tmp_path))
        assert (tmp_path / "model.pt").is_file()
    test_utils.check_compute_single_action(algorithm)


def test_callbacks_are_called(trained: Any) -> None:
    _, _, result = trained
    assert result["seen_by_a_callback"]
    assert result["env_runners"]["custom_metrics"]["seen_mean"] == 1.0


def test_evaluating_again_gives_the_same_episodes_and_changes_nothing(trained: Any) -> None:
    _, algorithm, _ = trained
    before = weights_of(algorithm)
    first, second = (
        algorithm.evaluate()["env_runners"]["hist_stats"]["episode_reward"] for _ in range(2)
    )
    assert first == second
    for name, value in weights_of(algorithm).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_stop_is_heard_in_training_and_in_evaluation(trained: Any) -> None:
    _, algorithm, _ = trained
    algorithm.stop_requested = True
    with pytest.raises(KeyboardInterrupt):
        algorithm.train()
    with pytest.raises(KeyboardInterrupt):
        algorithm.evaluate()
    algorithm.stop_requested = False


def test_a_run_goes_on_from_its_checkpoint(
    trained: Any, tmp_path: Path, monkeypatch: Any, build: Callable[[Any], Any]
) -> None:
    """With an evaluation worker, of either kind, as without: both play the same episodes."""
    name, algorithm, _ = trained
    num_workers = int(name in ("qvpo", "ppo"))
    monkeypatch.chdir(tmp_path)
    algorithm.save("saved")
    config = config_of(name, **OTHER[name])
    again = build(config.evaluation(evaluation_num_env_runners=num_workers))
    again.restore("saved")  # a relative path, which RLlib takes for an address
    assert options_in_force(again.get_policy()) == OTHER[name]
    new = type(algorithm).from_checkpoint("saved")
    for other in (again, new):
        assert_same_weights(algorithm, other)
        assert (other.env_steps, other.updates) == (algorithm.env_steps, algorithm.updates)
        counters = {a.get_policy().num_grad_updates for a in (algorithm, other)}
        assert counters == {algorithm.updates}
        assert other.metadata().ledger == algorithm.metadata().ledger
        returns = [a.evaluate()["env_runners"]["episode_return_mean"] for a in (algorithm, other)]
        assert returns[0] == returns[1]
    steps, updates = again.env_steps, again.updates
    again.train()
    assert again.env_steps == steps + 60
    assert again.updates > updates
    new.stop()


@pytest.fixture(scope="module")
def foreign(build_shared: Callable[[Any], Any], tmp_path_factory: Any) -> dict[str, str]:
    """Checkpoints of two algorithms, of which none can be taken for another's."""
    paths = {name: str(tmp_path_factory.mktemp(name)) for name in ("td3", "ppo")}
    for name, path in paths.items():
        build_shared(config_of(name)).save(path)
    return paths


def test_what_a_state_brings_along_gives_way_to_the_policys_own_options() -> None:
    """A schedule of learning rates, and SAC's fixed alpha, which is one of its weights."""

    def policy_of(name: str, **options: Any) -> Any:
        algorithm, box = ALGORITHMS[name].load(), spaces.Box(-1, 1, (2,), np.float32)
        config = config_of(name, **options)
        config.validate()
        return algorithm.policy_class(box, box, {**config.to_dict(), "worker_index": 0})

    half = policy_of("ppo", lr=3e-4, lr_end=1e-4, lr_decay_steps=100)
    half.set_state({**policy_of("ppo").get_state(), "global_timestep": 50})
    assert options_in_force(half)["lr"] == pytest.approx(2e-4)
    fixed = policy_of("sac", alpha=0.3)
    fixed.set_state(policy_of("sac", alpha=0.2, auto_alpha=True).get_state())
    assert fixed.model.log_alpha.exp().item() == pytest.approx(0.3)
    learnt = policy_of("sac", alpha=0.3, auto_alpha=True)
    learnt.set_state(policy_of("sac", alpha=0.2).get_state())
    assert learnt.model.log_alpha.exp().item() == pytest.approx(0.2)


def test_a_checkpoint_of_another_algorithm_changes_nothing(
    trained: Any, foreign: dict[str, str]
) -> None:
    name, algorithm, _ = trained
    other = "td3" if name != "td3" else "ppo"
    before = weights_of(algorithm)
    with pytest.raises(ValueError, match=f"algorithm='{ALGORITHMS[other].label}'"):
        algorithm.restore(foreign[other])
    for key, value in weights_of(algorithm).items():
        np.testing.assert_array_equal(value, before[key])


@seven
def test_arguments_of_the_environment_that_json_cannot_hold_end_no_run(
    name: str, build: Callable[[Any], Any], tmp_path: Path
) -> None:
    config = config_of(name)
    config.environment(env_config={"reset_noise_scale": np.float32(0.02)})
    algorithm = build(config)
    algorithm.save(str(tmp_path))
    again = build(config.copy(copy_frozen=False))
    again.restore(str(tmp_path))
    assert_same_weights(algorithm, again)


@seven
def test_another_configuration_starts_afresh_in_the_same_process(
    name: str, build: Callable[[Any], Any]
) -> None:
    algorithm = build(config_of(name))
    algorithm.training_step()
    assert algorithm.reset_config(config_of(name, gamma=0.5).to_dict())
    assert (algorithm.env_steps, algorithm.updates) == (0, 0)
    assert algorithm.config.hyperparameters().gamma == 0.5
    assert algorithm.train()["num_env_steps_sampled_lifetime"] == 60
