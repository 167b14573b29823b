"""`QVPOConfig`: RLlib's `AlgorithmConfig` with every hyperparameter of QVPO."""

import difflib
import inspect
from typing import Any, Self

import gymnasium as gym
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.tune.registry import ENV_CREATOR, _global_registry

from qvpo_rllib.core.hyperparameters import Hyperparameters, check_name, option_names
from qvpo_rllib.core.presets import resolve_for_task

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
# Parts of a config's state that QVPO does not read and that RLlib's update would choke on or warn
# about: its default model and optimiser, and the switch of the API stack, which is fixed.
UNUSED_STATE = (
    "model",
    "optimizer",
    "enable_rl_module_and_learner",
    "enable_env_runner_and_connector_v2",
)


class QVPOConfig(AlgorithmConfig):  # type: ignore[misc]
    """Configuration of `QVPO`.

    `training(...)` takes every field of `qvpo_rllib.core.hyperparameters.Hyperparameters`, which
    documents them; everything else is RLlib's. Example:

        config = QVPOConfig().environment("Ant-v5").training(k_behavior=4)
        algo = config.build_algo()
        result = algo.train()

    One iteration is at least 1,000 env steps (`reporting(min_sample_timesteps_per_iteration=…)`);
    every 10th ends with an evaluation of 10 episodes with the best of `k_eval` actions.
    """

    def __init__(self, algo_class: type | None = None) -> None:
        from qvpo_rllib.algorithm import QVPO
        from qvpo_rllib.worker import QVPORolloutWorker

        super().__init__(algo_class=algo_class or QVPO)
        self._set_options(Hyperparameters().to_dict())
        # `TorchPolicy` lives on RLlib's old API stack. Set directly: `api_stack()` would warn about
        # an exploration config, which a diffusion policy has none of.
        self.enable_rl_module_and_learner = False
        self.enable_env_runner_and_connector_v2 = False
        self.framework("torch")
        self.env_runners(
            env_runner_cls=QVPORolloutWorker,
            num_env_runners=0,
            num_envs_per_env_runner=1,
            rollout_fragment_length=1,
        )
        self.reporting(min_sample_timesteps_per_iteration=1000, min_time_s_per_iteration=0)
        self.evaluation(
            evaluation_interval=10,
            evaluation_duration=10,
            evaluation_duration_unit="episodes",
            evaluation_config={"explore": False, "num_envs_per_env_runner": 10},
        )
        # Whether checkpoints hold the replay; without it they are small but training that goes on
        # from one has to fill the replay anew.
        self.replay_in_checkpoints = True

    def training(self, *, replay_in_checkpoints: bool = NotProvided, **options: Any) -> Self:
        """Sets hyperparameters by name. Raises `ValueError` for an unknown or replaced name."""
        for name in options:
            if name in REPLACED_OPTIONS:
                raise ValueError(
                    f"QVPO does not read {name!r}: use {REPLACED_OPTIONS[name]} instead."
                )
            check_name(name)
        self._set_options(options)
        if replay_in_checkpoints is not NotProvided:
            self.replay_in_checkpoints = replay_in_checkpoints
        return self

    def update_from_dict(self, config_dict: dict[str, Any]) -> Self:
        """RLlib's, but a name that nothing reads is refused instead of silently kept."""
        if "class" in config_dict:  # the full state of a config, from a checkpoint
            config_dict = {k: v for k, v in config_dict.items() if k not in UNUSED_STATE}
        else:
            for name in config_dict:
                _check_setting(name, self)
        super().update_from_dict(config_dict)
        return self

    def hyperparameters(self) -> Hyperparameters:
        """The checked hyperparameters with what is left to the task resolved (K_t)."""
        return resolved_hyperparameters(self)

    def validate(self) -> None:
        super().validate()
        self.hyperparameters()
        if not isinstance(self.num_gpus, int | float) or self.num_gpus > 1 or self.num_gpus < 0:
            raise ValueError(
                f"num_gpus={self.num_gpus!r} is not allowed: QVPO's learner uses one GPU at most "
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
                f"{self.evaluation_duration_unit} is not supported: QVPO evaluates whole episodes "
                "with a quota for each environment, so that short ones are not favoured. Give a "
                "number of episodes."
            )
        if self.remote_worker_envs:
            raise ValueError(
                "remote_worker_envs=True is not supported: raise num_envs_per_env_runner or "
                "num_env_runners instead, which is faster."
            )
        if isinstance(self.env, str):
            check_environment_id(self.env)

    def _set_options(self, options: dict[str, Any]) -> None:
        for name, value in options.items():
            setattr(self, name, value)


# `help(QVPOConfig.training)` and completion show the options with their defaults.
QVPOConfig.training.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value)
            for name, value in Hyperparameters().to_dict().items()
        ),
        inspect.Parameter("replay_in_checkpoints", inspect.Parameter.KEYWORD_ONLY, default=True),
    ]
)


def resolved_hyperparameters(config: Any) -> Hyperparameters:
    """The hyperparameters in an `AlgorithmConfig` or a policy's config dict, K_t resolved."""
    values = {name: config[name] for name in option_names()}
    hp = Hyperparameters(**values)
    return Hyperparameters(**values | resolve_for_task(hp, str(config["env"])))


def check_environment_id(env_id: str) -> None:
    """Raises `ValueError` with the nearest names if neither Gymnasium nor Ray knows `env_id`."""
    if _global_registry.contains(ENV_CREATOR, env_id) or env_id in gym.registry:
        return
    if ":" in env_id or "." in env_id:  # "module:Env-v0", or a class path that RLlib imports
        return
    close = difflib.get_close_matches(env_id, list(gym.registry), n=3, cutoff=0.5)
    suggestion = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"There is no environment {env_id!r}.{suggestion} Allowed are Gymnasium's ids (such as "
        "'Ant-v5'), 'module:Id-v0', and names registered with ray.tune.register_env."
    )


def _check_setting(name: str, config: AlgorithmConfig) -> None:
    known = set(vars(config)) | {n for n in dir(type(config)) if not n.startswith("_")}
    translated = config._translate_special_keys(name, warn_deprecated=False)
    if name.startswith("__") or translated in known or name in known:
        return
    close = difflib.get_close_matches(name, sorted(known), n=1)
    raise ValueError(
        f"There is no setting {name!r}." + (f" Did you mean {close[0]!r}?" if close else "")
    )
