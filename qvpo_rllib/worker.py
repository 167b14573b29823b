"""The rollout worker: many environments, one batch of columns."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.evaluation.episode_v2 import EpisodeV2
from ray.rllib.evaluation.metrics import RolloutMetrics
from ray.rllib.evaluation.rollout_worker import RolloutWorker
from ray.rllib.policy.sample_batch import DEFAULT_POLICY_ID, SampleBatch

from qvpo_rllib.core.errors import NonFiniteError
from qvpo_rllib.core.seeding import Stream, sequence, spawn_seed
from qvpo_rllib.mujoco_warnings import filter_warnings
from qvpo_rllib.policy import QVPOTorchPolicy
from qvpo_rllib.rollout import check_finite, run_episodes
from qvpo_rllib.spaces import action_scale

EPISODE_CALLBACKS = ("on_episode_created", "on_episode_start", "on_episode_step", "on_episode_end")


class QVPORolloutWorker(RolloutWorker):  # type: ignore[misc]
    """RLlib's `RolloutWorker` with a flat loop over its environments in place of the sampler.

    A fragment is `rollout_fragment_length` steps of each environment, ordered by time and then by
    environment. Observations and rewards are float32, actions are in [-1, 1].
    """

    def __init__(self, **kwargs: Any) -> None:
        filter_warnings()
        super().__init__(**kwargs)
        self.envs = self.async_env.get_sub_environments() if self.async_env is not None else []
        self.fragment_length: int = self.config.get_rollout_fragment_length(self.worker_index)
        self._obs: NDArray[np.float32] | None = None
        self._returns = np.zeros(len(self.envs))
        self._lengths = np.zeros(len(self.envs), dtype=np.int64)
        self._finished: list[RolloutMetrics] = []
        self._warmup = np.random.default_rng(
            sequence(self.config.seed, Stream.WARMUP, self.worker_index)
        )
        hooks = [h for h in EPISODE_CALLBACKS if _overrides(self.callbacks, h)]
        self._hooks = frozenset(hooks)
        self._episodes: list[EpisodeV2] = []
        if self.envs:
            self.scale = action_scale(self.envs[0].action_space)

    @property
    def policy(self) -> QVPOTorchPolicy:
        policy: QVPOTorchPolicy = self.policy_map[DEFAULT_POLICY_ID]
        return policy

    def sample(self, **kwargs: Any) -> SampleBatch:
        """A fragment collected by the behaviour policy (K_b of N)."""
        return self.collect()

    def collect(
        self,
        weights: dict[str, NDArray[np.float32]] | None = None,
        random_actions: bool = False,
    ) -> SampleBatch:
        """A fragment, acting with `weights` if given, or uniformly at random.

        Raises:
            NonFiniteError: an observation, reward or action is NaN or infinite.
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
            actions[step] = self._choose(random_actions)
            env_actions = self.scale.to_env(actions[step])
            for i in range(len(self.envs)):
                next_obs[step, i], rewards[step, i], terminateds[step, i], truncateds[step, i] = (
                    self._step(i, env_actions[i])
                )
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

    def collect_remotely(self, **kwargs: Any) -> SampleBatch | NonFiniteError:
        """`collect`, but a `NonFiniteError` is returned: raised, it would restart the worker."""
        try:
            return self.collect(**kwargs)
        except NonFiniteError as error:
            return error

    def evaluate_episodes(
        self, seeds: Sequence[int], action_seed: int
    ) -> tuple[list[RolloutMetrics], NonFiniteError | None]:
        """One whole episode per seed with the best of `k_eval` actions.

        Args:
            seeds: the environments' seeds, one per episode.
            action_seed: of the diffusion noise.
        """
        policy = self.policy
        generator = torch.Generator(device=policy.device).manual_seed(action_seed)
        try:
            episodes = run_episodes(
                self.envs,
                lambda obs: policy.act(obs, policy.hp.k_eval, generator),
                self.scale,
                seeds,
                f"{self.config.env} (evaluation)",
            )
        except NonFiniteError as error:
            return [], error
        return [RolloutMetrics(e.length, e.episode_return) for e in episodes], None

    def get_metrics(self) -> list[RolloutMetrics]:
        """Episodes finished since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def _choose(self, random_actions: bool) -> NDArray[np.float32]:
        if random_actions:
            shape = (len(self.envs), self.policy.act_dim)
            return self._warmup.uniform(-1, 1, shape).astype(np.float32)
        assert self._obs is not None
        actions = self.policy.act(self._obs, self.policy.hp.k_behavior)
        if not np.isfinite(actions).all():
            bad = int(np.argmin(np.isfinite(actions).all(axis=1)))
            check_finite(actions[bad], "action", self._where(bad), int(self._lengths[bad]))
        return actions

    def _step(
        self, i: int, action: NDArray[np.floating]
    ) -> tuple[NDArray[np.float32], float, bool, bool]:
        observed, reward, terminated, truncated, _ = self.envs[i].step(action)
        self._lengths[i] += 1
        next_obs = np.asarray(observed, dtype=np.float32)
        if not (np.isfinite(next_obs).all() and np.isfinite(reward)):
            step = int(self._lengths[i])
            check_finite(next_obs, "observation", self._where(i), step)
            check_finite(reward, "reward", self._where(i), step)
        self._returns[i] += reward
        if self._hooks:
            episode = self._episodes[i]
            episode.step()
            episode.total_reward += float(reward)
            self._call("on_episode_step", i)
        assert self._obs is not None
        if terminated or truncated:
            self._finish(i)
            self._obs[i] = self._reset(i, None)
        else:
            self._obs[i] = next_obs
        return next_obs, float(reward), bool(terminated), bool(truncated)

    def _finish(self, i: int) -> None:
        custom: dict[str, Any] = {}
        media: dict[str, Any] = {}
        if self._hooks:
            self._call("on_episode_end", i)
            custom, media = self._episodes[i].custom_metrics, self._episodes[i].media
        self._finished.append(
            RolloutMetrics(
                int(self._lengths[i]), float(self._returns[i]), custom_metrics=custom, media=media
            )
        )

    def _reset(self, i: int, seed: int | None) -> NDArray[np.float32]:
        self._returns[i], self._lengths[i] = 0.0, 0
        if self._hooks:
            episode = EpisodeV2(
                i, self.policy_map, self.policy_mapping_fn, worker=self, callbacks=self.callbacks
            )
            self._episodes[i : i + 1] = [episode]
            self._call("on_episode_created", i)
        obs, _ = self.envs[i].reset(seed=seed)
        check_finite(obs, "observation", self._where(i), 0)
        if self._hooks:
            self._call("on_episode_start", i)
        return np.asarray(obs, dtype=np.float32)

    def _call(self, hook: str, i: int) -> None:
        if hook not in self._hooks:
            return
        getattr(self.callbacks, hook)(
            worker=self,
            env_runner=self,
            base_env=self.async_env,
            env=self.envs[i],
            policies=self.policy_map,
            episode=self._episodes[i],
            env_index=i,
        )

    def _env_seed(self, i: int) -> int:
        return spawn_seed(self.config.seed, Stream.ENVIRONMENT, self.worker_index, i)

    def _where(self, i: int) -> str:
        return f"{self.config.env} (worker {self.worker_index}, environment {i})"


def _flat(columns: NDArray[Any]) -> NDArray[Any]:
    """[time, environment, …] → [time · environment, …]."""
    return columns.reshape(-1, *columns.shape[2:])


def _overrides(callbacks: RLlibCallback, hook: str) -> bool:
    return getattr(type(callbacks), hook) is not getattr(RLlibCallback, hook)
