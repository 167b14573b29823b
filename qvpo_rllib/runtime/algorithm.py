"""`OffPolicyAlgorithm`: rollouts, replay and updates of QVPO and its off-policy rivals."""

import gc
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from ray.rllib.evaluation.metrics import RolloutMetrics
from ray.rllib.policy.sample_batch import SampleBatch

from qvpo_rllib.checkpoints.metadata import REPLAY_DIRECTORY, Metadata, drop_replay
from qvpo_rllib.checkpoints.replay_files import ReplayFiles
from qvpo_rllib.checkpoints.run_state import RunParts, RunState
from qvpo_rllib.core.engine import describe
from qvpo_rllib.core.replay import ReplayBuffer, UpdateLedger, replay_bytes
from qvpo_rllib.core.seeding import Stream, spawn_seed
from qvpo_rllib.rollout.collectors import Collector, make_collector
from qvpo_rllib.rollout.policy import AnyPolicy, episode_steps, to_transitions
from qvpo_rllib.runtime.base import BaseAlgorithm
from qvpo_rllib.runtime.config import OffPolicyConfig
from qvpo_rllib.runtime.ray_private import available_bytes, worker_manager

logger = logging.getLogger(__name__)


class OffPolicyAlgorithm(BaseAlgorithm):
    """An algorithm that learns from a replay, with an exact ratio of updates to env steps.

    A result of `train()` has RLlib's usual keys; the learner's metrics are under
    `info/learner/default_policy/learner_stats`, the update ledger under `ledger`. A subclass names
    its configuration and its policy; what it learns is in its policy's learner.

    Attributes:
        improves_actions: whether its learner writes better actions into the replay.
    """

    config_class: ClassVar[type[OffPolicyConfig]]
    policy_class: ClassVar[type[AnyPolicy]]
    improves_actions: ClassVar[bool] = False
    prune = staticmethod(drop_replay)

    def finish_setup(self) -> None:
        self.hp = self.config.hyperparameters()
        self.policy: AnyPolicy = self.get_policy()
        assert self.policy.learner is not None  # that of the local training worker
        self.learner = self.policy.learner
        self.ledger = UpdateLedger(self.hp.update_ratio, self.hp.warmup_steps)
        logger.info("engine: %s", describe(self.learner.engine))
        self._check_memory()
        self.replay = ReplayBuffer(
            self.hp.replay_capacity,
            self.policy.obs_dim,
            self.policy.act_dim,
            seed=spawn_seed(self.config.seed, Stream.REPLAY),
            device=self.policy.device,
            improves_actions=self.improves_actions,
            follows_episodes=self.hp.n_step > 1,
        )
        self.replay_missing = False
        # Reads the metrics of the updates whose losses nobody has looked at yet.
        self._unread: Callable[[], dict[str, float]] | None = None
        self._parts = RunParts(self.ledger, self.replay, ReplayFiles(), self.env_runner_group)
        self.collector: Collector = make_collector(
            worker_manager(self.env_runner_group),
            self.env_runner_group.local_env_runner,
            self.config,
            self.ledger,
            self.policy.get_weights,
            interrupted=lambda: self.stop_requested,
        )

    @property
    def updates(self) -> int:
        return self.ledger.done

    def training_step(self) -> dict[str, Any]:
        """Takes in what the collector has next, and does all the updates owed for it."""
        self.raise_if_stop_requested()
        if self.replay_missing:
            self.replay_missing = False
            logger.warning(
                "Training goes on from a checkpoint without its replay: it is filled with %d env "
                "steps before the next update. `algo.restore` and `%s.from_checkpoint` load the "
                "replay where it was saved; RLlib's `Algorithm.from_checkpoint` cannot.",
                self.ledger.warmup_steps,
                type(self).__name__,
            )
        self._learn_from(self.collector.collect())
        # The metrics are read once per iteration, by `pop_learner_stats`.
        return {}

    def compute_single_action(self, *args: Any, seed: int | None = None, **kwargs: Any) -> Any:
        """RLlib's.

        Args:
            seed: of what is drawn. Without one the policy's stream goes on, so that a diffusion
                policy acts differently each time, with `explore` and without it.
        """
        if seed is None:
            return super().compute_single_action(*args, **kwargs)
        generator = self.policy.generator
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            return super().compute_single_action(*args, **kwargs)
        finally:
            generator.set_state(state)

    def drain(self) -> None:
        """Brings sampling to rest: takes in what is in flight and does the updates owed for it."""
        self._learn_from(self.collector.drain())
        self._check_losses()

    def _learn_from(self, batches: list[SampleBatch]) -> None:
        for batch in batches:
            transitions = to_transitions(batch, self.hp.truncation_as_terminal)
            self.replay.add(transitions, episode_steps(batch))
            self.learner.observe(transitions.obs)
            self.ledger.ingested += batch.count
            self.count_steps(sampled=batch.count)
        owed = self.ledger.owed
        if owed:
            self.learner.set_env_steps(self.ledger.ingested)
            self.learner.train(self.replay, owed)
            self.ledger.done += owed
            self.policy.num_grad_updates = self.ledger.done  # RLlib's counter
            self.count_steps(trained=owed * self.hp.batch_size)
            read = self.learner.read_metrics()
            if self.policy.device.type == "cuda":
                # Those of the step before have arrived, while the GPU is busy with this one's.
                self._check_losses()
            self._unread = read
            if self.policy.device.type == "cpu":
                self._check_losses()

    def restore_env_runners(self, env_runner_group: Any) -> list[int]:
        """RLlib's waits for lost workers before every training step; the collector does not.

        Returns the indices of those that came back, for `on_env_runners_recreated`.
        """
        if env_runner_group is self.env_runner_group:
            return self.collector.pop_recreated()
        restored: list[int] = super().restore_env_runners(env_runner_group)
        return restored

    def cleanup(self) -> None:
        if hasattr(self, "collector"):  # `setup` may have failed
            self.collector.close()
        super().cleanup()

    def _check_losses(self) -> None:
        """Raises `NonFiniteError` for a loss of the updates that are not checked yet."""
        if self._unread is None:
            return
        means, self._unread = self._unread(), None
        for name in ("critic_loss", "actor_loss"):
            if not math.isfinite(means[name]):
                advice = "Lower actor_lr or critic_lr, or set grad_clip."
                raise self.non_finite(name, means[name], advice)

    def pop_learner_stats(self) -> dict[str, float]:
        self._check_losses()
        stats: dict[str, float] = self.learner.pop_metrics()
        return stats | self.learner.settings_in_force() if stats else stats

    @property
    def waiting_episodes(self) -> list[RolloutMetrics]:
        return list(self.collector.episodes)

    @waiting_episodes.setter
    def waiting_episodes(self, episodes: list[RolloutMetrics]) -> None:
        self.collector.episodes = episodes

    def run_results(self) -> dict[str, Any]:
        results = super().run_results()
        results["ledger"] |= {"owed": self.ledger.owed, **self.collector.pop_staleness()}
        results["faults"] = self.collector.faults.to_dict()
        results["replay_size"] = len(self.replay)
        return results

    def write_run(self, directory: Path) -> Metadata:
        keep = self.config.replay_in_checkpoints
        return self._parts.write(directory, self.metadata(), with_replay=keep)

    def checkpoint_moved(self, directory: Path) -> None:
        self._parts.replay_files.moved(directory / REPLAY_DIRECTORY)

    def restore_run(self, found: RunState) -> None:
        found.restore_into(self._parts, self.metadata())
        self.replay_missing = found.segments is None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.collector.reset()
        self._unread = None
        super().__setstate__(state)
        # The counters alone say how far the run is; `restore_run` puts the rest in place.
        self.ledger.ingested = self.env_steps
        self.ledger.done = self.learner.num_updates
        # A replay that is not found is filled by one warm-up before the next update.
        self.ledger.rebase(refill=True)
        self.replay_missing = True

    def release(self) -> None:
        self.learner.close()
        del self.replay, self._parts
        gc.collect()  # what captured graphs and autograd hold in cycles

    def _check_memory(self) -> None:
        """States the replay's size before it is allocated, and refuses one that does not fit."""
        policy, capacity = self.policy, self.hp.replay_capacity
        size = replay_bytes(
            capacity,
            policy.obs_dim,
            policy.act_dim,
            improves_actions=self.improves_actions,
            follows_episodes=self.hp.n_step > 1,
        )
        logger.info(f"replay: {capacity:,} transitions, {size:,} bytes on {policy.device}")
        free = available_bytes(policy.device)
        if size > free:
            raise ValueError(
                f"replay_capacity={capacity} does not fit: it needs {size:,} bytes on "
                f"{policy.device}, where {free:,} are free. A replay_capacity of at most "
                f"{max(0, int(capacity * 0.9 * free / size)):,} fits."
            )
