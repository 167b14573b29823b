"""RLlib's `on_episode_…` callbacks for a worker that steps its environments in a flat loop."""

from typing import Any

from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.evaluation.episode_v2 import EpisodeV2
from ray.rllib.evaluation.rollout_worker import RolloutWorker

from qvpo_rllib.rollout.episodes import Hooks, Reset

EPISODE_CALLBACKS = ("on_episode_created", "on_episode_start", "on_episode_step", "on_episode_end")
# What callbacks may read from an episode or leave on it.
EPISODE_STATE = (
    "episode_id",
    "total_reward",
    "active_env_steps",
    "total_env_steps",
    "custom_metrics",
    "user_data",
    "hist_data",
    "media",
)


class EpisodeCallbacks(Hooks):
    """Calls the callbacks that the user overrides; where there are none it does nothing."""

    def __init__(self, worker: RolloutWorker) -> None:
        self.worker = worker
        self.wanted = {
            name
            for name in EPISODE_CALLBACKS
            if getattr(type(worker.callbacks), name) is not getattr(RLlibCallback, name)
        }
        self.episodes: dict[int, EpisodeV2] = {}

    def start(self, i: int, reset: Reset) -> tuple[Any, dict[str, Any]]:
        """Calls `reset` between `on_episode_created` and `on_episode_start`."""
        if not self.wanted:
            return reset()
        self.episodes[i] = self._new_episode(i)
        self._call("on_episode_created", i)
        first = reset()
        self._call("on_episode_start", i)
        return first

    def step(self, i: int, reward: float) -> None:
        if self.wanted:
            self.episodes[i].step()
            self.episodes[i].total_reward += reward
            self._call("on_episode_step", i)

    def end(self, i: int) -> dict[str, Any]:
        """Returns what the callbacks put on the episode, as fields of `RolloutMetrics`."""
        if not self.wanted:
            return {}
        self._call("on_episode_end", i)
        return {
            name: getattr(self.episodes[i], name)
            for name in ("custom_metrics", "hist_data", "media")
        }

    def state(self) -> dict[int, dict[str, Any]]:
        """Returns what the callbacks have put on the episodes under way, by environment."""
        return {
            i: {name: getattr(episode, name) for name in EPISODE_STATE}
            for i, episode in self.episodes.items()
        }

    def set_state(self, state: dict[int, dict[str, Any]]) -> None:
        """Restores `state()`."""
        self.episodes = {}
        for i, values in state.items():
            self.episodes[i] = self._new_episode(i)
            for name, value in values.items():
                setattr(self.episodes[i], name, value)

    def _new_episode(self, i: int) -> EpisodeV2:
        worker = self.worker
        policies, mapping = worker.policy_map, worker.policy_mapping_fn
        return EpisodeV2(i, policies, mapping, worker=worker, callbacks=worker.callbacks)

    def _call(self, name: str, i: int) -> None:
        if name in self.wanted:
            worker = self.worker
            getattr(worker.callbacks, name)(
                worker=worker,
                env_runner=worker,
                base_env=worker.async_env,
                env=worker.async_env.get_sub_environments()[i],
                policies=worker.policy_map,
                episode=self.episodes[i],
                env_index=i,
            )
