"""What the configurations of RLlib's own algorithms share here."""

import dataclasses
from typing import Any, ClassVar, Self

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from qvpo_rllib.core.options import Options, check_name
from qvpo_rllib.environment_id import check_environment_id
from qvpo_rllib.rivals.seeded_worker import SeededRolloutWorker

# RLlib's settings that `apply` makes of the hyperparameters.
DERIVED = ("model", "optimizer", "replay_buffer_config")


class RllibConfig(AlgorithmConfig):  # type: ignore[misc]
    """To be put before RLlib's own configuration class.

    `training(...)` takes the fields of `hyperparameters_class`, and no setting of RLlib's beside
    them; `apply` turns them into RLlib's settings when the configuration is validated.
    """

    hyperparameters_class: ClassVar[type[Options]]
    algorithm_name: ClassVar[str]  # in messages and checkpoints

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)
        for option in dataclasses.fields(self.hyperparameters_class):
            setattr(self, option.name, option.default)
        # Whether checkpoints hold the replay of an algorithm that has one.
        self.replay_in_checkpoints = True
        # As for QVPO: the old API stack, with whose workers the rest of this package lives.
        self.enable_rl_module_and_learner = False
        self.enable_env_runner_and_connector_v2 = False
        self.exploration_config = {"type": "StochasticSampling"}
        self.framework("torch")
        # New minibatches in every epoch; RLlib's loader for several GPUs cuts a batch up once.
        self.simple_optimizer = True
        self.env_runners(env_runner_cls=SeededRolloutWorker, num_env_runners=0)
        self.reporting(min_sample_timesteps_per_iteration=1000, min_time_s_per_iteration=0)
        self.evaluation(
            evaluation_interval=10,
            evaluation_duration=10,
            evaluation_duration_unit="episodes",
            evaluation_config={"explore": False, "num_envs_per_env_runner": 10},
        )

    def training(self, **options: Any) -> Self:
        """Sets options by name. Raises `ValueError` for an unknown one."""
        for name, value in options.items():
            check_name(name, self.hyperparameters_class)
            setattr(self, name, value)
        return self

    def update_from_dict(self, config_dict: dict[str, Any]) -> Self:
        """RLlib's, which would hand these three to `training()` when a checkpoint is restored."""
        derived = {name: config_dict[name] for name in DERIVED if name in config_dict}
        super().update_from_dict({n: v for n, v in config_dict.items() if n not in derived})
        for name, value in derived.items():
            setattr(self, name, value)
        return self

    def hyperparameters(self) -> Any:
        """The checked options: an instance of `hyperparameters_class`."""
        names = [option.name for option in dataclasses.fields(self.hyperparameters_class)]
        return self.hyperparameters_class(**{name: getattr(self, name) for name in names})

    def apply(self, hp: Any) -> None:
        """Sets RLlib's own settings by the hyperparameters."""
        raise NotImplementedError

    def validate(self) -> None:
        hp = self.hyperparameters()
        if not self._is_frozen:
            self.apply(hp)
        super().validate()
        if isinstance(self.env, str):
            check_environment_id(self.env)
        if self.evaluation_num_env_runners:
            raise ValueError(
                f"evaluation_num_env_runners={self.evaluation_num_env_runners} is not supported: "
                "this algorithm's episodes of evaluation are played in the learner's process (0)."
            )
        if self.is_multi_agent:
            raise ValueError("Several policies (multi_agent) are not supported: one is trained.")
