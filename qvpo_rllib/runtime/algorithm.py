"""`OffPolicyAlgorithm`: what QVPO and its off-policy rivals are on RLlib.

Rollouts, replay, updates, evaluation, checkpoints.
"""

import functools
import json
import logging
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Self

import ray
import torch
from pyarrow.fs import LocalFileSystem
from ray import tune
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.policy.sample_batch import DEFAULT_POLICY_ID, SampleBatch
from ray.rllib.utils.metrics import (
    NUM_AGENT_STEPS_SAMPLED,
    NUM_AGENT_STEPS_TRAINED,
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_TRAINED,
)
from ray.rllib.utils.metrics.learner_info import LEARNER_STATS_KEY

from qvpo_rllib.checkpoints import metadata as checkpoint
from qvpo_rllib.checkpoints import run_state
from qvpo_rllib.checkpoints.replay_files import ReplayFiles
from qvpo_rllib.checkpoints.run_state import RunState
from qvpo_rllib.checkpoints.staging import committed, staged
from qvpo_rllib.checkpoints.tune_storage import is_local, save_in_place
from qvpo_rllib.core.engine import describe
from qvpo_rllib.core.errors import NonFiniteError
from qvpo_rllib.core.replay import ReplayBuffer, UpdateLedger, replay_bytes
from qvpo_rllib.core.seeding import Stream, episode_seeds, spawn_seed
from qvpo_rllib.rollout.collectors import Collector, make_collector
from qvpo_rllib.rollout.policy import AnyPolicy, to_transitions
from qvpo_rllib.runtime.base import Interruptible, available_bytes
from qvpo_rllib.runtime.config import OffPolicyConfig
from qvpo_rllib.runtime.evaluation import Share, Summary, evaluate_shares, summarize
from qvpo_rllib.version import __version__

logger = logging.getLogger(__name__)


class OffPolicyAlgorithm(Interruptible, Algorithm):  # type: ignore[misc]
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
    config: Any

    @classmethod
    def get_default_config(cls) -> OffPolicyConfig:
        return cls.config_class()

    @classmethod
    def get_default_policy_class(cls, config: Any) -> type[AnyPolicy]:
        return cls.policy_class

    @classmethod
    def from_checkpoint(cls, path: Any, *args: Any, **kwargs: Any) -> Self:
        """A new algorithm from a checkpoint, its replay included.

        RLlib's `Algorithm.from_checkpoint` works too, but cannot know of the replay.
        """
        found = RunState.read(committed(_directory_of(path)))
        algorithm: Self = super().from_checkpoint(str(found.directory), *args, **kwargs)
        found.restore_into(algorithm)
        return algorithm

    def restore(self, checkpoint_path: Any) -> None:
        """Goes on from a checkpoint: a directory, or what `save()` returned."""
        directory = _directory_of(checkpoint_path)
        # Before Tune's part of the restore sets iteration and times to the checkpoint's.
        RunState.read(committed(directory), own=self.metadata())
        local = tune.Checkpoint.from_directory(str(directory))
        metrics = getattr(checkpoint_path, "metrics", None)  # Tune's: iteration and times so far
        super().restore(local if metrics is None else type(checkpoint_path)(local, metrics))

    def setup(self, config: Any) -> None:
        if self.config.num_gpus and not torch.cuda.is_available():
            raise ValueError(
                f"num_gpus={self.config.num_gpus} was asked for, but PyTorch "
                f"{torch.__version__} finds no CUDA device here. Use num_gpus=0, or a machine and "
                "a PyTorch build with CUDA."
            )
        # Inside a Ray actor PyTorch gets one thread; give the learner the cores it was assigned.
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            torch.set_num_threads(max(1, int(self.config.num_cpus_for_main_process)))
        super().setup(config)
        self.hp = self.config.hyperparameters()
        self.policy: AnyPolicy = self.get_policy()
        assert self.policy.learner is not None  # that of the local training worker
        self.learner = self.policy.learner
        self.ledger = UpdateLedger(self.hp.update_ratio, self.hp.warmup_steps)
        print(f"engine: {describe(self.learner.engine)}", file=sys.stderr)
        self._announce_replay()
        self.replay = ReplayBuffer(
            self.hp.replay_capacity,
            self.policy.obs_dim,
            self.policy.act_dim,
            seed=spawn_seed(self.config.seed, Stream.REPLAY),
            device=self.policy.device,
            improves_actions=self.improves_actions,
        )
        self.replay_missing = False
        self.replay_files = ReplayFiles()
        self.told_of_new_episodes = False
        # Set once a running evaluation needs nothing of the learner any more.
        self._evaluation_is_underway = threading.Event()
        self.collector: Collector = make_collector(
            self.env_runner_group,
            self.config,
            self.ledger,
            self.policy.get_weights,
            interrupted=lambda: self.stop_requested,
        )

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
        # The metrics are read once per iteration, in `_compile_iteration_results_old_api_stack`.
        return {}

    def drain(self) -> None:
        """Brings sampling to rest: takes in what is in flight and does the updates owed for it."""
        self._learn_from(self.collector.drain())

    def _learn_from(self, batches: list[SampleBatch]) -> None:
        for batch in batches:
            self.replay.add(to_transitions(batch, self.hp.truncation_as_terminal))
            self.ledger.ingested += batch.count
            self._counters[NUM_ENV_STEPS_SAMPLED] += batch.count
            self._counters[NUM_AGENT_STEPS_SAMPLED] += batch.count
        owed = self.ledger.owed
        if owed:
            self.learner.set_env_steps(self.ledger.ingested)
            self.learner.train(self.replay, owed)
            self.ledger.done += owed
            self._counters[NUM_ENV_STEPS_TRAINED] += owed * self.hp.batch_size
            self._counters[NUM_AGENT_STEPS_TRAINED] += owed * self.hp.batch_size
            self._check_losses()

    def restore_env_runners(self, env_runner_group: Any) -> list[int]:
        """RLlib's waits for lost workers before every training step; the collector does not."""
        if env_runner_group is self.env_runner_group:
            return []
        restored: list[int] = super().restore_env_runners(env_runner_group)
        return restored

    def cleanup(self) -> None:
        if hasattr(self, "collector"):  # `setup` may have failed
            self.collector.close()
        super().cleanup()

    def _check_losses(self) -> None:
        """Weights go to the workers next, which waits for the device anyway."""
        for name in ("critic_loss", "actor_loss"):
            value = self.learner.metric_mean(name)
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{self.config.env}: {name} became {value} at env step "
                    f"{self.ledger.ingested} (update {self.ledger.done}). Training stops here; the "
                    "last checkpoint is untouched. Lower actor_lr or critic_lr, or set grad_clip."
                )

    def _compile_iteration_results_old_api_stack(
        self, *, episodes_this_iter: Any, step_ctx: Any, iteration_results: dict[str, Any]
    ) -> dict[str, Any]:
        stats = self.learner.pop_metrics()
        if stats:
            stats |= self.learner.settings_in_force()
        iteration_results[DEFAULT_POLICY_ID] = {LEARNER_STATS_KEY: stats}
        results: dict[str, Any] = super()._compile_iteration_results_old_api_stack(
            episodes_this_iter=episodes_this_iter + self.collector.pop_episodes(),
            step_ctx=step_ctx,
            iteration_results=iteration_results,
        )
        results["ledger"] = {
            "ingested": self.ledger.ingested,
            "done": self.ledger.done,
            "owed": self.ledger.owed,
            **self.collector.pop_staleness(),
        }
        results["faults"] = self.collector.faults.to_dict()
        results["replay_size"] = len(self.replay)
        return results

    def _evaluate_on_local_env_runner(self, env_runner: Any) -> Summary:
        if env_runner is self.env_runner:
            raise ValueError(
                "evaluate() needs environments of its own, lest it disturb those in training: set "
                "config.evaluation(evaluation_interval=…), or evaluation_num_env_runners=1."
            )
        seeds, action_seed = self._evaluation_seeds(), self._action_seed(0)
        return self._summarize(
            [env_runner.evaluate_episodes(seeds, action_seed, self.raise_if_stop_requested)]
        )

    def _evaluate_with_fixed_duration(self) -> Summary:
        group, seeds = self.eval_env_runner_group, self._evaluation_seeds()
        num_workers = len(group.healthy_worker_ids())
        # Worker w plays episodes w, w + W, …; each has its own stream of noise.
        shares = [Share(seeds[i::num_workers], self._action_seed(i)) for i in range(num_workers)]
        self._evaluation_is_underway.set()
        return self._summarize(
            evaluate_shares(group, shares, self.config.evaluation_sample_timeout_s)
        )

    def _summarize(self, results: list[Any]) -> Summary:
        keep = self.evaluation_config.keep_per_episode_custom_metrics
        return summarize(results, self.config, keep_custom_metrics=keep)

    def _run_one_training_iteration_and_evaluation_in_parallel(self) -> tuple[Any, Any, Any]:
        """Evaluates the policy that the iteration begins with, on the evaluation workers.

        RLlib's own trains in the second thread, which reads the weights and the env steps in the
        midst of an update, and leaves the learner without its number of threads.
        """
        self._evaluation_is_underway.clear()
        with ThreadPoolExecutor(1) as executor:
            evaluation = executor.submit(self._run_one_evaluation)
            evaluation.add_done_callback(lambda _: self._evaluation_is_underway.set())
            self._evaluation_is_underway.wait()
            trained, context = self._run_one_training_iteration_old_api_stack()
            return trained, evaluation.result(), context

    def _evaluation_seeds(self) -> list[int]:
        """Seeds that depend on the run's seed and the env steps alone, so that evaluating more or
        less often, or resuming, changes no result."""
        steps, episodes = self.ledger.ingested, self.config.evaluation_duration
        return episode_seeds(self.config.seed, steps, episodes)

    def _action_seed(self, worker: int) -> int:
        return spawn_seed(self.config.seed, Stream.EVALUATION, self.ledger.ingested, worker)

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Ray's; a trial of Ray Tune writes only what is new since its last checkpoint."""
        if checkpoint_dir is None and is_local(self._storage):
            return save_in_place(self)
        return super().save(checkpoint_dir)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        self.drain()
        target = Path(checkpoint_dir)
        with staged(target) as directory:
            super().save_checkpoint(str(directory))
            segments = run_state.write(self, directory)
        if segments is not None:
            self.replay_files.link_from(target / checkpoint.REPLAY_DIRECTORY, segments)

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        found = RunState.read(committed(Path(checkpoint_dir)), own=self.metadata())
        # RLlib calls `on_checkpoint_loaded` at the end of its part, the replay comes after.
        super().load_checkpoint(str(found.directory))
        found.restore_into(self)

    def metadata(self) -> dict[str, Any]:
        """What `qvpo.json` says of this run now; `run_state.write` adds what it has written."""
        hp = self.hp.to_dict()
        hp["hidden"] = list(hp["hidden"])
        return {
            "algorithm": self.config.algorithm_name,
            "package_version": __version__,
            "ray_version": ray.__version__,
            "torch_version": torch.__version__,
            "env": str(self.config.env),
            "env_config": self._plain_env_config(),
            "shapes": [self.policy.obs_dim, self.policy.act_dim],
            "action_box": [bound.tolist() for bound in self._action_box()],
            "seed": self.config.seed,
            "hyperparameters": hp,
            "fixed_by_checkpoint": list(self.hp.fixed_by_checkpoint),
            "ledger": self.ledger.state_dict(),
            "replay": {
                **checkpoint.encode_replay_state(self.replay.state_dict()),
                "segments": None,
            },
        }

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        # Smoothed results look back at the first of these; the others are in no result yet.
        state["episodes"] = (self._episode_history, list(self.collector.episodes))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.collector.reset()
        super().__setstate__(state)
        self._episode_history, self.collector.episodes = state.get("episodes", ([], []))
        # The counters alone say how far the run is; `RunState` puts the rest in place.
        self.ledger.ingested = int(self._counters[NUM_ENV_STEPS_SAMPLED])
        self.ledger.done = self.learner.num_updates
        self.refill_replay()
        restart = functools.partial(_restart_streams, env_steps=self.ledger.ingested)
        self.env_runner_group.foreach_env_runner(restart)

    def refill_replay(self) -> None:
        """What was restored has no replay: one warm-up fills it before the next update."""
        self.ledger.rebase(refill=True)
        self.replay_missing = True

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Starts afresh with another configuration in the same process (Tune's `reuse_actors`).

        Networks, replay, workers and counters are new; Tune restores a checkpoint afterwards where
        the trial has one.
        """
        config = self.get_default_config().update_from_dict(new_config)
        config.validate()
        config.freeze()
        self.cleanup()
        del self.replay  # there may be no room for two
        self._timers.clear()
        self._counters.clear()
        self._episode_history = []
        self._env_id, self.env_creator = self._get_env_id_and_creator(config.env, config)
        self.config = config
        self.setup(config)
        return True

    def _action_box(self) -> tuple[Any, Any]:
        space = self.policy.action_space_struct
        return space.low, space.high

    def _plain_env_config(self) -> dict[str, Any] | None:
        """The environment's arguments for `qvpo evaluate`, or None if JSON cannot hold them."""
        env_config = dict(self.config.env_config)
        try:
            json.dumps(env_config)
        except TypeError:
            return None
        return env_config

    def _announce_replay(self) -> None:
        """States the replay's size before it is allocated, and refuses one that does not fit."""
        policy, capacity = self.policy, self.hp.replay_capacity
        size = replay_bytes(
            capacity, policy.obs_dim, policy.act_dim, improves_actions=self.improves_actions
        )
        text = f"replay: {capacity:,} transitions, {size:,} bytes on {policy.device}"
        print(text, file=sys.stderr)
        free = available_bytes(policy.device)
        if size > free:
            raise ValueError(
                f"replay_capacity={capacity} does not fit: it needs {size:,} bytes on "
                f"{policy.device}, where {free:,} are free. A replay_capacity of at most "
                f"{max(0, int(capacity * 0.9 * free / size)):,} fits."
            )


def _directory_of(saved: Any) -> Path:
    """The directory of a path, a Tune checkpoint, or what `save()` returned.

    A checkpoint in a cloud is downloaded. RLlib takes relative paths for addresses.
    """
    saved = getattr(saved, "checkpoint", saved)
    if isinstance(saved, tune.Checkpoint) and not isinstance(saved.filesystem, LocalFileSystem):
        return Path(saved.to_directory())
    return Path(getattr(saved, "path", saved)).expanduser().resolve()


def _restart_streams(worker: Any, env_steps: int) -> None:
    worker.restart_streams(env_steps)
