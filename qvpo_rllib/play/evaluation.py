"""Evaluating a policy, without a cluster: the code behind `qvpo evaluate`."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from qvpo_rllib.core.action_scale import ActionScale
from qvpo_rllib.core.options import require_at_least
from qvpo_rllib.core.seeding import Stream, episode_seeds, spawn_seed
from qvpo_rllib.play.trained_policy import TrainedPolicy
from qvpo_rllib.rollout.episodes import Episode, Hooks, run_episodes
from qvpo_rllib.serving.client import Client, ServerError
from qvpo_rllib.training.plan import check_environment

MAX_ENVS = 10


@dataclass(frozen=True)
class Evaluation:
    """The episodes of one evaluation; `k` is None for a policy that draws one action."""

    env: str
    k: int | None
    seed: int
    checkpoint: str
    episodes: list[Episode]

    @property
    def how(self) -> str:
        """How it acted, in words."""
        return "one action" if self.k is None else f"best of K = {self.k} actions"

    @property
    def mean(self) -> float:
        return float(np.mean([e.episode_return for e in self.episodes]))

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return float(np.std([e.episode_return for e in self.episodes]))

    def to_dict(self) -> dict[str, Any]:
        return {
            "env": self.env,
            "checkpoint": self.checkpoint,
            "k": self.k,
            "seed": self.seed,
            "episodes": len(self.episodes),
            "return_mean": self.mean,
            "return_std": self.std,
            "returns": [e.episode_return for e in self.episodes],
            "lengths": [e.length for e in self.episodes],
        }


def evaluate_checkpoint(
    path: Path,
    *,
    episodes: int = 10,
    k: int | None = None,
    seed: int = 0,
    record: Callable[[gym.Env[Any, Any], str], Hooks] | None = None,
) -> Evaluation:
    """Plays whole episodes with the best of k actions, scaled as in training.

    Loading a checkpoint unpickles it, which runs code: load only your own. A bundle runs none.

    Args:
        path: a checkpoint, a run directory or a bundle.
        k: actions drawn per state; the policy's `k_eval` if None. A policy that draws one takes
            none.
        seed: of environments and diffusion noise.
        record: given the environment, which then renders ("rgb_array"), and its id, returns what
            watches it. The episodes are then played one after the other.

    Raises:
        ValueError: nothing to evaluate there, of another format, or its environment is missing.
    """
    _check(episodes, k, seed)
    policy = TrainedPolicy.load(path)

    def act(obs: NDArray[np.float32], step_seed: int) -> NDArray[np.floating]:
        return policy.act(obs, k, torch.Generator().manual_seed(step_seed))

    shapes = (policy.obs_dim, policy.scale.low.tolist(), policy.scale.high.tolist())
    episodes_played = _play(policy.env, policy.env_config, shapes, act, episodes, seed, record)
    k = policy.k if k is None else k
    return Evaluation(policy.env, k, seed, str(policy.source), episodes_played)


def evaluate_server(
    url: str,
    model: str,
    env: str | None = None,
    *,
    episodes: int = 10,
    k: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """As `evaluate_checkpoint`, with every action asked of a server (`qvpo serve`).

    The returns are those of a local evaluation with the same seed, to the last bit if both machines
    multiply matrices alike.

    Args:
        model: name or name@version.
        env: environment; the model's own if None.

    Raises:
        ValueError: no server or no such model, or the environment is missing or does not fit.
    """
    _check(episodes, k, seed)
    with Client(url) as client:
        try:
            models = {f"{m['name']}@{m['version']}": m for m in client.models()}
            defaults = {m["name"]: m for m in models.values() if m["default"]}
            found = (defaults | models).get(model)
            if found is None:
                raise ValueError(
                    f"{url} serves no model {model!r}; it serves "
                    f"{', '.join(sorted(defaults | models))}."
                )
            # One version to the end, whatever is replaced meanwhile.
            pinned = f"{found['name']}@{found['version']}"
            env = env or found["env"]
            episodes_played = _play(
                env,
                found["env_config"] if env == found["env"] else {},
                (found["obs_dim"], found["act_low"], found["act_high"]),
                lambda obs, step_seed: client.act(pinned, obs, k, step_seed),
                episodes,
                seed,
            )
        except (OSError, ServerError) as error:
            raise ValueError(
                f"The server {url} cannot be used: {error}. Is qvpo serve running there?"
            ) from error
    source = f"{url}/v1/models/{pinned}"
    return Evaluation(env, found["k_eval"] if k is None else k, seed, source, episodes_played)


class _InBox(ActionScale):
    """For actions that are in the environment's box already."""

    def to_env(self, action: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.asarray(action, self.dtype)


def _check(episodes: int, k: int | None, seed: int) -> None:
    for name, value, least in (("episodes", episodes, 1), ("k", k, 1), ("seed", seed, 0)):
        require_at_least(f"--{name}", value, least)


def _play(
    env_id: str,
    env_config: dict[str, Any],
    shapes: tuple[int, list[float], list[float]],
    act: Callable[[NDArray[np.float32], int], NDArray[np.floating]],
    episodes: int,
    seed: int,
    record: Callable[[gym.Env[Any, Any], str], Hooks] | None = None,
) -> list[Episode]:
    """Episodes with `act(observations, seed of this step's noise)`, actions in the box."""
    check_environment(env_id, env_config)
    rendering = {} if record is None else {"render_mode": "rgb_array"}
    make = functools.partial(gym.make, env_id, **env_config | rendering)
    envs = [make() for _ in range(min(episodes, MAX_ENVS if record is None else 1))]
    step_number = itertools.count()
    try:
        space = envs[0].action_space
        found = (envs[0].observation_space.shape[0], space.low.tolist(), space.high.tolist())
        if found != shapes:
            raise ValueError(
                f"{env_id} has observation size and action bounds {found} here, but the policy was "
                f"trained on {shapes}."
            )
        return run_episodes(
            envs,
            lambda obs: (
                act(obs, spawn_seed(seed, Stream.EVALUATION, 0, 1, next(step_number))),
                None,
            ),
            _InBox(space.low, space.high),
            episode_seeds(seed, 0, episodes),
            env_id,
            record(envs[0], env_id) if record is not None else None,
        )
    finally:
        for env in envs:
            env.close()
