"""Evaluating a policy, without a cluster: the code behind `qvpo evaluate`."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.env.env_context import EnvContext

from qvpo_rllib.core.action_scale import ActionScale
from qvpo_rllib.core.env_config import decode_env_config
from qvpo_rllib.core.observation_parts import ObservationParts
from qvpo_rllib.core.options import require_at_least
from qvpo_rllib.core.seeding import Stream, episode_seeds, spawn_seed
from qvpo_rllib.play.trained_policy import TrainedPolicy, is_bundle
from qvpo_rllib.rollout.env_batch import EnvBatch
from qvpo_rllib.rollout.episodes import Episode, Hooks, run_episodes
from qvpo_rllib.rollout.wrapping import observation_parts
from qvpo_rllib.runtime.ray_private import environment_maker
from qvpo_rllib.serving.client import Client, ServerError
from qvpo_rllib.serving.description import unsaid
from qvpo_rllib.training.plan import check_environment

MAX_ENVS = 10

# An environment that renders ("rgb_array") and its id → what watches it.
Record = Callable[[gym.Env[Any, Any], str], Hooks]


@dataclass(frozen=True)
class Evaluation:
    """The episodes of one evaluation; `k` is None for a policy that draws one action."""

    env: str
    k: int | None
    seed: int
    checkpoint: str
    episodes: list[Episode]

    @property
    def returns(self) -> list[float]:
        return [episode.episode_return for episode in self.episodes]

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """The returns' population standard deviation."""
        return float(np.std(self.returns))

    @property
    def how(self) -> str:
        """How the policy acted, in words."""
        return "one action" if self.k is None else f"best of K = {self.k} actions"

    def to_dict(self) -> dict[str, Any]:
        """Returns what `qvpo evaluate --json` prints."""
        return {
            "env": self.env,
            "checkpoint": self.checkpoint,
            "k": self.k,
            "seed": self.seed,
            "episodes": len(self.episodes),
            "return_mean": self.mean,
            "return_std": self.std,
            "returns": self.returns,
            "lengths": [episode.length for episode in self.episodes],
        }


def evaluate_checkpoint(
    path: Path,
    *,
    episodes: int = 10,
    k: int | None = None,
    seed: int = 0,
    modules: Sequence[str] = (),
    record: Record | None = None,
) -> Evaluation:
    """Plays whole episodes with the best of k actions, scaled as in training.

    Loading a checkpoint unpickles it, which runs code: load only your own. A bundle runs none.

    Args:
        path: a checkpoint, a run directory or a bundle.
        k: actions drawn per state; the policy's `k_eval` if None. A policy that draws one takes
            none.
        seed: of environments and diffusion noise.
        modules: of the environment and its wrappers, which a bundle alone is not believed:
            importing them runs code.
        record: what watches the episodes, which are then played one after the other.

    Raises:
        ValueError: nothing to evaluate there, of another format, or its environment is missing.
    """
    _check(episodes, k, seed)
    policy = TrainedPolicy.load(path)
    if is_bundle(policy.source):
        _check_modules(policy.env, policy.wrappers, modules)
    played = _play(
        Task(
            policy.env,
            policy.env_config,
            policy.frame_skip,
            policy.wrappers,
            policy.parts,
            policy.takes_vectors,
        ),
        (policy.obs_dim, policy.scale.low.tolist(), policy.scale.high.tolist()),
        lambda obs, noise_seed: policy.act(obs, k, torch.Generator().manual_seed(noise_seed)),
        episodes,
        seed,
        record,
    )
    k = policy.k if k is None else k
    return Evaluation(policy.env, k, seed, str(policy.source), played)


def evaluate_server(
    url: str,
    model: str,
    env: str | None = None,
    *,
    episodes: int = 10,
    k: int | None = None,
    seed: int = 0,
    modules: Sequence[str] = (),
) -> Evaluation:
    """Plays as `evaluate_checkpoint` does, with every action asked of a server (`qvpo serve`).

    The returns are those of a local evaluation with the same seed, to the last bit if both machines
    multiply matrices alike.

    Args:
        model: name or name@version.
        env: environment; the model's own if None.
        modules: of the model's own environment and wrappers, which the server alone is not
            believed.

    Raises:
        ValueError: no server or no such model, or the environment is missing or does not fit.
    """
    _check(episodes, k, seed)
    with Client(url) as client:
        try:
            models = {f"{m['name']}@{m['version']}": m for m in client.models()}
            models |= {m["name"]: m for m in models.values() if m["default"]}
            found = models.get(model)
            if found is None:
                raise ValueError(
                    f"{url} serves no model {model!r}; it serves {', '.join(sorted(models))}."
                )
            found = {**unsaid(), **found}  # a server of an earlier version leaves more out
            # One version to the end, whatever is replaced meanwhile.
            pinned = f"{found['name']}@{found['version']}"
            wrappers, parts = tuple(found["wrappers"]), found["obs_parts"]
            _check_modules(found["env"] if env is None else "", wrappers, modules)
            env = env or found["env"]
            env_config = decode_env_config(found["env_config"]) if env == found["env"] else {}
            played = _play(
                Task(
                    env,
                    env_config,
                    found["frame_skip"],
                    wrappers,
                    None if parts is None else ObservationParts.from_json(parts),
                ),
                (found["obs_dim"], found["act_low"], found["act_high"]),
                lambda obs, noise_seed: client.act(pinned, obs, k, noise_seed),
                episodes,
                seed,
            )
        except (OSError, ServerError) as error:
            raise ValueError(
                f"The server {url} cannot be used: {error}. Is qvpo serve running there?"
            ) from error
    k = found["k_eval"] if k is None else k
    return Evaluation(env, k, seed, f"{url}/v1/models/{pinned}", played)


def _check_modules(env: str, wrappers: Sequence[str], modules: Sequence[str]) -> None:
    """Raises `ValueError` unless the user named all modules that a policy's words would import."""
    # Of "module.Class" too; an id such as "Hopper-v5" has no dot.
    named = env.rpartition(":" if ":" in env else ".")[0]
    wanted = {
        module for module in (named, *(path.partition(":")[0] for path in wrappers)) if module
    }
    missing = sorted(wanted - set(modules))
    if missing:
        raise ValueError(
            f"The policy names the environment {env!r} with the wrappers {list(wrappers)}, for "
            f"which {', '.join(map(repr, missing))} would be imported: that runs the code that is "
            "in it. If it is your own or you trust it, give "
            f"{' '.join(f'--import {module}' for module in missing)}."
        )


def _check(episodes: int, k: int | None, seed: int) -> None:
    for name, value, least in (("episodes", episodes, 1), ("k", k, 1), ("seed", seed, 0)):
        require_at_least(f"--{name}", value, least)


class _InBox(ActionScale):
    """Leaves actions as they are, but for their dtype: they are in the environment's box."""

    def to_env(self, action: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.asarray(action, self.dtype)


def _listed(parts: ObservationParts | None) -> str:
    if parts is None:
        return "none"
    return ", ".join(f"{part.name}: {part.width}" for part in parts.parts)


class Task(NamedTuple):
    """What a policy plays, and the parts that it needs of a Dict or Tuple observation.

    Of an id that makes both kinds it plays the vector environment if it `takes_vectors`.
    """

    env: str
    env_config: dict[str, Any]
    frame_skip: int
    wrappers: tuple[str, ...]
    parts: ObservationParts | None
    takes_vectors: bool = True


def _play(
    task: Task,
    shapes: tuple[int, list[float], list[float]],
    act: Callable[[NDArray[np.float32], int], NDArray[np.floating]],
    episodes: int,
    seed: int,
    record: Record | None = None,
) -> list[Episode]:
    """Returns whole episodes, one for each of the seeds that `seed` stands for.

    Args:
        shapes: observation size and lower and upper action bounds that the policy needs.
        act: called with observations [B, O] and the seed of this step's noise; gives actions
            [B, A] in the box.
    """
    env_id, env_config, frame_skip, wrappers, parts, takes_vectors = task
    check_environment(env_id, env_config, frame_skip, wrappers)
    rendering = {} if record is None else {"render_mode": "rgb_array"}
    number = min(episodes, MAX_ENVS if record is None else 1)
    num_envs = number if takes_vectors and record is None else None
    make = environment_maker(env_id, frame_skip, wrappers, num_envs=num_envs)
    context = EnvContext(env_config | rendering, worker_index=0)
    first = make(context)
    envs = [first]
    step_number = itertools.count()
    try:
        if isinstance(first, EnvBatch) and record is not None:
            raise ValueError(
                f"{env_id} cannot be recorded: it is a vector environment, which has no picture of "
                "one episode. qvpo evaluate plays it."
            )
        if not isinstance(first, EnvBatch):
            envs += [make(context) for _ in range(number - 1)]
        space = first.action_space
        found = (first.observation_space.shape[0], space.low.tolist(), space.high.tolist())
        if found != shapes:
            raise ValueError(
                f"{env_id} has observation size and action bounds {found} here, but the policy was "
                f"trained on {shapes}."
            )

        parts_here = observation_parts(envs[0])
        if _listed(parts_here) != _listed(parts):
            raise ValueError(
                f"{env_id} has the observation parts {_listed(parts_here)} here, but the policy "
                f"was trained on {_listed(parts)}."
            )

        def act_and_count(obs: NDArray[np.float32]) -> tuple[NDArray[np.floating], None]:
            noise_seed = spawn_seed(seed, Stream.EVALUATION, 0, 1, next(step_number))
            return act(obs, noise_seed), None

        return run_episodes(
            first if isinstance(first, EnvBatch) else envs,
            act_and_count,
            _InBox(space.low, space.high),
            episode_seeds(seed, 0, episodes),
            env_id,
            record(first, env_id) if record is not None else None,
        )
    finally:
        for env in envs:
            env.close()
