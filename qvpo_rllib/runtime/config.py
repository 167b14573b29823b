"""RLlib's `AlgorithmConfig` with an algorithm's own options: for all, and for off-policy ones."""

import functools
import inspect
import math
from typing import Any, ClassVar, Self

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided

from qvpo_rllib.core.hyperparameters import resolved_hyperparameters
from qvpo_rllib.core.options import Options, check_name, defaults_of, options_of
from qvpo_rllib.rollout.worker import ColumnarRolloutWorker
from qvpo_rllib.runtime.ray_private import check_environment_id, check_setting

# Settings of RLlib's `training()` and the options that replace them, where an algorithm has no
# option of that name. They are refused, not ignored.
REPLACED_OPTIONS = {
    "lr": ("actor_lr", "critic_lr"),
    "train_batch_size": ("batch_size",),
    "train_batch_size_per_learner": ("batch_size", "train_batch_size"),
    "minibatch_size": ("batch_size",),
    "num_epochs": ("update_ratio",),
    "model": ("hidden",),
    "optimizer": ("actor_lr", "critic_lr", "adam_eps", "lr"),
    "replay_buffer_config": ("replay_capacity", "train_batch_size"),
}
# Env steps of a fragment in asynchronous sampling: enough that sending one costs little beside it.
ASYNC_FRAGMENT_STEPS = 64
# By configuration class: the algorithm that names it. Not an attribute of the configuration: Ray
# disassembles an actor's class with all classes in it, and would go round in a circle.
ALGORITHM_OF: dict[type, type] = {}
# The switches of the API stack, which is fixed: RLlib's update would warn about them.
UNUSED_STATE = ("enable_rl_module_and_learner", "enable_env_runner_and_connector_v2")


class BaseConfig(AlgorithmConfig):  # type: ignore[misc]
    """What the configurations of all algorithms share.

    It stands before RLlib's own configuration in a subclass's bases. A subclass names its
    `hyperparameters_class`. `training(...)` takes every field of it, which documents them;
    everything else is RLlib's.

    One iteration is at least 1,000 env steps (`reporting(min_sample_timesteps_per_iteration=…)`);
    every 10th ends with an evaluation of 10 episodes.
    """

    hyperparameters_class: ClassVar[type[Options]]
    algorithm_name: ClassVar[str]  # in messages and checkpoints
    # RLlib's settings that are made of the hyperparameters.
    derived: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        """`help(….training)` and completion show the options with their defaults."""
        super().__init_subclass__()
        if hasattr(cls, "hyperparameters_class"):
            training = _with_options(cls.training, cls.hyperparameters_class)
            cls.training = training  # type: ignore[method-assign]

    def __init__(self, algo_class: type | None = None) -> None:
        known = (ALGORITHM_OF[kind] for kind in type(self).__mro__ if kind in ALGORITHM_OF)
        super().__init__(algo_class or next(known, None))
        self._set_options(defaults_of(self.hyperparameters_class))
        # `TorchPolicy` lives on RLlib's old API stack. Set directly: `api_stack()` would warn about
        # an exploration config, which is not how these policies explore.
        self.enable_rl_module_and_learner = False
        self.enable_env_runner_and_connector_v2 = False
        self.framework("torch")
        self.env_runners(num_env_runners=0)
        self.reporting(min_sample_timesteps_per_iteration=1000, min_time_s_per_iteration=0)
        self.evaluation(
            evaluation_interval=10,
            evaluation_duration=10,
            evaluation_duration_unit="episodes",
            # RLlib's 120 s would cut ten long episodes with the best of 32 actions short.
            evaluation_sample_timeout_s=3600.0,
            evaluation_config={"explore": False, "num_envs_per_env_runner": 10},
        )
        # Whether checkpoints hold the replay; without it they are small but training that goes on
        # from one has to fill the replay anew.
        self.replay_in_checkpoints = True

    def training(self, *, replay_in_checkpoints: bool = NotProvided, **options: Any) -> Self:
        """Sets hyperparameters by name. Raises `ValueError` for an unknown or replaced name."""
        for name in options:
            self._refuse_unused(name)
            check_name(name, self.hyperparameters_class)
        self._set_options(options)
        if replay_in_checkpoints is not NotProvided:
            self.replay_in_checkpoints = replay_in_checkpoints
        return self

    def update_from_dict(self, config_dict: dict[str, Any]) -> Self:
        """RLlib's, but a name that nothing reads is refused instead of silently kept."""
        full_state = "class" in config_dict  # as in a checkpoint, with internal names
        # Tune hands over whole configurations, with what `validate` made of the hyperparameters.
        # RLlib writes `lambda_` without its underscore there.
        options = {name.rstrip("_") for name in options_of(self.hyperparameters_class)}
        whole = full_state or options <= {name.rstrip("_") for name in config_dict}
        kept = {}
        for name, value in config_dict.items():
            if whole and name in self.derived:
                setattr(self, name, value)
                continue
            if name in UNUSED_STATE or self._is_replaced(name):
                # A value that is there anyway says nothing.
                if not full_state and value != getattr(self, name, value):
                    self._refuse_unused(name)
                continue
            if not full_state:
                check_setting(name, self)
            kept[name] = value
        super().update_from_dict(kept)
        return self

    def hyperparameters(self) -> Any:
        """The checked hyperparameters with what is left to the task resolved."""
        return resolved_hyperparameters(self, self.hyperparameters_class)

    def validate(self) -> None:
        super().validate()
        name = self.algorithm_name
        if not isinstance(self.num_gpus, int | float) or not 0 <= self.num_gpus <= 1:
            raise ValueError(
                f"num_gpus={self.num_gpus!r} is not allowed: {name}'s learner uses one GPU at most "
                "(0, a fraction, or 1). To use more GPUs, run several trials side by side with "
                "Ray Tune, each on its own GPU or a fraction of one."
            )
        if self.num_envs_per_env_runner < 1 or self.num_env_runners < 0:
            raise ValueError(
                f"num_env_runners={self.num_env_runners} and num_envs_per_env_runner="
                f"{self.num_envs_per_env_runner} are not allowed: at least 0 and at least 1."
            )
        if self.evaluation_interval and (
            self.evaluation_duration_unit != "episodes"
            or not isinstance(self.evaluation_duration, int)
        ):
            raise ValueError(
                f"evaluation_duration={self.evaluation_duration!r} "
                f"{self.evaluation_duration_unit} is not supported: {name} evaluates whole "
                "episodes with a quota for each environment, so that short ones are not favoured. "
                "Give a number of episodes."
            )
        if self.is_multi_agent:
            raise ValueError(
                f"Several policies (multi_agent) are not supported: {name} trains one."
            )
        self._refuse_unread_settings()
        if isinstance(self.env, str):
            check_environment_id(self.env)

    # Settings of RLlib's that mean something for other algorithms and nothing here: the only value
    # that is allowed, and what to do instead.
    unread_settings: ClassVar[dict[str, tuple[Any, str]]] = {
        "remote_worker_envs": (False, "raise num_envs_per_env_runner or num_env_runners"),
        "observation_filter": ("NoFilter", "normalise observations in an environment wrapper"),
        "normalize_actions": (True, "the policy's actions are in [-1, 1]"),
        "num_learners": (0, "the learner runs in the algorithm's own process"),
    }

    def _refuse_unread_settings(self) -> None:
        for setting, (only, reason) in self.unread_settings.items():
            if setting == "batch_mode" and self.in_evaluation:
                continue  # RLlib sets it in the evaluation's copy
            if getattr(self, setting) != only:
                raise ValueError(
                    f"{setting}={getattr(self, setting)!r} is not supported: "
                    f"{self.algorithm_name} allows {only!r} alone; {reason}."
                )

    def _set_options(self, options: dict[str, Any]) -> None:
        for name, value in options.items():
            setattr(self, name, value)

    def _is_replaced(self, name: str) -> bool:
        return name in REPLACED_OPTIONS and name not in options_of(self.hyperparameters_class)

    def _refuse_unused(self, name: str) -> None:
        if name in UNUSED_STATE:
            raise ValueError(
                f"{name} cannot be changed: {self.algorithm_name} runs on RLlib's old API stack."
            )
        if self._is_replaced(name):
            known = options_of(self.hyperparameters_class)
            *rest, last = [option for option in REPLACED_OPTIONS[name] if option in known]
            instead = f"{', '.join(rest)} and {last}" if rest else last
            raise ValueError(
                f"{self.algorithm_name} does not read {name!r}: use {instead} instead."
            )


class OffPolicyConfig(BaseConfig):
    """Configuration of an algorithm that learns from a replay on this package's runtime."""

    unread_settings = BaseConfig.unread_settings | {
        "batch_mode": ("truncate_episodes", "a fragment is rollout_fragment_length env steps"),
    }

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class)
        self.env_runners(
            env_runner_cls=ColumnarRolloutWorker,
            num_envs_per_env_runner=1,
            rollout_fragment_length="auto",
            # A worker that takes longer is restarted. Its first action may compile for a minute.
            sample_timeout_s=300.0,
        )
        self.fault_tolerance(
            delay_between_env_runner_restarts_s=1.0,
            num_consecutive_env_runner_failures_tolerance=3,
            env_runner_restore_timeout_s=600.0,
        )
        # Episodes come with the fragments; RLlib's own question to remote workers would wait behind
        # those in flight.
        self.reporting(metrics_episode_collection_timeout_s=0.0)

    def get_rollout_fragment_length(self, worker_index: int = 0) -> int:
        """Steps of each environment in a fragment.

        "auto" is 1, with an update's weights at once in force; in asynchronous sampling it is what
        makes a fragment `ASYNC_FRAGMENT_STEPS` env steps.
        """
        if self.rollout_fragment_length != "auto":
            return int(self.rollout_fragment_length)
        if self.num_env_runners == 0 or self.sampling_mode == "sync":
            return 1
        length: int = math.ceil(ASYNC_FRAGMENT_STEPS / self.num_envs_per_env_runner)
        return length

    def validate(self) -> None:
        super().validate()
        self._check_what_needs_a_gpu(self.hyperparameters())

    def _check_what_needs_a_gpu(self, hp: Any) -> None:
        for name, value, instead in (
            ("engine", "cuda_graph", "'auto', 'compiled', 'native' or 'eager'"),
            ("sampling_precision", "tf32", "'fp32', or 'bf16', which CPUs know too"),
            ("ranking_precision", "tf32", "'fp32'"),
        ):
            if getattr(hp, name, None) == value and not self.num_gpus:
                raise ValueError(
                    f"{name}={value!r} needs an NVIDIA GPU, but num_gpus={self.num_gpus}. Use "
                    f"{instead}, or give the learner a GPU (num_gpus=1)."
                )


def _with_options(training: Any, kind: type[Options]) -> Any:
    """`training` with a signature that lists the options of `kind`."""

    @functools.wraps(training)
    def wrapper(self: Any, **options: Any) -> Any:
        return training(self, **options)

    wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value)
                for name, value in defaults_of(kind).items()
            ),
            inspect.Parameter(
                "replay_in_checkpoints", inspect.Parameter.KEYWORD_ONLY, default=True
            ),
        ]
    )
    return wrapper
