"""`OffPolicyConfig`: RLlib's `AlgorithmConfig` with an algorithm's own hyperparameters."""

import difflib
import functools
import inspect
import math
from typing import Any, ClassVar, Self

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided

from qvpo_rllib.core.hyperparameters import OffPolicyHyperparameters, resolved_hyperparameters
from qvpo_rllib.core.options import check_name, defaults_of
from qvpo_rllib.rollout.environments import check_environment_id

# Options of RLlib's `training()` that some other option replaces here. They are refused, not
# ignored.
REPLACED_OPTIONS = {
    "lr": "actor_lr and critic_lr",
    "train_batch_size": "batch_size",
    "train_batch_size_per_learner": "batch_size",
    "minibatch_size": "batch_size",
    "num_epochs": "update_ratio",
    "model": "hidden",
    "optimizer": "actor_lr, critic_lr and adam_eps",
}
# Env steps of a fragment in asynchronous sampling: enough that sending one costs little beside it.
ASYNC_FRAGMENT_STEPS = 64
# The switches of the API stack, which is fixed: RLlib's update would warn about them.
UNUSED_STATE = ("enable_rl_module_and_learner", "enable_env_runner_and_connector_v2")


class OffPolicyConfig(AlgorithmConfig):  # type: ignore[misc]
    """Configuration of an algorithm that learns from a replay on this package's runtime.

    A subclass names its `hyperparameters_class`. `training(...)` takes every field of it, which
    documents them; everything else is RLlib's.

    One iteration is at least 1,000 env steps (`reporting(min_sample_timesteps_per_iteration=…)`);
    every 10th ends with an evaluation of 10 episodes.
    """

    hyperparameters_class: ClassVar[type[OffPolicyHyperparameters]]
    algorithm_name: ClassVar[str]  # of the algorithm, in messages

    def __init_subclass__(cls) -> None:
        """`help(….training)` and completion show the options with their defaults."""
        super().__init_subclass__()
        training = _with_options(cls.training, cls.hyperparameters_class)
        cls.training = training  # type: ignore[method-assign]

    def __init__(self, algo_class: type | None = None) -> None:
        from qvpo_rllib.rollout.worker import ColumnarRolloutWorker

        super().__init__(algo_class=algo_class)
        self._set_options(defaults_of(self.hyperparameters_class))
        # `TorchPolicy` lives on RLlib's old API stack. Set directly: `api_stack()` would warn about
        # an exploration config, which is not how these policies explore.
        self.enable_rl_module_and_learner = False
        self.enable_env_runner_and_connector_v2 = False
        self.framework("torch")
        self.env_runners(
            env_runner_cls=ColumnarRolloutWorker,
            num_env_runners=0,
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
        self.reporting(
            min_sample_timesteps_per_iteration=1000,
            min_time_s_per_iteration=0,
            # Episodes come with the fragments; RLlib's own question to remote workers would wait
            # behind those in flight.
            metrics_episode_collection_timeout_s=0.0,
        )
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
            if name in REPLACED_OPTIONS:
                self._refuse_unused(name)
            check_name(name, self.hyperparameters_class)
        self._set_options(options)
        if replay_in_checkpoints is not NotProvided:
            self.replay_in_checkpoints = replay_in_checkpoints
        return self

    def update_from_dict(self, config_dict: dict[str, Any]) -> Self:
        """RLlib's, but a name that nothing reads is refused instead of silently kept."""
        full_state = "class" in config_dict  # as in a checkpoint, with internal names
        kept = {}
        for name, value in config_dict.items():
            if name in REPLACED_OPTIONS or name in UNUSED_STATE:
                # Tune hands over whole configs: a value that is there anyway says nothing.
                if not full_state and value != getattr(self, name, value):
                    self._refuse_unused(name)
                continue
            if not full_state:
                _check_setting(name, self)
            kept[name] = value
        super().update_from_dict(kept)
        return self

    def hyperparameters(self) -> Any:
        """The checked hyperparameters with what is left to the task resolved."""
        return resolved_hyperparameters(self, self.hyperparameters_class)

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
        name = self.algorithm_name
        self._check_what_needs_a_gpu(self.hyperparameters())
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
        self._refuse_unread_settings()
        if isinstance(self.env, str):
            check_environment_id(self.env)

    def _check_what_needs_a_gpu(self, hp: Any) -> None:
        for name, value, instead in (
            ("engine", "cuda_graph", "'auto', 'compiled', 'native' or 'eager'"),
            ("sampling_precision", "tf32", "'fp32', or 'bf16', which CPUs know too"),
        ):
            if getattr(hp, name, None) == value and not self.num_gpus:
                raise ValueError(
                    f"{name}={value!r} needs an NVIDIA GPU, but num_gpus={self.num_gpus}. Use "
                    f"{instead}, or give the learner a GPU (num_gpus=1)."
                )

    def _refuse_unread_settings(self) -> None:
        """Settings of RLlib's that mean something for other algorithms and nothing here."""
        name = self.algorithm_name
        unread = {
            "remote_worker_envs": (False, "raise num_envs_per_env_runner or num_env_runners"),
            "observation_filter": ("NoFilter", "normalise observations in an environment wrapper"),
            "batch_mode": ("truncate_episodes", "a fragment is rollout_fragment_length env steps"),
            "normalize_actions": (True, "the policy's actions are in [-1, 1]"),
            "num_learners": (0, "the learner runs in the algorithm's own process"),
        }
        if self.in_evaluation:
            del unread["batch_mode"]  # RLlib sets it in the evaluation's copy
        for setting, (only, reason) in unread.items():
            if getattr(self, setting) != only:
                raise ValueError(
                    f"{setting}={getattr(self, setting)!r} is not supported: {name} allows "
                    f"{only!r} alone; {reason}."
                )
        if self.is_multi_agent:
            raise ValueError(
                f"Several policies (multi_agent) are not supported: {name} trains one."
            )

    def _set_options(self, options: dict[str, Any]) -> None:
        for name, value in options.items():
            setattr(self, name, value)

    def _refuse_unused(self, name: str) -> None:
        if name in UNUSED_STATE:
            raise ValueError(
                f"{name} cannot be changed: {self.algorithm_name} runs on RLlib's old API stack."
            )
        raise ValueError(
            f"{self.algorithm_name} does not read {name!r}: use {REPLACED_OPTIONS[name]} instead."
        )


def _with_options(training: Any, kind: type[OffPolicyHyperparameters]) -> Any:
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


def _check_setting(name: str, config: AlgorithmConfig) -> None:
    known = set(vars(config)) | {n for n in dir(type(config)) if not n.startswith("_")}
    translated = config._translate_special_keys(name, warn_deprecated=False)
    if name.startswith("__") or translated in known or name in known:
        return
    close = difflib.get_close_matches(name, sorted(known), n=1)
    raise ValueError(
        f"There is no setting {name!r}." + (f" Did you mean {close[0]!r}?" if close else "")
    )
