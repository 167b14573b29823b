"""What PPO, SPO and SAC, which are RLlib's own, get here: options, streams, stops, checkpoints."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.evaluation.metrics import RolloutMetrics, summarize_episodes
from ray.rllib.evaluation.rollout_worker import RolloutWorker
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED
from ray.rllib.utils.metrics.learner_info import LEARNER_STATS_KEY

from qvpo_rllib.checkpoints import metadata as checkpoint
from qvpo_rllib.checkpoints.staging import committed, staged
from qvpo_rllib.core.errors import NonFiniteError
from qvpo_rllib.core.options import Options, check_name
from qvpo_rllib.core.seeding import Stream, episode_seeds, spawn_seed
from qvpo_rllib.rollout.environments import action_scale, check_environment_id, check_spaces
from qvpo_rllib.rollout.episodes import run_episodes
from qvpo_rllib.runtime.base import Interruptible
from qvpo_rllib.version import __version__

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


UPDATES = "num_updates"


class ChoosingPolicy:
    """To be put before RLlib's own policy class: it acts as this package's policies do."""

    def choose(
        self: Any, obs: NDArray[Any], *, explore: bool, generator: Any = None
    ) -> NDArray[np.float32]:
        """Actions [B, A] in [-1, 1] for observations [B, O].

        Args:
            explore: draw them; else they are the distribution's mode, and nothing is drawn.
            generator: unused: RLlib draws from PyTorch's own stream.
        """
        actions = self.compute_actions(np.asarray(obs, np.float32), explore=explore)[0]
        return np.asarray(np.clip(actions, -1.0, 1.0), np.float32)


class RllibAlgorithm(Interruptible, Algorithm):  # type: ignore[misc]
    """To be put before RLlib's own algorithm; a subclass names its configuration and policy."""

    config_class: ClassVar[type]
    policy_class: ClassVar[type]
    config: Any

    @classmethod
    def get_default_config(cls) -> Any:
        return cls.config_class()

    @classmethod
    def get_default_policy_class(cls, config: Any) -> type:
        return cls.policy_class

    @staticmethod
    def validate_env(env: Any, env_context: Any) -> None:
        """Refuses spaces that RLlib would take, such as discrete actions; see `check_spaces`."""
        check_spaces(env.observation_space, env.action_space)

    def setup(self, config: Any) -> None:
        if self.config.num_gpus and not torch.cuda.is_available():
            raise ValueError(
                f"num_gpus={self.config.num_gpus} was asked for, but PyTorch "
                f"{torch.__version__} finds no CUDA device here. Use num_gpus=0."
            )
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            torch.set_num_threads(max(1, int(self.config.num_cpus_for_main_process)))
        self._updates_before = 0  # those of the policy that a checkpoint was made of
        super().setup(config)

    @property
    def env_steps(self) -> int:
        return int(self._counters[NUM_ENV_STEPS_SAMPLED])

    @property
    def updates(self) -> int:
        """Gradient steps so far."""
        return self._updates_before + int(self.get_policy().num_grad_updates)

    def training_step(self) -> dict[str, Any]:
        self.raise_if_stop_requested()
        try:
            results: dict[str, Any] = super().training_step()
        except ValueError as error:  # a distribution's, whose parameters have become NaN
            if all(p.isfinite().all() for p in self.get_policy().model.parameters()):
                raise
            raise self._non_finite("loss", math.nan) from error
        for result in results.values():
            stats = result[LEARNER_STATS_KEY]
            # Some are arrays of one number, and a few are arrays of many, which no table has.
            result[LEARNER_STATS_KEY] = {n: v.item() for n, v in _single_numbers(stats)}
            self._check_losses(result[LEARNER_STATS_KEY])
        return results

    def _compile_iteration_results_old_api_stack(self, **parts: Any) -> dict[str, Any]:
        results: dict[str, Any] = super()._compile_iteration_results_old_api_stack(**parts)
        results["ledger"] = {"ingested": self.env_steps, "done": self.updates}
        return results

    def _check_losses(self, stats: dict[str, float]) -> None:
        for name, value in stats.items():
            # Other numbers may be infinite on purpose, such as an unused bound.
            if "loss" in name and not math.isfinite(value):
                raise self._non_finite(name, value)

    def _non_finite(self, quantity: str, value: float) -> NonFiniteError:
        return NonFiniteError(
            f"{self.config.env}: {quantity} became {value} at env step {self.env_steps} "
            f"(update {self.updates}). Training stops here; the last checkpoint is untouched. "
            "Lower the learning rates, or set grad_clip."
        )

    def _evaluate_on_local_env_runner(self, env_runner: Any) -> tuple[Any, int, int, list[Any]]:
        """Whole episodes, a quota for each environment, by seeds of their own: as QVPO's."""
        if env_runner is self.env_runner:
            raise ValueError(
                "evaluate() needs environments of its own, lest it disturb those in training: set "
                "config.evaluation(evaluation_interval=…)."
            )
        envs, policy = env_runner.async_env.get_sub_environments(), env_runner.get_policy()

        def act(obs: NDArray[np.float32]) -> tuple[NDArray[np.float32], None]:
            self.raise_if_stop_requested()
            return policy.choose(obs, explore=False), None

        played = run_episodes(
            envs,
            act,
            action_scale(envs[0].action_space),
            episode_seeds(self.config.seed, self.env_steps, self.config.evaluation_duration),
            str(self.config.env),
        )
        episodes = [RolloutMetrics(e.length, e.episode_return) for e in played]
        steps = sum(e.length for e in played)
        summary = summarize_episodes(
            episodes, episodes, self.evaluation_config.keep_per_episode_custom_metrics
        )
        return summary, steps, steps, []

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        with staged(Path(checkpoint_dir)) as directory:
            super().save_checkpoint(str(directory))
            checkpoint.write_metadata(directory, self.metadata())

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        directory = committed(Path(checkpoint_dir))
        found = checkpoint.read_metadata(directory)
        # As JSON has it: lists, not tuples.
        checkpoint.check_compatible(found, json.loads(json.dumps(self.metadata())), directory)
        checkpoint.check_files(directory, found)
        super().load_checkpoint(str(directory))

    def metadata(self) -> dict[str, Any]:
        """What `qvpo.json` says of this run now."""
        space = self.get_policy().action_space_struct
        return {
            "algorithm": self.config.algorithm_name,
            "package_version": __version__,
            "ray_version": ray.__version__,
            "torch_version": torch.__version__,
            "env": str(self.config.env),
            "env_config": dict(self.config.env_config),
            "shapes": [int(np.prod(self.get_policy().observation_space.shape)), space.shape[0]],
            "action_box": [space.low.tolist(), space.high.tolist()],
            "seed": self.config.seed,
            "hyperparameters": self.config.hyperparameters().to_dict(),
            "fixed_by_checkpoint": list(self.config.hyperparameters_class.fixed_by_checkpoint),
            "ledger": {"ingested": self.env_steps, "done": self.updates},
            "replay": {"segments": None},
        }

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state[UPDATES] = self.updates
        state["episodes"] = self._episode_history
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A restored policy counts from 0.
        self._updates_before = int(state[UPDATES]) - int(self.get_policy().num_grad_updates)
        self._episode_history = state["episodes"]
        restart = functools.partial(_restart_streams, env_steps=self.env_steps)
        self.env_runner_group.foreach_env_runner(restart)


def _single_numbers(stats: dict[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    arrays = ((name, np.asarray(value)) for name, value in stats.items())
    return ((name, array) for name, array in arrays if array.size == 1)


def _restart_streams(worker: Any, env_steps: int) -> None:
    worker.restart_streams(env_steps)


class SeededRolloutWorker(RolloutWorker):  # type: ignore[misc]
    """RLlib adds small integers to a run's seed, so that neighbouring seeds share environments.

    Here every environment has a stream of its own, and so have the actions of remote workers.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.restart_streams(0)

    def restart_streams(self, env_steps: int) -> None:
        """New streams for this worker; those of a run that goes on depend on its `env_steps`."""
        seed = self.config.seed
        if self.env is None or self.config.in_evaluation or seed is None:
            return  # evaluation seeds every episode
        index = self.worker_index
        for i, env in enumerate(self.async_env.get_sub_environments()):
            stream = spawn_seed(seed, Stream.ENVIRONMENT, env_steps, index, i)
            # Not by `reset`, which would cut short an episode under way.
            env.unwrapped.np_random = np.random.default_rng(stream)
        actions = spawn_seed(seed, Stream.ACTION, env_steps, index, 0)
        if index > 0 or env_steps > 0:  # the learner's process was seeded by the algorithm
            torch.manual_seed(actions)
            np.random.seed(actions % 2**32)  # noqa: NPY002  RLlib draws from it
