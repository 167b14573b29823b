"""Every setting of RLlib's `AlgorithmConfig` is honoured, refused with a reason, or bookkeeping."""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from test_seven_algorithms import ENV, TINY, config_of

from qvpo_rllib.algorithms import ALGORITHMS
from qvpo_rllib.core.options import options_of
from qvpo_rllib.rollout.pool import WorkerPool
from qvpo_rllib.rollout.worker import ColumnarRolloutWorker
from qvpo_rllib.runtime import base, settings

HERE = Path(__file__).parent
seven = pytest.mark.parametrize("name", ALGORITHMS)


def config_class(name: str) -> Any:
    return ALGORITHMS[name].load().config_class


def read_by(config: Any) -> set[str]:
    options = options_of(config.hyperparameters_class)
    return {*settings.HONOURED, *config.honoured_too, *options, *settings.BOOKKEEPING}


@seven
def test_every_setting_of_this_ray_has_a_verdict(name: str) -> None:
    config = config_class(name)()
    everything = {**vars(AlgorithmConfig()), **vars(config)}
    new = [
        setting
        for setting, own in everything.items()
        if setting not in read_by(config) and not settings.reason_to_refuse(setting, own)
    ]
    assert not new, f"Ray {ray.__version__}: give them a verdict in qvpo_rllib/runtime/settings.py"


def test_no_verdict_is_for_a_setting_that_does_not_exist() -> None:
    known = {setting for name in ALGORITHMS for setting in vars(config_class(name)())}
    known |= {"class", "worker_index"}  # RLlib sets them in copies
    assert known >= settings.HONOURED
    assert known >= settings.BOOKKEEPING.keys()
    known |= {option for name in ALGORITHMS for option in TINY[name]} | {"explore", "k_eval"}
    assert known >= settings.IN_EVALUATION
    patterns = " ".join(settings.REFUSED.values()).split()
    assert [p for p in patterns if not any(fnmatchcase(n, p) for n in known)] == []


@pytest.mark.parametrize("name", ["qvpo", "ppo", "sac"])
def test_every_other_setting_is_refused_by_its_name(name: str) -> None:
    config = config_of(name)
    for setting, own in vars(config_class(name)()).items():
        if setting not in read_by(config):
            setattr(config, setting, "other")
            with pytest.raises(ValueError, match=f"{setting}.*(alone; .+|use .+ instead)"):
                settings.check_settings(config)
            setattr(config, setting, own)
    settings.check_settings(config)


@seven
@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("env_runners", {"explore": False}, "explore=False is not supported: .*options say"),
        ("env_runners", {"exploration_config": {"type": "Random"}}, "does not read 'exploration_c"),
        ("env_runners", {"sample_timeout_s": 0.01}, "It must be 1 or more"),
        ("evaluation", {"evaluation_config": {"explore": True}}, "explore=True is not supported"),
        ("evaluation", {"evaluation_config": {"num_env_runners": 2}}, "no evaluation reads it"),
        ("api_stack", {"enable_rl_module_and_learner": True}, "runs on RLlib's old API stack"),
        ("framework", {"framework": "tf2"}, "written in PyTorch"),
        ("learners", {"num_gpus_per_learner": 1}, r"resources\(num_gpus=1\)"),
        ("environment", {"env": None}, "No environment is given"),
        ("training", {}, None),
    ],
)
def test_refusals_say_what_to_do(
    name: str, method: str, values: dict[str, Any], message: str | None
) -> None:
    config = config_of(name)
    if values.get("env", ENV) is None:
        config.env = None
    else:
        getattr(config, method)(**values)
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        config.validate()


@seven
def test_attributes_are_no_way_round(name: str) -> None:
    label = ALGORITHMS[name].label

    def refused(config: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            config.validate()

    config = config_of(name)
    config.k_behaviour = 4
    refused(config, "There is no setting 'k_behaviour'.")
    config = config_of(name)
    config.validate()  # its own network has been put in
    config.hidden = (4,)
    config.validate()
    config.model["fcnet_hiddens"] = [3]
    refused(config, f"{label} does not read 'model': use hidden instead")
    config = config_of(name)
    config.framework_str = "jax"
    refused(config, "framework_str='jax'")


def test_names_of_rllib_lead_to_the_right_option() -> None:
    for algorithm, given, instead in (
        ("qvpo", "lr_schedule", "use actor_lr and critic_lr"),
        ("qvpo", "lr", "use actor_lr and critic_lr"),
        ("ppo", "num_sgd_iter", "use num_epochs"),
        ("sac", "num_steps_sampled_before_learning_starts", "use warmup_steps"),
    ):
        with pytest.raises(ValueError, match=instead):
            config_class(algorithm)().training(**{given: 1})
        with pytest.raises(ValueError, match=instead):  # RLlib's own default is no excuse
            config_class(algorithm)().update_from_dict({given: 0.001})


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_a_checkpoint_of_an_earlier_version_has_no_derived_values(name: str) -> None:
    config = config_of(name)
    config.validate()
    state = {n: v for n, v in config.get_state().items() if n != "derived_values"}
    again = config_class(name).from_state(state)
    again.validate()
    assert again.hyperparameters() == config.hyperparameters()
    assert again.derived_values == config.derived_values


# --- what is honoured --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(build_shared: Any, tmp_path_factory: Any) -> Any:
    """A QVPO with settings of all kinds after two iterations, and what was to be seen of it."""
    config = config_of("qvpo", warmup_steps=12)
    config.environment(env_config={"reset_noise_scale": 0.02})
    config.env_runners(
        num_envs_per_env_runner=2,
        rollout_fragment_length=3,
        validate_env_runners_after_construction=False,
    )
    config.python_environment(extra_python_environs_for_driver={"QVPO_SEEN": "driver"})
    config.python_environment(extra_python_environs_for_worker={"QVPO_SEEN": "worker"})
    config.evaluation(
        evaluation_interval=2,
        evaluation_duration=3,
        evaluation_config={"num_envs_per_env_runner": 2, "restart_failed_env_runners": False},
        evaluation_sample_timeout_s=33,
        evaluation_unhealthy_workers_timeout_s=0.2,
        evaluation_error_after_n_consecutive_skips=1,
    )
    config.reporting(
        min_time_s_per_iteration=0.3,
        min_sample_timesteps_per_iteration=12,
        min_train_timesteps_per_iteration=16,
        metrics_num_episodes_for_smoothing=1,
        keep_per_episode_custom_metrics=True,
    )
    config.debugging(seed=7, log_level="CRITICAL", log_sys_usage=False)
    config.fault_tolerance(max_num_env_runner_restarts=5, env_runner_health_probe_timeout_s=0.7)
    config.training(replay_in_checkpoints=False)
    validated: list[bool] = []
    add_workers = EnvRunnerGroup.add_workers

    def spying(self: Any, number: int, validate: bool = False, **kwargs: Any) -> None:
        validated.append(validate)
        add_workers(self, number, validate=validate, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EnvRunnerGroup, "add_workers", spying)
        patch.setenv("QVPO_SEEN", "")
        algorithm = build_shared(config)
        on_driver = os.environ["QVPO_SEEN"]
        worker = ColumnarRolloutWorker(
            env_creator=algorithm.env_creator,
            default_policy_class=algorithm.policy_class,
            config=algorithm.config,
            worker_index=1,
        )
        worker.stop()
        on_worker = os.environ["QVPO_SEEN"]
    level = logging.getLogger("ray.rllib").level
    directory = tmp_path_factory.mktemp("saved")
    results = [algorithm.train(), algorithm.train()]
    algorithm.save(str(directory))
    return SimpleNamespace(**locals())


@pytest.fixture(scope="module")
def bundles(seen: Any) -> Any:
    """What a trial asks of the cluster: its strategy, and the process's and workers' bundles."""
    config = seen.config.copy(copy_frozen=False)
    config.resources(
        num_gpus=0.5,
        num_cpus_for_main_process=3,
        custom_resources_for_main_process={"a": 1},
        placement_strategy="SPREAD",
    )
    config.env_runners(
        num_env_runners=2,
        num_cpus_per_env_runner=2,
        num_gpus_per_env_runner=0.25,
        custom_resources_per_env_runner={"b": 1},
    )
    config.evaluation(evaluation_num_env_runners=1)
    return ALGORITHMS["qvpo"].load().default_resource_request(config.to_dict())


def unhealthy_evaluation(seen: Any) -> float:
    """Seconds until an evaluation without a healthy worker ends in an error."""
    started_s = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        group = seen.algorithm.eval_env_runner_group
        patch.setattr(group, "num_remote_env_runners", lambda: 1)
        with pytest.raises(RuntimeError, match="threshold: 1"):
            seen.algorithm.evaluate()
    return time.monotonic() - started_s


def probe_timeout(seen: Any) -> float:
    timeouts: list[float] = []
    manager = seen.algorithm.env_runner_group._worker_manager
    with pytest.MonkeyPatch.context() as patch:
        probe = "probe_unhealthy_actors"
        patch.setattr(manager, probe, lambda timeout_seconds, **_: timeouts.append(timeout_seconds))
        seen.algorithm.env_runner_group.probe_unhealthy_env_runners()
    return timeouts[0]


def evaluation_timeout(seen: Any) -> float:
    timeouts: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "evaluate_shares", lambda group, shares, t: timeouts.append(t) or [])
        with pytest.raises(RuntimeError, match="evaluation_sample_timeout_s=33"):
            seen.algorithm._evaluate_with_fixed_duration()
    return timeouts[0]


def restore_timeout(seen: Any) -> str:
    """The error of a pool whose only worker has been down for longer than is allowed."""
    config = seen.config.copy(copy_frozen=False)
    config.fault_tolerance(env_runner_restore_timeout_s=5)
    lost = SimpleNamespace(
        down_since=time.monotonic() - 6, dead="", probe=None, next_probe=float("inf")
    )
    pool = SimpleNamespace(config=config, _workers={1: lost}, is_up=lambda index: False)
    with pytest.raises(RuntimeError) as error:
        WorkerPool._send_probes(pool)
    return str(error.value)


# What shows that a setting acts, given `seen`.
EFFECTS: dict[str, Callable[[Any], bool]] = {
    "env": lambda s: s.algorithm.env_runner.envs[0].spec.id == ENV,
    "env_config": lambda s: s.algorithm.env_runner.envs[0].unwrapped._reset_noise_scale == 0.02,
    "num_envs_per_env_runner": lambda s: len(s.algorithm.env_runner.envs) == 2,
    "rollout_fragment_length": lambda s: s.algorithm.env_runner.fragment_length == 3,
    "validate_env_runners_after_construction": lambda s: s.validated[0] is False,
    "extra_python_environs_for_driver": lambda s: s.on_driver == "driver",
    "extra_python_environs_for_worker": lambda s: s.on_worker == "worker",
    "callbacks_class": lambda s: all(r["seen_by_a_callback"] for r in s.results),
    "evaluation_interval": lambda s: ["evaluation" in r for r in s.results] == [False, True],
    "evaluation_duration": lambda s: s.results[1]["evaluation"]["env_runners"]["num_episodes"] == 3,
    "evaluation_config": lambda s: len(s.algorithm.eval_env_runner.envs) == 2,
    "evaluation_unhealthy_workers_timeout_s": lambda s: unhealthy_evaluation(s) >= 0.2,
    "evaluation_error_after_n_consecutive_skips": lambda s: unhealthy_evaluation(s) > 0,
    "min_time_s_per_iteration": lambda s: s.results[1]["time_this_iter_s"] >= 0.3,
    "min_sample_timesteps_per_iteration": lambda s: s.results[0]["ledger"]["ingested"] >= 12,
    "min_train_timesteps_per_iteration": lambda s: s.results[0]["ledger"]["done"] >= 2,
    "metrics_num_episodes_for_smoothing": lambda s: (
        len(s.results[1]["env_runners"]["hist_stats"]["episode_reward"])
        == s.results[1]["env_runners"]["episodes_this_iter"]
    ),
    "keep_per_episode_custom_metrics": lambda s: (
        set(s.results[1]["env_runners"]["custom_metrics"]["seen"]) == {1.0}
    ),
    "seed": lambda s: s.algorithm.policy.seed == 7,
    "log_level": lambda s: s.level == logging.CRITICAL,
    "log_sys_usage": lambda s: not s.algorithm._monitor.is_alive(),
    "replay_in_checkpoints": lambda s: not (s.directory / "replay").exists(),
    "max_num_env_runner_restarts": lambda s: (
        s.algorithm.env_runner_group._remote_args["max_restarts"] == 5
    ),
    "restart_failed_env_runners": lambda s: (
        s.algorithm.eval_env_runner_group._remote_args["max_restarts"] == 0
    ),
    "env_runner_health_probe_timeout_s": lambda s: probe_timeout(s) == 0.7,
    "evaluation_sample_timeout_s": lambda s: evaluation_timeout(s) == 33,
    "env_runner_restore_timeout_s": lambda s: "restore_timeout_s=5." in restore_timeout(s),
}
OF_BUNDLES: dict[str, Callable[[Any], bool]] = {
    "placement_strategy": lambda b: b.strategy == "SPREAD",
    "num_gpus": lambda b: b.bundles[0]["GPU"] == 0.5,
    "num_cpus_for_main_process": lambda b: b.bundles[0]["CPU"] == 3,
    "custom_resources_for_main_process": lambda b: b.bundles[0]["a"] == 1,
    "num_env_runners": lambda b: len(b.bundles) == 1 + 2 + 1,
    "evaluation_num_env_runners": lambda b: len(b.bundles) == 1 + 2 + 1,
    "num_cpus_per_env_runner": lambda b: b.bundles[1]["CPU"] == 2,
    "num_gpus_per_env_runner": lambda b: b.bundles[1]["GPU"] == 0.25,
    "custom_resources_per_env_runner": lambda b: b.bundles[1]["b"] == 1,
}
# Of remote workers, with their failures and late answers.
ELSEWHERE = {
    "sample_timeout_s": "test_faults.py",
    "delay_between_env_runner_restarts_s": "test_faults.py",
    "num_consecutive_env_runner_failures_tolerance": "test_faults.py",
    "restart_failed_sub_environments": "test_outcomes.py",
    "evaluation_parallel_to_training": "test_async_sampling.py",
}


def test_every_honoured_setting_is_shown_to_act() -> None:
    assert EFFECTS.keys() | OF_BUNDLES.keys() | ELSEWHERE.keys() == settings.HONOURED


@pytest.mark.parametrize("setting", EFFECTS)
def test_setting_acts(setting: str, seen: Any) -> None:
    assert EFFECTS[setting](seen)


@pytest.mark.parametrize("setting", OF_BUNDLES)
def test_resource_is_asked_for(setting: str, bundles: Any) -> None:
    assert OF_BUNDLES[setting](bundles)


@pytest.mark.parametrize("setting", ELSEWHERE)
def test_setting_is_shown_elsewhere(setting: str) -> None:
    file = HERE / ELSEWHERE[setting]
    if not file.exists():
        pytest.skip(f"there is no {file.name} yet")
    assert setting in file.read_text()
