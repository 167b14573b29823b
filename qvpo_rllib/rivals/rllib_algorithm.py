"""What RLlib's own algorithms get here: evaluation, streams, stops and checkpoints as QVPO has."""

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.evaluation.metrics import RolloutMetrics, summarize_episodes
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED
from ray.rllib.utils.metrics.learner_info import LEARNER_STATS_KEY

from qvpo_rllib import __version__, checkpoint
from qvpo_rllib.core.errors import NonFiniteError
from qvpo_rllib.core.seeding import episode_seeds
from qvpo_rllib.interruptible import Interruptible
from qvpo_rllib.rollout import run_episodes
from qvpo_rllib.spaces import action_scale
from qvpo_rllib.staging import staged, whole

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
        directory = whole(Path(checkpoint_dir))
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
