"""From the command line's words to a checked training plan, before anything starts."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
import yaml
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env.env_context import EnvContext

from qvpo_rllib.algorithms import AlgorithmEntry, entry_of
from qvpo_rllib.core.env_config import decode_env_config, encode_env_config
from qvpo_rllib.core.errors import (
    RAISED_BY_ENVIRONMENT,
    EnvironmentFailure,
    UnusableOutcome,
    described,
)
from qvpo_rllib.core.options import (
    Options,
    OptionValue,
    Setting,
    completed,
    parse_option,
    require_at_least,
)
from qvpo_rllib.rollout import environments
from qvpo_rllib.rollout.env_batch import EnvBatch, not_for_rllib, wrong_number
from qvpo_rllib.rollout.environments import filter_warnings
from qvpo_rllib.rollout.episodes import try_a_step
from qvpo_rllib.runtime.ray_private import environment_maker
from qvpo_rllib.training.trackers import check_loggers

logger = logging.getLogger(__name__)

EVALUATION_EPISODES = 10
# Fields of a plan whose type `isinstance` does not take.
OF_COLLECTIONS = {"hyperparameters": Mapping, "env_config": Mapping, "log": list | tuple}
INTERVAL = re.compile(r"(\d+(?:\.\d+)?)(min)?")


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Everything a training run is, resolved: what `config.json` in the run directory holds."""

    algo: str
    env: str
    preset: str
    seed: int
    env_steps: int
    eval_interval: int
    num_env_runners: int
    num_envs_per_env_runner: int
    num_gpus: float
    hyperparameters: Setting
    # Beside the checkpoint at every evaluation: one after so many env steps, or so many minutes.
    checkpoint_env_steps: int | None = None
    checkpoint_minutes: float | None = None
    keep_checkpoints: int = 1
    env_config: dict[str, Any] = field(default_factory=dict)  # as `encode_env_config` gives it
    log: Sequence[str] = ()  # trackers (`trackers.LOGGERS`)

    def __post_init__(self) -> None:
        entry_of(self.algo)
        for name, least in (
            ("env_steps", 1),
            ("eval_interval", 1),
            ("num_envs_per_env_runner", 1),
            ("num_env_runners", 0),
            ("seed", 0),
            ("keep_checkpoints", 1),
        ):
            require_at_least("--" + name.replace("_", "-"), getattr(self, name), least)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TrainingPlan":
        """Returns the plan in the content of a `config.json`, maybe of an earlier version.

        Raises:
            ValueError: it is none, or damaged.
        """
        try:
            for declared in fields(cls):
                name = declared.name
                kind: Any = OF_COLLECTIONS.get(name, declared.type)
                value = config.get(name, declared.default)
                value = float(value) if kind is float and type(value) is int else value
                if value is not MISSING and not isinstance(value, kind):
                    raise TypeError(f"{name}={value!r} is not of the type {kind}")
            plan = cls(**config)
        except TypeError as error:
            raise ValueError(
                f"Cannot resume: config.json is no training plan of this version ({error}). "
                "Restore that file, or start a new run in another --run-dir."
            ) from None
        options = completed(plan.hyperparameters, plan.algorithm.hyperparameters)
        return replace(plan, hyperparameters=options)

    def check(self) -> None:
        """Raises `ValueError` for an environment or options with which it would not run."""
        wrapping: Any = self.hyperparameters
        check_environment(
            self.env,
            decode_env_config(self.env_config),
            wrapping.get("frame_skip", 1),
            wrapping.get("wrappers", ()),
            num_envs=self.num_envs_per_env_runner,
            takes_vectors=self.algorithm.load().config_class.takes_vectors,
        )
        check_loggers(self.log)
        _ = self.config

    @property
    def algorithm(self) -> AlgorithmEntry:
        return entry_of(self.algo)

    @property
    def title(self) -> str:
        """Names the run on the screen: "SAC on Hopper-v5 (light, seed 0)"."""
        return f"{self.algorithm.label} on {self.env} ({self.preset}, seed {self.seed})"

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as `config.json` has them."""
        return asdict(self)

    def iteration_steps(self) -> int:
        """Returns the env steps between two status updates: an evaluation interval's hundredth.

        All environments step together, so it is a multiple of their number, and one that meets
        the evaluation's env steps exactly where there is one.
        """
        num_envs = self.num_envs_per_env_runner * max(1, self.num_env_runners)
        least = -(-self.eval_interval // 100 // num_envs) * num_envs
        multiples = range(max(num_envs, least), self.eval_interval + 1, num_envs)
        return next((m for m in multiples if self.eval_interval % m == 0), max(num_envs, least))

    @cached_property
    def config(self) -> AlgorithmConfig:
        """The validated RLlib configuration; env steps, not iterations, say when to evaluate."""
        config: AlgorithmConfig = self.algorithm.load().get_default_config()
        config.environment(self.env, env_config=decode_env_config(self.env_config))
        config.training(**self.hyperparameters)
        config.env_runners(
            num_env_runners=self.num_env_runners,
            num_envs_per_env_runner=self.num_envs_per_env_runner,
        )
        config.resources(num_gpus=self.num_gpus)
        # Before every training step RLlib asks each lost worker whether it is back; one whose node
        # is gone would cost the default, 30 s, every time.
        config.fault_tolerance(env_runner_health_probe_timeout_s=0.1)
        config.debugging(seed=self.seed, log_level="ERROR")
        config.reporting(
            min_sample_timesteps_per_iteration=self.iteration_steps(),
            metrics_num_episodes_for_smoothing=10,
        )
        config.evaluation(
            evaluation_interval=10**9,
            evaluation_duration=EVALUATION_EPISODES,
            evaluation_config={
                "explore": False,
                "num_envs_per_env_runner": EVALUATION_EPISODES,
            },
        )
        config.validate()
        return config


def make_plan(
    *,
    algo: str = "qvpo",
    env: str | None,
    preset: str | None,
    seed: int,
    env_steps: int | None,
    eval_interval: int | None,
    num_env_runners: int,
    num_envs_per_env_runner: int | None,
    num_gpus: float | None,
    settings: Sequence[str],
    checkpoint_interval: str | None = None,
    keep_checkpoints: int = 1,
    env_config: Sequence[str] = (),
    log: Sequence[str] = (),
) -> TrainingPlan:
    """Returns a plan with presets, options and the task's own values resolved.

    Args:
        algo: a name in `ALGORITHMS`.
        settings: "key=value" strings, each an option of the algorithm.
        checkpoint_interval: "20000" (env steps) or "10min".
        env_config: "key=value" strings, arguments of the environment; a value is YAML.

    Raises:
        ValueError: anything that would not run, named with what is allowed.
    """
    kind = entry_of(algo).hyperparameters
    if preset is None:
        preset = "quick" if env in (None, kind.runs["quick"].env) else "default"
    kind.preset(preset)  # refuses one that the algorithm does not have
    defaults = kind.runs[preset]
    env = env or defaults.env
    env_steps = defaults.env_steps if env_steps is None else env_steps
    options = kind.resolve(preset, parse_settings(settings, kind), env, env_steps)
    checkpoint_env_steps, checkpoint_minutes = parse_interval(checkpoint_interval)
    plan = TrainingPlan(
        algo=algo,
        env=env,
        preset=preset,
        seed=seed,
        env_steps=env_steps,
        eval_interval=defaults.eval_interval if eval_interval is None else eval_interval,
        num_env_runners=num_env_runners,
        num_envs_per_env_runner=(
            defaults.num_envs if num_envs_per_env_runner is None else num_envs_per_env_runner
        ),
        num_gpus=resolve_gpus(num_gpus),
        hyperparameters=options.to_json(),
        checkpoint_env_steps=checkpoint_env_steps,
        checkpoint_minutes=checkpoint_minutes,
        keep_checkpoints=keep_checkpoints,
        env_config=encode_env_config(parse_env_config(env_config)),
        log=tuple(log),
    )
    plan.check()
    warn_of_no_update(plan.env_steps, plan.hyperparameters)
    return plan


def warn_of_no_update(env_steps: int, options: Mapping[str, Any]) -> None:
    """Warns if a run ends before its warm-up does, so that its policy never learns."""
    warmup = options.get("warmup_steps", 0)
    if env_steps <= warmup:
        logger.warning(
            "The run's %s env steps are all of its warm-up (warmup_steps=%s), whose actions are "
            "random: no update will be done, and the policy stays as it was drawn. Give more env "
            "steps or fewer warmup_steps.",
            f"{env_steps:,}",
            f"{warmup:,}",
        )


def parse_interval(text: str | None) -> tuple[int | None, float | None]:
    """Returns `--checkpoint-interval` as (env steps, None) or as (None, minutes)."""
    if text is None:
        return None, None
    number, unit = INTERVAL.sub(r"\1", text), INTERVAL.sub(r"\2", text)
    if not INTERVAL.fullmatch(text) or float(number) <= 0 or (not unit and "." in number):
        raise ValueError(
            f"--checkpoint-interval {text!r} is not allowed: give env steps, such as 20000, or "
            "minutes, such as 10min or 0.5min; more than 0."
        )
    return (None, float(number)) if unit else (int(number), None)


def parse_settings(settings: Sequence[str], kind: type[Options]) -> dict[str, OptionValue]:
    """Returns `["k_behavior=8", "hidden=256,256"]` as a dict with values of the options' types."""
    values: dict[str, OptionValue] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"--set {setting!r} is not of the form key=value.")
        values[name.strip()] = parse_option(name.strip(), text, kind)
    return values


def parse_env_config(settings: Sequence[str]) -> dict[str, Any]:
    """Returns `["xml_file=ant.xml", "limits=[0, 1]"]` as a dict; values are read as YAML."""
    values = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not name.strip():
            raise ValueError(f"--env-config {setting!r} is not of the form key=value.")
        try:
            values[name.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            what = " ".join(str(error).split())
            raise ValueError(f"--env-config {setting!r}: the value is no YAML ({what}).") from None
    return values


def check_environment(
    env: str,
    env_config: Mapping[str, Any] | None = None,
    frame_skip: int = 1,
    wrappers: Sequence[str] = (),
    *,
    num_envs: int | None = None,
    takes_vectors: bool = True,
) -> None:
    """Makes the environment once and takes a step in it, before anything else starts.

    Args:
        num_envs: the sub-environments that a vector environment must have; None: any number.
        takes_vectors: whether the algorithm steps vector environments; of an id that makes both
            kinds, one that does not gets the single environment.

    Raises:
        ValueError: it does not exist, cannot be made, raises, does not suit any algorithm here, or
            returns what Gymnasium's API rules out.
    """
    filter_warnings()
    number = num_envs if takes_vectors else None
    make = environment_maker(env, frame_skip, wrappers, num_envs=number)
    try:
        made = make(EnvContext(env_config or {}, worker_index=0))
    except RAISED_BY_ENVIRONMENT as error:
        raise ValueError(
            f"The environment {env!r} could not be made: {described(error)}"
        ) from error
    try:
        if isinstance(made, EnvBatch):
            if not takes_vectors:
                raise ValueError(not_for_rllib(env))
            if number not in (None, made.num_envs):
                raise ValueError(wrong_number(made, number))
        environments.check_environment(made, env)
        try_a_step(made, env)
    except (UnusableOutcome, EnvironmentFailure) as error:
        raise ValueError(str(error)) from error
    finally:
        made.close()


def resolve_gpus(num_gpus: float | None) -> float:
    """Returns the number of GPUs asked for; if none was, 1 where there is one and else 0."""
    if num_gpus is not None and not 0 <= num_gpus <= 1:
        raise ValueError(
            f"--num-gpus {num_gpus:g} is not allowed: the learner uses one GPU at most (0, a "
            "fraction, or 1). To use more, run several trials side by side with Ray Tune."
        )
    available = torch.cuda.is_available()
    if num_gpus is None:
        return 1.0 if available else 0.0
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    if num_gpus > 0 and not available and not on_cluster:
        raise ValueError(
            f"--num-gpus {num_gpus:g} was asked for, but PyTorch {torch.__version__} finds no CUDA "
            "device. Use --num-gpus 0, or a machine and a PyTorch build with CUDA."
        )
    return num_gpus


def gpus_here(before: float, asked: float | None) -> float:
    """Returns the GPUs of a run that goes on: those asked for, else as before, if there are any."""
    if asked is None and before > 0 and not torch.cuda.is_available():
        logger.warning("The run used a GPU, and there is none here: it goes on on the CPU.")
        return 0.0
    return before if asked is None else resolve_gpus(asked)
