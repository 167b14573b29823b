"""The rollout worker: it steps many environments and returns one batch of columns."""

import logging
import os
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.evaluation.metrics import RolloutMetrics
from ray.rllib.evaluation.rollout_worker import RolloutWorker
from ray.rllib.policy.sample_batch import DEFAULT_POLICY_ID, SampleBatch

from qvpo_rllib.core.errors import ENDS_TRAINING, RAISED_BY_ENVIRONMENT
from qvpo_rllib.core.seeding import Stream, environment_seed, sequence, spawn_seed
from qvpo_rllib.rollout.callbacks import AGENT, EpisodeCallbacks
from qvpo_rllib.rollout.env_batch import EnvBatch, check_number, info_of
from qvpo_rllib.rollout.environments import (
    action_scale,
    check_spaces,
    filter_warnings,
    name_of,
)
from qvpo_rllib.rollout.episodes import (
    Episode,
    already,
    check_finite,
    environment_failure,
    run_episodes,
    value_bias,
)
from qvpo_rllib.rollout.outcomes import OutcomeCheck
from qvpo_rllib.rollout.policy import AnyPolicy
from qvpo_rllib.rollout.stepper import EnvStepper, Outcome, allowed_threads
from qvpo_rllib.rollout.wrapping import env_steps_of

logger = logging.getLogger(__name__)

# An evaluation beside training yields to it where processes share cores.
EVALUATION_NICENESS = 10


class Fragment(NamedTuple):
    """The transitions and episodes that a remote worker sends."""

    batch: SampleBatch
    episodes: list[RolloutMetrics]  # those that ended since the last fragment
    process: str  # `process_id` of the sender


class _Rows(NamedTuple):
    """Where the outcomes of one step of E environments go: views of a fragment's columns."""

    next_obs: NDArray[np.float32]  # [E, O]
    rewards: NDArray[np.float32]  # [E]
    terminateds: NDArray[np.bool_]
    truncateds: NDArray[np.bool_]


class ColumnarRolloutWorker(RolloutWorker):  # type: ignore[misc]
    """RLlib's `RolloutWorker` with a flat loop over its environments in place of the sampler.

    A fragment is `rollout_fragment_length` steps of each environment, ordered by time and then by
    environment. Observations and rewards are float32, actions are in [-1, 1]. A vector environment
    is stepped as one batch; a sub-environment that it resets in the place of a step has no row.

    Attributes:
        batch: the vector environment, if it is one; None: `envs` are stepped one by one.
        envs: the environments whose state a checkpoint holds.
    """

    def __init__(self, **kwargs: Any) -> None:
        filter_warnings()
        super().__init__(**kwargs)
        self.envs = self.async_env.get_sub_environments() if self.async_env is not None else []
        self.num_envs = len(self.envs)
        self.batch = self.env if isinstance(self.env, EnvBatch) else None
        if self.batch is not None:
            check_number(self.batch, self.config)
            self.envs = [self.batch.env]
        singles = self.envs if self.batch is None else []
        self.stepper = EnvStepper(singles, allowed_threads())
        self.fragment_length: int = self.config.get_rollout_fragment_length(self.worker_index)
        self._obs: NDArray[np.float32] | None = None
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, dtype=np.int64)
        self._finished: list[RolloutMetrics] = []
        self._num_restarted = 0  # environments, since `restart_streams`
        self._checks = [OutcomeCheck(env, self._where(i)) for i, env in enumerate(singles)]
        self._hooks = EpisodeCallbacks(self)
        self._process_id = uuid.uuid4().hex
        self._failed = False
        beside_training = self.config.in_evaluation and self.config.evaluation_parallel_to_training
        if beside_training and self.worker_index > 0:
            os.nice(EVALUATION_NICENESS)
        self.restart_streams(0)
        if self.envs:
            # Of the environment itself: RLlib would change what it shows the policy.
            one = self.batch or self.envs[0]
            check_spaces(one.observation_space, one.action_space)
            self.scale = action_scale(one.action_space)

    @property
    def policy(self) -> AnyPolicy:
        policy: AnyPolicy = self.policy_map[DEFAULT_POLICY_ID]
        return policy

    def restart_streams(self, env_steps: int) -> None:
        """Starts new streams for environments, warm-up and (on remote workers) diffusion noise.

        Args:
            env_steps: 0 when a run starts; the run's when it goes on without this worker's state,
                where the first seeds would collect the first episodes again.
        """
        self._started_at, self._num_restarted = env_steps, 0
        self._obs = None
        self._warmup = np.random.default_rng(
            sequence(self.config.seed, Stream.WARMUP, env_steps, self.worker_index)
        )
        # Half the range of int64 is left for the episodes that follow.
        first = spawn_seed(self.config.seed, Stream.EPISODES, env_steps, self.worker_index) // 2
        self._episodes = first + np.arange(self.num_envs)  # the number of each one's episode
        self._next_episode = first + self.num_envs
        if not self.policy.is_learner:  # the learner's policy restores its own
            self.policy.seed_actions(env_steps)

    def progress(self) -> dict[str, Any]:
        """Returns episodes and streams as they are; `worker_state` adds the environments."""
        return {
            "started_at": self._started_at,
            "obs": self._obs,
            "returns": self._returns,
            "lengths": self._lengths,
            "finished": self._finished,
            "num_restarted": self._num_restarted,
            "warmup": self._warmup,
            "episodes": (self._episodes, self._next_episode),
            "hooks": self._hooks.state(),
            "waiting": None if self.batch is None else self.batch.waiting,
        }

    def set_progress(self, progress: dict[str, Any]) -> None:
        """Restores `progress()` of a worker with as many environments."""
        self._started_at, self._obs = progress["started_at"], progress["obs"]
        self._returns, self._lengths = progress["returns"], progress["lengths"]
        self._finished, self._warmup = progress["finished"], progress["warmup"]
        self._num_restarted = progress["num_restarted"]
        # Earlier checkpoints have none: their episodes get new numbers.
        self._episodes, self._next_episode = progress.get(
            "episodes", (self._episodes, self._next_episode)
        )
        self._hooks.set_state(progress["hooks"])
        if self.batch is not None and progress.get("waiting") is not None:
            self.batch.waiting = progress["waiting"]

    def start_episode(self, i: int, env_steps: int) -> None:
        """Begins a new episode in environment `i` of a run that goes on at `env_steps`.

        Of a vector environment all sub-environments begin one.
        """
        self._started_at = env_steps
        if self.batch is not None:
            self._obs = None
        if self._obs is not None:  # otherwise every environment is about to begin one
            self._obs[i] = self._begin(i, self._env_seed(i))

    def sample(self, **kwargs: Any) -> SampleBatch:
        """Returns a fragment that the behaviour policy collected."""
        return self.collect()

    def collect(
        self,
        weights: dict[str, NDArray[np.float32]] | None = None,
        random_actions: bool = False,
    ) -> SampleBatch:
        """Returns a fragment, acting with `weights` if given, or uniformly at random.

        With `restart_failed_sub_environments`, an environment that raises is replaced, and the
        fragment lacks that step.

        Raises:
            NonFiniteError: an observation, reward or action is NaN or infinite.
            UnusableOutcome: an environment returned what its spaces or Gymnasium's API rule out.
            EnvironmentFailure: an environment raised anything.
        """
        if weights is not None:
            self.policy.set_weights(weights)
        if self._obs is None:
            self._obs = self._begin_all()
        shape = (self.fragment_length, self.num_envs)
        obs = np.empty((*shape, self._obs.shape[1]), np.float32)
        next_obs = np.empty_like(obs)
        actions = np.empty((*shape, self.policy.act_dim), np.float32)
        rewards = np.empty(shape, np.float32)
        terminateds, truncateds = np.empty(shape, bool), np.empty(shape, bool)
        episodes, steps = np.empty(shape, np.int64), np.empty(shape, np.int64)
        lost: list[int] = []  # rows of environments that raised, or were reset instead of stepped
        for step in range(self.fragment_length):
            self._begin_waiting()
            obs[step], episodes[step], steps[step] = self._obs, self._episodes, self._lengths
            actions[step] = self._act(random_actions)
            lengths = self._lengths + 1
            rows = _Rows(next_obs[step], rewards[step], terminateds[step], truncateds[step])
            take_step = self._step_each if self.batch is None else self._step_batch
            lost += [step * self.num_envs + i for i in take_step(actions[step], rows)]
            # A check of each environment alone would take as long as the rest of the loop.
            if not (np.isfinite(next_obs[step]).all() and np.isfinite(rewards[step]).all()):
                self._refuse_non_finite(next_obs[step], rewards[step], lengths)
        columns = {
            SampleBatch.OBS: _flat(obs),
            SampleBatch.ACTIONS: _flat(actions),
            SampleBatch.REWARDS: _flat(rewards),
            SampleBatch.NEXT_OBS: _flat(next_obs),
            SampleBatch.TERMINATEDS: _flat(terminateds),
            SampleBatch.TRUNCATEDS: _flat(truncateds),
        }
        if self.policy.hp.n_step > 1:
            columns |= {SampleBatch.EPS_ID: _flat(episodes), SampleBatch.T: _flat(steps)}
        if lost:
            columns = {name: np.delete(rows, lost, axis=0) for name, rows in columns.items()}
        batch = SampleBatch(columns)
        self.callbacks.on_sample_end(worker=self, samples=batch)
        return batch

    def collect_fragment(
        self,
        weights: dict[str, NDArray[np.float32]] | None = None,
        random_actions: bool = False,
        stream: int | None = None,
    ) -> Fragment:
        """Returns `collect` with its episodes, for a driver that may have asked for more already.

        Args:
            stream: of the random numbers, if this process is not the worker's first one, whose
                episodes `collect` would repeat.

        Raises:
            RuntimeError: the worker has failed before.
        """
        if self._failed:
            raise RuntimeError("A fragment was asked of a worker that has failed.")
        if stream is not None and stream != self._started_at:
            self.restart_streams(stream)
        try:
            batch = self.collect(weights, random_actions)
        except Exception:
            self._failed = True  # some environments have taken a step that others have not
            raise
        return Fragment(batch, self.get_metrics(), self._process_id)

    def process_id(self) -> str:
        """Returns a name of this process; a restarted worker has another one."""
        return self._process_id

    def evaluate_episodes(
        self,
        seeds: Sequence[int],
        action_seed: int,
        before_step: Callable[[], None] = lambda: None,
    ) -> list[RolloutMetrics] | Exception:
        """Returns one whole episode per seed, without exploration, or the error that ends training.

        Args:
            seeds: the environments' seeds, one per episode.
            action_seed: of the noise that actions are drawn with.
            before_step: is called before every step; an exception of it ends the evaluation.
        """
        policy = self.policy
        generator = torch.Generator().manual_seed(action_seed)

        def act(
            obs: NDArray[np.float32],
        ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
            before_step()
            return policy.act_with_q(obs, generator=generator)

        try:
            episodes = run_episodes(
                self.batch or self.envs,
                act,
                self.scale,
                seeds,
                f"{name_of(self.config.env)} (evaluation)",
                self._hooks,
                restart_of(self),
            )
        except ENDS_TRAINING as error:
            return error
        return [self._metrics_of(episode) for episode in episodes]

    def _metrics_of(self, episode: Episode) -> RolloutMetrics:
        metrics = episode_metrics(episode.length, episode.episode_return, episode.extras)
        q, rewards = np.asarray(episode.q), np.asarray(episode.rewards)
        bias = value_bias(q, rewards, episode.terminated, self.policy.hp.gamma) if len(q) else None
        if bias is None:
            return metrics
        values = {f"q_{name}": [value] for name, value in bias._asdict().items()}
        return metrics._replace(hist_data={**metrics.hist_data, **values})

    def stop(self) -> None:
        self.stepper.stop()
        super().stop()

    def get_metrics(self) -> list[RolloutMetrics]:
        """Returns the episodes that have finished since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def _act(self, random_actions: bool) -> NDArray[np.float32]:
        if random_actions:
            shape = (self.num_envs, self.policy.act_dim)
            return self._warmup.uniform(-1, 1, shape).astype(np.float32)
        assert self._obs is not None
        actions = self.policy.act(self._obs, explore=True)
        if not np.isfinite(actions).all():
            bad = int(np.argmin(np.isfinite(actions).all(axis=1)))
            check_finite(actions[bad], "action", self._where(bad), int(self._lengths[bad]))
        return actions

    def _step_each(self, actions: NDArray[np.float32], rows: _Rows) -> list[int]:
        """Steps the environments one by one; returns those that raised and have no outcome."""
        missing = []
        for i, outcome in enumerate(self.stepper.step(self.scale.to_env(actions))):
            if isinstance(outcome, RAISED_BY_ENVIRONMENT):
                self._drop_episode(i, outcome)
                missing.append(i)
                rows.next_obs[i], rows.rewards[i] = 0, 0
                continue
            rows.next_obs[i], rows.rewards[i], rows.terminateds[i], rows.truncateds[i] = self._take(
                i, actions[i], outcome
            )
        return missing

    def _step_batch(self, actions: NDArray[np.float32], rows: _Rows) -> list[int]:
        """Steps the vector environment; returns the sub-environments that it reset instead."""
        assert self.batch is not None
        step = self.batch.step(self.scale.to_env(actions))
        stepped = ~step.skipped
        rows.next_obs[:] = np.where(stepped[:, None], step.next_obs, 0)
        rows.rewards[:] = np.where(stepped, step.rewards, 0)
        rows.terminateds[:], rows.truncateds[:] = step.terminated, step.truncated
        self._lengths[stepped] += 1
        self._returns[stepped] += step.rewards[stepped]
        if self._hooks.wanted:
            for i in np.flatnonzero(stepped).tolist():
                reward = float(step.rewards[i])
                self._hooks.step(i, actions[i], rows.next_obs[i].copy(), reward, step.info(i))
        for i in np.flatnonzero(step.ended).tolist():
            self._finish(i)
        self._begin_batch(step.obs, step.begun, step.first_infos)
        return np.flatnonzero(step.skipped).tolist()

    def _begin_waiting(self) -> None:
        """Begins the next episodes if all sub-environments have ended and wait for a step."""
        if self.batch is not None and self.batch.waiting.all():
            no_action = np.zeros((self.num_envs, self.policy.act_dim))
            step = self.batch.step(self.scale.to_env(no_action))
            self._begin_batch(step.obs, step.begun, step.first_infos)

    def _begin_all(self) -> NDArray[np.float32]:
        """Begins an episode in every environment and returns the first observations."""
        seeds = [self._env_seed(i) for i in range(self.num_envs)]
        if self.batch is None:
            return np.stack([self._begin(i, seed) for i, seed in enumerate(seeds)])
        obs, infos = self.batch.reset_all(seeds)
        self._begin_batch(obs, np.ones(self.num_envs, bool), infos)
        return obs

    def _begin_batch(
        self, obs: NDArray[np.float32], begun: NDArray[np.bool_], infos: dict[str, Any]
    ) -> None:
        """Acts on `obs` from now on, and counts from 0 in the sub-environments that have begun."""
        self._obs = obs
        self._returns[begun], self._lengths[begun] = 0.0, 0
        number = int(begun.sum())
        self._episodes[begun] = self._next_episode + np.arange(number)
        self._next_episode += number
        if not np.isfinite(obs[begun]).all():
            for i in np.flatnonzero(begun).tolist():
                check_finite(obs[i], "observation", self._where(i), 0)
        if self._hooks.wanted:
            for i in np.flatnonzero(begun).tolist():
                self._hooks.start(i, already(obs[i].copy(), info_of(infos, i)))

    def _take(
        self, i: int, action: NDArray[np.float32], outcome: Outcome
    ) -> tuple[NDArray[np.float32], float, bool, bool]:
        """Counts a step of environment `i`, and begins a new episode where one has ended."""
        self._lengths[i] += 1
        next_obs, reward, terminated, truncated, info = self._checks[i].step(
            outcome, self._lengths[i]
        )
        self._returns[i] += reward
        self._hooks.step(i, action, next_obs, reward, info)
        assert self._obs is not None
        if terminated or truncated:
            self._finish(i)
            self._obs[i] = self._begin(i, None)
        else:
            self._obs[i] = next_obs
        return next_obs, reward, terminated, truncated

    def _refuse_non_finite(
        self, obs: NDArray[np.float32], rewards: NDArray[np.float32], lengths: NDArray[np.int64]
    ) -> None:
        for i in range(self.num_envs):
            check_finite(obs[i], "observation", self._where(i), int(lengths[i]))
            check_finite(rewards[i], "reward", self._where(i), int(lengths[i]))

    def _finish(self, i: int) -> None:
        extras = self._hooks.end(i)
        length = int(self._lengths[i])
        if self.batch is None:
            length = env_steps_of(self.envs[i], length)
        self._finished.append(episode_metrics(length, float(self._returns[i]), extras))

    def _begin(self, i: int, seed: int | None) -> NDArray[np.float32]:
        """Begins an episode in environment `i` and returns its first observation."""
        self._returns[i], self._lengths[i] = 0.0, 0
        self._episodes[i], self._next_episode = self._next_episode, self._next_episode + 1
        obs: NDArray[np.float32]
        obs, _ = self._hooks.start(i, lambda: self._reset(i, seed))
        check_finite(obs, "observation", self._where(i), 0)
        return obs

    def _reset(self, i: int, seed: int | None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        try:
            returned = self.envs[i].reset(seed=seed)
        except RAISED_BY_ENVIRONMENT as error:
            self._restart(i, error)
            returned = self.envs[i].reset(seed=self._env_seed(i))
        return self._checks[i].reset(returned)

    def _drop_episode(self, i: int, error: BaseException) -> None:
        """Replaces environment `i`, which raised in a step, and begins an episode there."""
        self._restart(i, error)
        self._hooks.fail(i, error)
        self._finished.append(RolloutMetrics(episode_faulty=True))
        assert self._obs is not None
        self._obs[i] = self._begin(i, self._env_seed(i))

    def _restart(self, i: int, error: BaseException) -> None:
        """Replaces environment `i`, which raised; raises where that was not asked for."""
        failure = environment_failure(self._where(i), error, int(self._lengths[i]))
        restart = restart_of(self)
        if restart is None:
            raise failure from error
        logger.warning("%s. This environment alone is restarted.", failure)
        restart(i)
        self._num_restarted += 1

    def _env_seed(self, i: int) -> int:
        """Returns the seed of the first episode of environment `i`, or of its replacement."""
        where = (self._started_at, self.worker_index, i)
        return environment_seed(self.config.seed, *where, self._num_restarted)

    def _where(self, i: int) -> str:
        return f"{name_of(self.config.env)} (worker {self.worker_index}, environment {i})"


def _flat(columns: NDArray[Any]) -> NDArray[Any]:
    """Returns columns [time, environment, …] as [time · environment, …]."""
    return columns.reshape(-1, *columns.shape[2:])


def restart_of(worker: RolloutWorker) -> Callable[[int], None] | None:
    """Returns what replaces an environment of `worker`, if `restart_failed_sub_environments`."""
    if not worker.config.restart_failed_sub_environments:
        return None
    restart: Callable[[int], None] = worker.async_env.vector_env.restart_at
    return restart


def episode_metrics(length: int, episode_return: float, extras: dict[str, Any]) -> RolloutMetrics:
    """Returns an episode as RLlib's results take it in."""
    by_agent = {(AGENT, DEFAULT_POLICY_ID): episode_return}
    return RolloutMetrics(length, episode_return, agent_rewards=by_agent, **extras)
