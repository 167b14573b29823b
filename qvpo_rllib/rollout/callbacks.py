"""RLlib's `on_episode_…` callbacks for loops that step their environments themselves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.evaluation.episode_v2 import EpisodeV2
from ray.rllib.evaluation.rollout_worker import RolloutWorker

from qvpo_rllib.rollout.episodes import Hooks, Reset

EPISODE_CALLBACKS = ("on_episode_created", "on_episode_start", "on_episode_step", "on_episode_end")
AGENT = "agent0"  # RLlib's name of the only one
# What callbacks may read from an episode or leave on it.
EPISODE_STATE = (
    "episode_id",
    "total_reward",
    "active_env_steps",
    "total_env_steps",
    "active_agent_steps",
    "total_agent_steps",
    "agent_rewards",
    "custom_metrics",
    "user_data",
    "hist_data",
    "media",
)

# Observation, action in [-1, 1], info.
LastStep = tuple[NDArray[Any] | None, NDArray[np.floating] | None, dict[str, Any] | None]


def overrides(callbacks: RLlibCallback | type[RLlibCallback], name: str) -> bool:
    """Returns whether a user has written the callback `name`."""
    kind = callbacks if isinstance(callbacks, type) else type(callbacks)
    return getattr(kind, name) is not getattr(RLlibCallback, name)


class WatchedEpisode(EpisodeV2):  # type: ignore[misc]
    """RLlib's episode, of one agent, that knows the last step alone.

    `last_observation_for`, `last_action_for` and `last_info_for` are as in RLlib's first `Episode`;
    the action is in [-1, 1].

    Args:
        last: returns observation, action and info of the episode's last step; of the reset the
            action is None, and before it all are.
    """

    def __init__(self, *arguments: Any, last: Callable[[], LastStep], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._last = last

    def last_observation_for(self, agent_id: str = AGENT) -> NDArray[Any] | None:
        return self._last()[0]

    def last_action_for(self, agent_id: str = AGENT) -> NDArray[np.floating] | None:
        return self._last()[1]

    def last_info_for(self, agent_id: str = AGENT) -> dict[str, Any] | None:
        return self._last()[2]


class EpisodeCallbacks(Hooks):
    """Calls the callbacks that the user overrides; where there are none it does nothing."""

    def __init__(self, worker: RolloutWorker) -> None:
        self.worker = worker
        self.wanted = {name for name in EPISODE_CALLBACKS if overrides(worker.callbacks, name)}
        self.episodes: dict[int, WatchedEpisode] = {}
        self._last: dict[int, LastStep] = {}

    def start(self, i: int, reset: Reset) -> tuple[Any, dict[str, Any]]:
        """Calls `reset` between `on_episode_created` and `on_episode_start`."""
        if not self.wanted:
            return reset()
        episode = self.episodes[i] = self._new_episode(i)
        self._call("on_episode_created", i)
        obs, info = first = reset()
        self._last[i] = obs, None, info
        self._call("on_episode_start", i)
        episode.step()  # RLlib counts from -1, and a reset as a step
        return first

    def step(
        self,
        i: int,
        action: NDArray[np.floating],
        obs: NDArray[np.float32],
        reward: float,
        info: dict[str, Any],
    ) -> None:
        if not self.wanted:
            return
        episode = self.episodes[i]
        episode.step()
        episode.active_agent_steps += 1
        episode.total_agent_steps += 1
        episode.total_reward += reward
        episode.agent_rewards[AGENT, episode.policy_for(AGENT)] += reward
        self._last[i] = obs, np.array(action), info
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

    def fail(self, i: int, error: BaseException) -> None:
        """Calls `on_episode_end` with the error in the episode's place, as RLlib does."""
        self._call("on_episode_end", i, error)

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

    def _new_episode(self, i: int) -> WatchedEpisode:
        worker, self._last[i] = self.worker, (None, None, None)
        episode = WatchedEpisode(
            i,
            worker.policy_map,
            worker.policy_mapping_fn,
            last=lambda: self._last[i],
            worker=worker,
            callbacks=worker.callbacks,
        )
        episode.agent_index(AGENT)
        return episode

    def _call(self, name: str, i: int, error: BaseException | None = None) -> None:
        if name in self.wanted:
            worker = self.worker
            getattr(worker.callbacks, name)(
                worker=worker,
                env_runner=worker,
                base_env=worker.async_env,
                env=worker.async_env.get_sub_environments()[i],
                policies=worker.policy_map,
                episode=error or self.episodes[i],
                env_index=i,
            )


class CombinedCallbacks(RLlibCallback):  # type: ignore[misc]
    """Several callbacks as one: `combined` makes a subclass of them."""

    kinds: Sequence[Callable[[], RLlibCallback]]

    def __init__(self) -> None:
        super().__init__()
        self.parts = [kind() for kind in self.kinds]


def combined(
    kinds: Sequence[Callable[[], RLlibCallback]],
    functions: Mapping[str, Sequence[Callable[..., None]]],
) -> type[RLlibCallback]:
    """Returns callbacks that call those of `kinds` in their order, and then `functions` by name.

    RLlib's old API stack takes one class alone. A callback that nobody overrides is not overridden
    here either.
    """

    def calling(name: str) -> Callable[..., None]:
        def call(self: CombinedCallbacks, **arguments: Any) -> None:
            for part in self.parts:
                getattr(part, name)(**arguments)
            for function in functions.get(name, ()):
                function(**arguments)

        return call

    classes = [kind if isinstance(kind, type) else type(kind()) for kind in kinds]
    known = [name for name in dir(RLlibCallback) if name.startswith("on_")]
    names = {n for n in known if n in functions or any(overrides(c, n) for c in classes)}
    members = {name: calling(name) for name in names}
    return type("CombinedCallbacks", (CombinedCallbacks,), {"kinds": tuple(kinds), **members})
