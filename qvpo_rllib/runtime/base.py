"""`BaseAlgorithm`: what all algorithms of this package share on RLlib.

It overrides private methods of RLlib's `Algorithm`; nothing else in the package does
(`tests/test_private_ray.py`).
"""

import contextlib
import functools
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import ray
import torch
from pyarrow.fs import LocalFileSystem
from ray import tune
from ray.rllib.algorithms.algorithm import Algorithm, TrainIterCtx
from ray.rllib.env.env_context import EnvContext
from ray.rllib.evaluation.metrics import RolloutMetrics
from ray.rllib.policy.sample_batch import DEFAULT_POLICY_ID
from ray.rllib.utils.metrics import (
    NUM_AGENT_STEPS_SAMPLED,
    NUM_AGENT_STEPS_TRAINED,
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_TRAINED,
    TRAINING_ITERATION_TIMER,
)
from ray.rllib.utils.metrics.learner_info import LEARNER_STATS_KEY
from ray.tune.result import TIME_TOTAL_S, TRAINING_ITERATION

from qvpo_rllib.checkpoints.metadata import Metadata, plain
from qvpo_rllib.checkpoints.run_state import RunState
from qvpo_rllib.checkpoints.staging import committed, staged
from qvpo_rllib.core.env_config import encode_env_config
from qvpo_rllib.core.errors import EnvironmentFailure, NonFiniteError
from qvpo_rllib.core.seeding import Stream, episode_seeds, spawn_seed
from qvpo_rllib.rollout.environments import check_environment, name_of
from qvpo_rllib.rollout.episodes import try_a_step
from qvpo_rllib.rollout.wrapping import observation_parts
from qvpo_rllib.runtime.building import (
    WithoutInit,
    check_evaluation_environment,
    needed_by_workers,
)
from qvpo_rllib.runtime.config import ALGORITHM_OF
from qvpo_rllib.runtime.evaluation import Share, Summary, evaluate_shares, summarize
from qvpo_rllib.runtime.ray_private import (
    StopSignal,
    check_resources,
    environment_maker,
    is_local,
    save_in_place,
)

# The evaluation return at the top level of a result, by which Ray Tune keeps the best checkpoint.
SCORE = "evaluation_return_mean"
UNFINISHED = "unfinished_iteration"
# Whether `from_checkpoint` makes the algorithm, so that its configuration is of another machine.
FROM_CHECKPOINT = ContextVar("from_checkpoint", default=False)

logger = logging.getLogger(__name__)


class BaseAlgorithm(Algorithm):  # type: ignore[misc]
    """Handles stops, evaluation, random streams and checkpoints for every algorithm.

    List it before RLlib's own algorithm in a subclass's bases. A subclass names its configuration
    and its policy.

    After `stop_requested = True`, `train` raises `KeyboardInterrupt` between two training steps or
    during an evaluation. In a trial of Ray Tune whose driver asked to stop (`StopSignal`), it
    returns [] instead, and the trial waits to be saved: its checkpoint holds the unfinished
    iteration, which the first `train` after a restore finishes.
    """

    config_class: ClassVar[type]
    policy_class: ClassVar[type]
    config: Any

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "config_class" in vars(cls):
            ALGORITHM_OF[cls.config_class] = cls

    @classmethod
    def get_default_config(cls) -> Any:
        return cls.config_class()

    @classmethod
    def get_default_policy_class(cls, config: Any) -> type:
        return cls.policy_class

    @staticmethod
    def validate_env(env: Any, env_context: Any) -> None:
        """Refuses what RLlib would take, such as discrete actions, before anything is trained."""
        check_environment(env, env.spec.id if env.spec else name_of(type(env.unwrapped)))
        if env_context.worker_index == 0 < env_context.num_workers:
            # Nobody else steps this one, and RLlib restarts remote workers that raise for ever.
            with contextlib.suppress(EnvironmentFailure):
                try_a_step(env, str(env))

    @staticmethod
    def _get_env_id_and_creator(env_specifier: Any, config: Any) -> tuple[Any, Any]:
        """Returns what makes the environments here and in `qvpo evaluate`, alike."""
        if env_specifier is None:
            found: tuple[Any, Any] = Algorithm._get_env_id_and_creator(None, config)
            return found
        number = config.num_envs_per_env_runner if config.takes_vectors else None
        wrapping = config["frame_skip"], config["wrappers"]
        return env_specifier, environment_maker(env_specifier, *wrapping, num_envs=number)

    def setup(self, config: Any) -> None:
        if self.config.num_gpus and not torch.cuda.is_available():
            lack = f"PyTorch {torch.__version__} finds no CUDA device here"
            if not FROM_CHECKPOINT.get():
                raise ValueError(
                    f"num_gpus={self.config.num_gpus} was asked for, but {lack}. Use num_gpus=0, "
                    "or a machine and a PyTorch build with CUDA."
                )
            logger.warning("%s: what was trained on a GPU goes on on the CPU.", lack)
            self.config = self.config.copy(copy_frozen=False).resources(num_gpus=0)
            self.config.validate()
            self.config.freeze()
        if ray.util.get_current_placement_group() is None:  # Tune has set the trial's aside
            lower = (
                "Lower num_env_runners, evaluation_num_env_runners, num_cpus_per_env_runner or "
                "num_gpus_per_env_runner, or start Ray with more, as ray.init(num_cpus=…) does."
            )
            if FROM_CHECKPOINT.get():  # which takes no settings
                lower += " A checkpoint goes on with other settings by build_algo and restore."
            check_resources(needed_by_workers(self.config), lower)
        in_actor = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
        if in_actor:
            # PyTorch gets one thread inside an actor; the learner gets the cores it was assigned.
            torch.set_num_threads(max(1, int(self.config.num_cpus_for_main_process)))
        # A signal handler may set this flag; reading it is cheap.
        self._stop_requested = False
        self._signal = StopSignal() if in_actor else None
        # Counters at the iteration's beginning, and results so far; None between iterations.
        self._iteration_so_far: tuple[dict[str, int], dict[str, Any] | None] | None = None
        # Is set when the running evaluation no longer needs the learner.
        self._evaluation_is_underway = threading.Event()
        self._is_set_up = False
        try:
            super().setup(config)
        except IndexError as error:  # RLlib asks a worker for its spaces that could not be built
            self._raise_what_workers_met()
            raise RuntimeError(
                "No rollout worker could be built. The log has what Ray says of it."
            ) from error
        found = self.env_runner_group.foreach_env_runner(_observation_parts)
        self._observation_parts = next((parts for parts in found if parts), None)
        if self.eval_env_runner_group is not None:
            env = self.eval_env_runner_group.local_env_runner.env
            check_evaluation_environment(self.config, env, self.get_policy())
        self.finish_setup()
        self._is_set_up = True
        self.callbacks.on_algorithm_init(algorithm=self, metrics_logger=self.metrics)

    def finish_setup(self) -> None:
        """Makes what a subclass has beside RLlib's parts. The default makes nothing."""

    @property
    def callbacks(self) -> Any:
        """RLlib's callbacks. RLlib calls `on_algorithm_init` before a subclass is set up; such a
        call does nothing."""
        return self._callbacks if self._is_set_up else WithoutInit(self._callbacks)

    @callbacks.setter
    def callbacks(self, callbacks: Any) -> None:
        self._callbacks = callbacks

    def _raise_what_workers_met(self) -> None:
        """Makes one environment of each group of remote workers here, for the error it raises."""
        for config in (self.config, self.config.get_evaluation_config_object()):
            if config is not None and config.num_env_runners > 0:
                _, create = self._get_env_id_and_creator(config.env, config)
                create(EnvContext(config.env_config, worker_index=1)).close()

    # --- where it stands ---------------------------------------------------------------------

    @property
    def env_steps(self) -> int:
        """Env steps taken in since the run began."""
        return int(self._counters[NUM_ENV_STEPS_SAMPLED])

    @property
    def updates(self) -> int:
        """Gradient steps since the run began."""
        raise NotImplementedError

    def count_steps(self, *, sampled: int = 0, trained: int = 0) -> None:
        """Adds to RLlib's counters of env steps taken in and of transitions trained on."""
        self._counters[NUM_ENV_STEPS_SAMPLED] += sampled
        self._counters[NUM_AGENT_STEPS_SAMPLED] += sampled
        self._counters[NUM_ENV_STEPS_TRAINED] += trained
        self._counters[NUM_AGENT_STEPS_TRAINED] += trained

    def drain(self) -> None:
        """Takes in fragments in flight, with their env steps and updates. The default has none."""

    def non_finite(self, quantity: str, value: float, advice: str) -> NonFiniteError:
        """Returns the error for a loss that is NaN or infinite."""
        return NonFiniteError(
            f"{name_of(self.config.env)}: {quantity} became {value} at env step {self.env_steps} "
            f"(update {self.updates}). Training stops here; the last checkpoint is untouched. "
            f"{advice}"
        )

    # --- an iteration, and its end by a stop ---------------------------------------------------

    @property
    def stop_requested(self) -> bool:
        return self._stop_requested or (self._signal is not None and self._signal.asked)

    @stop_requested.setter
    def stop_requested(self, value: bool) -> None:
        self._stop_requested = value

    def raise_if_stop_requested(self) -> None:
        if self.stop_requested:
            raise KeyboardInterrupt

    def train(self) -> Any:
        """Returns the iteration's result, or [] if Tune's driver asked to stop."""
        started_s = time.time()
        if self._signal is not None:
            self._signal.look()
        try:
            result: dict[str, Any] = super().train()
            return result
        except BaseException as error:
            if not (isinstance(error, KeyboardInterrupt) and self.stop_requested):
                self._iteration_so_far = None
                raise
            if not (self._signal and self._signal.asked):
                raise
        # Tune stores this with its next checkpoint: -inf, since that policy was not evaluated.
        last: dict[str, Any] = self._last_result or {}  # type: ignore[has-type]
        self._last_result = {
            **last,
            TRAINING_ITERATION: self._iteration,
            TIME_TOTAL_S: self._time_total + time.time() - started_s,
            SCORE: float("-inf"),
        }
        return []

    def _run_one_training_iteration_old_api_stack(self) -> tuple[dict[str, Any], Any]:
        """Runs RLlib's loop of training steps, but continues an interrupted iteration."""
        with self._timers[TRAINING_ITERATION_TIMER], TrainIterCtx(algo=self) as context:
            if self._iteration_so_far is None:
                counters = {n: v for n, v in vars(context).items() if n.startswith("init_")}
                self._iteration_so_far = counters, None
            counters, results = self._iteration_so_far
            vars(context).update(counters)
            while not context.should_stop(results):
                with self._timers["restore_workers"]:
                    restored = self.restore_env_runners(self.env_runner_group)
                    if restored:
                        self._make_on_env_runners_recreated_callbacks(
                            config=self.config,
                            env_runner_group=self.env_runner_group,
                            restored_env_runner_indices=restored,
                        )
                with self._timers["training_step"]:
                    results = self.training_step() or results or {}
                self._iteration_so_far = counters, results
        return dict(results or {}), context

    def _compile_iteration_results_old_api_stack(
        self, *, episodes_this_iter: Any, step_ctx: Any, iteration_results: dict[str, Any]
    ) -> dict[str, Any]:
        stats = self.pop_learner_stats()
        if stats is not None:
            iteration_results[DEFAULT_POLICY_ID] = {LEARNER_STATS_KEY: stats}
        episodes, self.waiting_episodes = self.waiting_episodes, []
        results: dict[str, Any] = super()._compile_iteration_results_old_api_stack(
            episodes_this_iter=episodes_this_iter + episodes,
            step_ctx=step_ctx,
            iteration_results=iteration_results,
        )
        self._iteration_so_far = None
        return results | self.run_results()

    def run_results(self) -> dict[str, Any]:
        """Returns the keys that this package adds to RLlib's result."""
        return {
            "ledger": {"ingested": self.env_steps, "done": self.updates},
            "faults": {"restarts": self.env_runner_group.num_remote_worker_restarts()},
        }

    def pop_learner_stats(self) -> dict[str, float] | None:
        """Returns the learner's metrics since the last call; None if `training_step` returns
        them."""
        return None

    @property
    def waiting_episodes(self) -> list[RolloutMetrics]:
        """Episodes of remote workers that have ended and are in no result yet."""
        return []

    @waiting_episodes.setter
    def waiting_episodes(self, episodes: list[RolloutMetrics]) -> None:
        pass

    # --- evaluation ----------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """RLlib's, of the policy that a checkpoint saved now has."""
        if not self.config.evaluation_parallel_to_training:
            self.drain()
        return super().evaluate(*args, **kwargs)

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

        RLlib trains in the second thread: evaluation then reads weights in the middle of an update,
        and the learner loses its number of threads.
        """
        self._evaluation_is_underway.clear()
        with ThreadPoolExecutor(1) as executor:
            evaluation = executor.submit(self._run_one_evaluation)
            evaluation.add_done_callback(lambda _: self._evaluation_is_underway.set())
            self._evaluation_is_underway.wait()
            trained, context = self._run_one_training_iteration_old_api_stack()
            return trained, evaluation.result(), context

    def _evaluation_seeds(self) -> list[int]:
        """Returns seeds that depend on the run's seed and the env steps alone, so that evaluating
        more or less often, or resuming, changes no result."""
        return episode_seeds(self.config.seed, self.env_steps, self.config.evaluation_duration)

    def _action_seed(self, worker: int) -> int:
        return spawn_seed(self.config.seed, Stream.EVALUATION, self.env_steps, worker)

    # --- checkpoints ---------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(cls, path: Any, *args: Any, **kwargs: Any) -> Self:
        """Returns a new algorithm from a checkpoint, its replay included where it has one.

        It goes on on the CPU where the checkpoint is of a GPU and there is none.
        RLlib's `Algorithm.from_checkpoint` restores all but the replay.
        """
        found = RunState.read(committed(_directory_of(path)))
        token = FROM_CHECKPOINT.set(True)
        try:
            algorithm: Self = super().from_checkpoint(str(found.directory), *args, **kwargs)
        finally:
            FROM_CHECKPOINT.reset(token)
        algorithm.restore_run(found)
        return algorithm

    def restore(self, checkpoint_path: Any) -> None:
        """Goes on from a checkpoint: a directory, or what `save()` returned."""
        directory = _directory_of(checkpoint_path)
        # Checked first, since Tune's part of the restore sets iteration and times.
        self._read_fitting(directory)
        local = tune.Checkpoint.from_directory(str(directory))
        metrics = getattr(checkpoint_path, "metrics", None)  # Tune's: iteration and times so far
        super().restore(local if metrics is None else type(checkpoint_path)(local, metrics))

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Saves as Ray does; a trial of Tune writes only what is new since its last checkpoint."""
        if checkpoint_dir is None and is_local(self._storage):
            return save_in_place(self)
        return super().save(checkpoint_dir)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        self.drain()
        target = Path(checkpoint_dir)
        with staged(target) as directory:
            self.write_checkpoint(directory)
        self.checkpoint_moved(target)

    def write_checkpoint(self, directory: Path) -> None:
        """Writes a checkpoint into the empty `directory`; a crash leaves it incomplete."""
        super().save_checkpoint(str(directory))
        # RLlib notes where it wrote the state, and reads it beside this file wherever that is.
        about = directory / "rllib_checkpoint.json"
        content = {**json.loads(about.read_text()), "state_file": "algorithm_state.pkl"}
        about.write_text(json.dumps(content))
        self.write_run(directory).write(directory)

    def checkpoint_moved(self, directory: Path) -> None:
        """Notes that the checkpoint just written is in `directory` now."""

    @staticmethod
    def prune(directory: Path) -> None:
        """Removes from a checkpoint what only training needs. The default removes nothing."""

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        found = self._read_fitting(Path(checkpoint_dir))
        # RLlib calls `on_checkpoint_loaded` at the end of its part, the rest comes after.
        super().load_checkpoint(str(found.directory))
        self.restore_run(found)

    def write_run(self, directory: Path) -> Metadata:
        """Writes the state that RLlib does not save; returns the metadata for `qvpo.json`."""
        return self.metadata()

    def _read_fitting(self, directory: Path) -> RunState:
        """Returns a checkpoint that this run can go on from. Raises `ValueError`."""
        kind = self.config.hyperparameters_class
        return RunState.read(committed(directory), self.metadata(), kind)

    def restore_run(self, found: RunState) -> None:
        """Restores what `write_run` wrote, after RLlib's own state."""

    def metadata(self) -> Metadata:
        """Returns what `qvpo.json` says of this run now."""
        policy = self.get_policy()
        box = policy.action_space_struct
        return Metadata(
            algorithm=self.config.algorithm_name,
            env=name_of(self.config.env),
            env_config=encode_env_config(self.config.env_config),
            shapes=[int(np.prod(policy.observation_space.shape)), box.shape[0]],
            action_box=[box.low.tolist(), box.high.tolist()],
            observation_parts=self._observation_parts,
            seed=self.config.seed,
            hyperparameters=plain(self.config.hyperparameters().to_dict()),
            fixed_by_checkpoint=list(self.config.hyperparameters_class.fixed_by_checkpoint),
            ledger={"ingested": self.env_steps, "done": self.updates},
        )

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state[UNFINISHED] = self._iteration_so_far
        # Smoothed results need the first of these; the second are in no result yet.
        state["episodes"] = (self._episode_history, self.waiting_episodes)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._iteration_so_far = state[UNFINISHED]
        self._episode_history, self.waiting_episodes = state["episodes"]
        restart = functools.partial(_restart_streams, env_steps=self.env_steps)
        self.env_runner_group.foreach_env_runner(restart)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Starts afresh with another configuration in the same process (Tune's `reuse_actors`).

        Networks, replay, workers and counters are new; Tune restores a checkpoint afterwards where
        the trial has one.
        """
        config = self.get_default_config().update_from_dict(new_config)
        config.validate()
        config.freeze()
        self.cleanup()
        self.release()
        self._timers.clear()
        self._counters.clear()
        self._episode_history = []
        self._env_id, self.env_creator = self._get_env_id_and_creator(config.env, config)
        self.config = config
        self.setup(config)
        return True

    def release(self) -> None:
        """Frees large objects before `reset_config` makes new ones: both may not fit."""


def _directory_of(saved: Any) -> Path:
    """Returns the directory of a path, a Tune checkpoint, or what `save()` returned.

    A checkpoint in a cloud is downloaded. RLlib would read a relative path as an address.
    """
    saved = getattr(saved, "checkpoint", saved)
    if isinstance(saved, tune.Checkpoint) and not isinstance(saved.filesystem, LocalFileSystem):
        return Path(saved.to_directory())
    return Path(getattr(saved, "path", saved)).expanduser().resolve()


def _observation_parts(worker: Any) -> list[dict[str, Any]] | None:
    """Returns the parts of a flattened observation, as checkpoints record them."""
    parts = None if worker.env is None else observation_parts(worker.env)
    return None if parts is None else parts.to_json()


def _restart_streams(worker: Any, env_steps: int) -> None:
    worker.restart_streams(env_steps)
