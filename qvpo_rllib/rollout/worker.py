"""The rollout worker: it steps many environments and returns one batch of columns."""

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

from qvpo_rllib.core.errors import EnvironmentFailure, NonFiniteError
from qvpo_rllib.core.seeding import Stream, sequence, spawn_seed
from qvpo_rllib.rollout.callbacks import EpisodeCallbacks
from qvpo_rllib.rollout.environments import action_scale, check_spaces, filter_warnings
from qvpo_rllib.rollout.episodes import Episode, check_finite, run_episodes, value_bias
from qvpo_rllib.rollout.policy import AnyPolicy
from qvpo_rllib.rollout.stepper import EnvStepper, Outcome, allowed_threads

# An evaluation beside training yields to it where processes share cores.
EVALUATION_NICENESS = 10


class Fragment(NamedTuple):
    """The transitions and episodes that a remote worker sends."""

    batch: SampleBatch
    episodes: list[RolloutMetrics]  # those that ended since the last fragment
    process: str  # `process_id` of the sender


class ColumnarRolloutWorker(RolloutWorker):  # type: ignore[misc]
    """RLlib's `RolloutWorker` with a flat loop over its environments in place of the sampler.

    A fragment is `rollout_fragment_length` steps of each environment, ordered by time and then by
    environment. Observations and rewards are float32, actions are in [-1, 1].
    """

    def __init__(self, **kwargs: Any) -> None:
        filter_warnings()
        super().__init__(**kwargs)
        self.envs = self.async_env.get_sub_environments() if self.async_env is not None else []
        self.stepper = EnvStepper(self.envs, allowed_threads())
        self.fragment_length: int = self.config.get_rollout_fragment_length(self.worker_index)
        self._obs: NDArray[np.float32] | None = None
        self._returns = np.zeros(len(self.envs))
        self._lengths = np.zeros(len(self.envs), dtype=np.int64)
        self._finished: list[RolloutMetrics] = []
        self._hooks = EpisodeCallbacks(self)
        self._process_id = uuid.uuid4().hex
        self._failed = False
        beside_training = self.config.in_evaluation and self.config.evaluation_parallel_to_training
        if beside_training and self.worker_index > 0:
            os.nice(EVALUATION_NICENESS)
        self.restart_streams(0)
        if self.envs:
            # Of the environment itself: RLlib would flatten dict observations for the policy.
            check_spaces(self.envs[0].observation_space, self.envs[0].action_space)
            self.scale = action_scale(self.envs[0].action_space)

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
        self._started_at = env_steps
        self._obs = None
        self._warmup = np.random.default_rng(
            sequence(self.config.seed, Stream.WARMUP, env_steps, self.worker_index)
        )
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
            "warmup": self._warmup,
            "hooks": self._hooks.state(),
        }

    def set_progress(self, progress: dict[str, Any]) -> None:
        """Restores `progress()` of a worker with as many environments."""
        self._started_at, self._obs = progress["started_at"], progress["obs"]
        self._returns, self._lengths = progress["returns"], progress["lengths"]
        self._finished, self._warmup = progress["finished"], progress["warmup"]
        self._hooks.set_state(progress["hooks"])

    def start_episode(self, i: int, env_steps: int) -> None:
        """Begins a new episode in environment `i` of a run that goes on at `env_steps`."""
        self._started_at = env_steps
        if self._obs is not None:  # otherwise every environment is about to begin one
            self._obs[i] = self._reset(i, self._env_seed(i))

    def sample(self, **kwargs: Any) -> SampleBatch:
        """Returns a fragment that the behaviour policy collected."""
        return self.collect()

    def collect(
        self,
        weights: dict[str, NDArray[np.float32]] | None = None,
        random_actions: bool = False,
    ) -> SampleBatch:
        """Returns a fragment, acting with `weights` if given, or uniformly at random.

        Raises:
            NonFiniteError: an observation, reward or action is NaN or infinite.
            EnvironmentFailure: an environment raised anything.
        """
        if weights is not None:
            self.policy.set_weights(weights)
        if self._obs is None:
            self._obs = np.stack([self._reset(i, self._env_seed(i)) for i in range(len(self.envs))])
        shape = (self.fragment_length, len(self.envs))
        obs = np.empty((*shape, self._obs.shape[1]), np.float32)
        next_obs = np.empty_like(obs)
        actions = np.empty((*shape, self.policy.act_dim), np.float32)
        rewards = np.empty(shape, np.float32)
        terminateds, truncateds = np.empty(shape, bool), np.empty(shape, bool)
        for step in range(self.fragment_length):
            obs[step] = self._obs
            actions[step] = self._act(random_actions)
            env_actions = self.scale.to_env(actions[step])
            lengths = self._lengths + 1
            for i, outcome in enumerate(self.stepper.step(env_actions)):
                next_obs[step, i], rewards[step, i], terminateds[step, i], truncateds[step, i] = (
                    self._take(i, outcome)
                )
            # A check of each environment alone would take as long as the rest of the loop.
            if not (np.isfinite(next_obs[step]).all() and np.isfinite(rewards[step]).all()):
                self._refuse_non_finite(next_obs[step], rewards[step], lengths)
        batch = SampleBatch(
            {
                SampleBatch.OBS: _flat(obs),
                SampleBatch.ACTIONS: _flat(actions),
                SampleBatch.REWARDS: _flat(rewards),
                SampleBatch.NEXT_OBS: _flat(next_obs),
                SampleBatch.TERMINATEDS: _flat(terminateds),
                SampleBatch.TRUNCATEDS: _flat(truncateds),
            }
        )
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
    ) -> list[RolloutMetrics] | NonFiniteError:
        """Returns one whole episode per seed, without exploration, or the error that ended them.

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
                self.envs,
                act,
                self.scale,
                seeds,
                f"{self.config.env} (evaluation)",
                self._hooks,
            )
        except NonFiniteError as error:
            return error
        return [self._metrics_of(episode) for episode in episodes]

    def _metrics_of(self, episode: Episode) -> RolloutMetrics:
        metrics = RolloutMetrics(episode.length, episode.episode_return, **episode.extras)
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
            shape = (len(self.envs), self.policy.act_dim)
            return self._warmup.uniform(-1, 1, shape).astype(np.float32)
        assert self._obs is not None
        actions = self.policy.act(self._obs, explore=True)
        if not np.isfinite(actions).all():
            bad = int(np.argmin(np.isfinite(actions).all(axis=1)))
            check_finite(actions[bad], "action", self._where(bad), int(self._lengths[bad]))
        return actions

    def _take(self, i: int, outcome: Outcome) -> tuple[NDArray[np.float32], float, bool, bool]:
        """Counts a step of environment `i`, and begins a new episode where one has ended."""
        if isinstance(outcome, Exception):
            raise self._failure(i, outcome) from outcome
        observed, reward, terminated, truncated, _ = outcome
        self._lengths[i] += 1
        next_obs = np.asarray(observed, dtype=np.float32)
        self._returns[i] += reward
        self._hooks.step(i, float(reward))
        assert self._obs is not None
        if terminated or truncated:
            self._finish(i)
            self._obs[i] = self._reset(i, None)
        else:
            self._obs[i] = next_obs
        return next_obs, float(reward), bool(terminated), bool(truncated)

    def _refuse_non_finite(
        self, obs: NDArray[np.float32], rewards: NDArray[np.float32], lengths: NDArray[np.int64]
    ) -> None:
        for i in range(len(self.envs)):
            check_finite(obs[i], "observation", self._where(i), int(lengths[i]))
            check_finite(rewards[i], "reward", self._where(i), int(lengths[i]))

    def _finish(self, i: int) -> None:
        extras = self._hooks.end(i)
        self._finished.append(
            RolloutMetrics(int(self._lengths[i]), float(self._returns[i]), **extras)
        )

    def _reset(self, i: int, seed: int | None) -> NDArray[np.float32]:
        self._returns[i], self._lengths[i] = 0.0, 0
        try:
            obs, _ = self._hooks.start(i, lambda: self.envs[i].reset(seed=seed))
        except Exception as error:
            raise self._failure(i, error) from error
        check_finite(obs, "observation", self._where(i), 0)
        return np.asarray(obs, dtype=np.float32)

    def _failure(self, i: int, error: Exception) -> EnvironmentFailure:
        step = int(self._lengths[i])
        return EnvironmentFailure(
            f"{self._where(i)}: {type(error).__name__}: {error} (after {step} steps of the episode)"
        )

    def _env_seed(self, i: int) -> int:
        return spawn_seed(
            self.config.seed, Stream.ENVIRONMENT, self._started_at, self.worker_index, i
        )

    def _where(self, i: int) -> str:
        return f"{self.config.env} (worker {self.worker_index}, environment {i})"


def _flat(columns: NDArray[Any]) -> NDArray[Any]:
    """Returns columns [time, environment, …] as [time · environment, …]."""
    return columns.reshape(-1, *columns.shape[2:])
