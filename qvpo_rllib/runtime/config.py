"""RLlib's `AlgorithmConfig` with an algorithm's own options: for all, and for off-policy ones."""

import copy
import functools
import inspect
import math
from typing import Any, ClassVar, Self

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.utils import force_list

from qvpo_rllib.core.env_config import encode_env_config
from qvpo_rllib.core.options import Options, check_name, defaults_of
from qvpo_rllib.core.options.qvpo import resolved_hyperparameters
from qvpo_rllib.rollout.callbacks import combined, overrides
from qvpo_rllib.rollout.worker import ColumnarRolloutWorker
from qvpo_rllib.runtime.ray_private import check_setting, environment_maker, is_frozen
from qvpo_rllib.runtime.settings import (
    check_evaluation_config,
    check_settings,
    refusal,
    replacing,
)

# Env steps of a fragment in asynchronous sampling: enough that sending one costs little beside it.
ASYNC_FRAGMENT_STEPS = 64
# By configuration class: the algorithm that names it. Not an attribute of the configuration: Ray
# disassembles an actor's class with all classes in it, and would go round in a circle.
ALGORITHM_OF: dict[type, type] = {}
LEAST_TIMEOUT_S = 1
API_STACK = ("enable_rl_module_and_learner", "enable_env_runner_and_connector_v2")


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
    honoured_too: ClassVar[frozenset[str]] = frozenset()  # beyond `settings.HONOURED`
    takes_vectors: ClassVar[bool] = True  # whether its workers step vector environments

    def __init_subclass__(cls) -> None:
        """`help(….training)` and completion show the options with their defaults."""
        super().__init_subclass__()
        if hasattr(cls, "hyperparameters_class"):
            training = _with_options(cls.training, cls.hyperparameters_class)
            cls.training = training  # type: ignore[method-assign]

    def __init__(self, algo_class: type | None = None) -> None:
        known = (ALGORITHM_OF[kind] for kind in type(self).__mro__ if kind in ALGORITHM_OF)
        super().__init__(algo_class or next(known, None))
        # RLlib's settings that `validate` has made of the options.
        self.derived_values: dict[str, Any] = {}
        self._set_options(defaults_of(self.hyperparameters_class))
        # `TorchPolicy` lives on RLlib's old API stack. Set directly: `api_stack()` would warn about
        # an exploration config, which is not how these policies explore.
        self.enable_rl_module_and_learner = False
        self.enable_env_runner_and_connector_v2 = False
        self.framework("torch")
        # Not left open, or RLlib finds out by making the environment without its `env_config`.
        self.environment(is_atari=False)
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
        for name, value in options.items():
            if replacing(self, name):
                raise refusal(self, name, value)
            check_name(name, self.hyperparameters_class)
        self._set_options(options)
        if replay_in_checkpoints is not NotProvided:
            self.replay_in_checkpoints = replay_in_checkpoints
        return self

    def update_from_dict(self, config_dict: dict[str, Any]) -> Self:
        """RLlib's, but a name that nothing reads is refused instead of silently kept."""
        # Whole configurations come from Tune, and, with internal names, from checkpoints.
        derived = config_dict.get("derived_values")
        whole = derived is not None or "class" in config_dict
        kept = {}
        for name, value in config_dict.items():
            if whole and (name in API_STACK or name in (derived or ()) or replacing(self, name)):
                if derived is not None:
                    setattr(self, name, value)
                continue
            if replacing(self, name) or (name in API_STACK and value):
                raise refusal(self, name, value)
            if "class" not in config_dict:
                check_setting(name, self)
            if name not in API_STACK:
                kept[name] = value
        super().update_from_dict(kept)
        return self

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Any:
        # What an earlier version has saved was in force.
        return super().from_state({"derived_values": state, **state})

    def hyperparameters(self) -> Any:
        """The checked hyperparameters with what is left to the task resolved."""
        return resolved_hyperparameters(self, self.hyperparameters_class)

    def build_algo(self, env: Any = None, use_copy: bool = True) -> Any:
        """RLlib's, but `env` is training's alone: RLlib would make it evaluation's, for good."""
        if env is not None:
            self.environment(env)
        return super().build_algo(use_copy=use_copy)

    def derive(self) -> dict[str, Any]:
        """Returns RLlib's settings that follow from the options."""
        return {}

    def validate(self) -> None:
        if not self.in_evaluation:  # training's settings, with what `evaluation_config` may change
            check_settings(self)
            check_evaluation_config(self)
            if not is_frozen(self):
                self.derived_values = self.derive()
                self._set_options(copy.deepcopy(self.derived_values))
        super().validate()
        name = self.algorithm_name
        if self.env is None:
            raise ValueError(
                "No environment is given. Name one, such as `config.environment('Ant-v5')`."
            )
        if not isinstance(self.num_gpus, int | float) or not 0 <= self.num_gpus <= 1:
            raise ValueError(
                f"num_gpus={self.num_gpus!r} is not allowed: {name}'s learner uses one GPU at most "
                "(0, a fraction, or 1). To use more GPUs, run several trials side by side with "
                "Ray Tune, each on its own GPU or a fraction of one."
            )
        for setting, least in (
            ("num_env_runners", 0),
            ("evaluation_num_env_runners", 0),
            ("num_envs_per_env_runner", 1),
        ):
            if (value := getattr(self, setting)) < least:
                raise ValueError(f"{setting}={value} is not allowed: it must be {least} or more.")
        if self.evaluation_interval and not isinstance(self.evaluation_duration, int):
            raise ValueError(
                f"evaluation_duration={self.evaluation_duration!r} is not allowed: it must be a "
                "number of episodes."
            )
        if self.sample_timeout_s is not None and self.sample_timeout_s < LEAST_TIMEOUT_S:
            raise ValueError(
                f"sample_timeout_s={self.sample_timeout_s} is not allowed: a fragment takes longer "
                f"than that. It must be {LEAST_TIMEOUT_S} or more."
            )
        if self.is_multi_agent:
            raise ValueError(
                f"Several policies (multi_agent) are not supported: {name} trains one."
            )
        self._refuse_unread_callbacks()
        environment_maker(self.env, wrappers=self.wrappers)
        encode_env_config(self.env_config)

    def callbacks(self, callbacks_class: Any = NotProvided, **functions: Any) -> Self:
        """RLlib's, but lists of classes, and functions, work on the old API stack too."""
        super().callbacks(callbacks_class, **dict.fromkeys(functions))  # refuses unknown names
        kinds = self.callbacks_class  # type: ignore[has-type]
        if functions or isinstance(kinds, list | tuple):
            given = {name: force_list(function) for name, function in functions.items()}
            self.callbacks_class = combined(force_list(kinds), given)
        return self

    # Callbacks of RLlib's that nothing calls here, and what to use instead.
    unread_callbacks: ClassVar[dict[str, str]] = {
        "on_environment_created": "use on_sub_environment_created",
        "on_evaluate_offline_start": "use on_evaluate_start",
        "on_evaluate_offline_end": "use on_evaluate_end",
        "on_offline_eval_runners_recreated": "use on_env_runners_recreated",
    }

    def _refuse_unread_callbacks(self) -> None:
        kind = self.callbacks_class
        kind = kind if isinstance(kind, type) else type(kind())
        for name, instead in self.unread_callbacks.items():
            if overrides(kind, name):
                raise ValueError(
                    f"The callback {name} is not supported: {self.algorithm_name} never calls it; "
                    f"{instead}."
                )

    def get_evaluation_config_object(self) -> Any:
        """RLlib's, with no more environments than episodes to play.

        Another environment has arguments of its own: RLlib would add training's to them.
        """
        config = super().get_evaluation_config_object()
        own = self.evaluation_config or {}
        if config is not None and own.get("env", self.env) != self.env:
            config.env_config = dict(own.get("env_config", {}))
        if config is not None and isinstance(self.evaluation_duration, int):
            workers = max(1, self.evaluation_num_env_runners)
            most = max(1, math.ceil(self.evaluation_duration / workers))
            config.num_envs_per_env_runner = min(config.num_envs_per_env_runner, most)
        return config

    def _set_options(self, options: dict[str, Any]) -> None:
        for name, value in options.items():
            setattr(self, name, value)


class OffPolicyConfig(BaseConfig):
    """Configuration of an algorithm that learns from a replay on this package's runtime."""

    unread_callbacks = BaseConfig.unread_callbacks | {
        "on_postprocess_trajectory": "a fragment is complete at on_sample_end, whose `samples` may "
        "be changed in place",
        "on_learn_on_batch": "batches stay on the learner's device; on_train_result has the "
        "learner's metrics",
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
