"""Environments as they come: whether they exist, their spaces, MuJoCo's warnings."""

import difflib
import sys

import gymnasium as gym
import mujoco
import numpy as np
from ray.tune.registry import ENV_CREATOR, _global_registry

from qvpo_rllib.core.action_scale import ActionScale


def check_spaces(observation_space: gym.Space, action_space: gym.Space) -> None:
    """Raises `ValueError` unless observations are a vector and actions a bounded vector.

    All algorithms of this package need that, so the messages name none of them.
    """
    if not isinstance(action_space, gym.spaces.Box):
        raise ValueError(
            f"The action space {action_space} is not supported: every algorithm here needs "
            "continuous actions, a one-dimensional Box with finite bounds."
        )
    if action_space.shape is None or len(action_space.shape) != 1 or not action_space.shape[0]:
        raise ValueError(
            f"The action space {action_space} has shape {action_space.shape}, but it must be a "
            "one-dimensional Box; wrap the environment to flatten it "
            "(gymnasium.wrappers.TransformAction)."
        )
    bounded = np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()
    if not bounded or not (action_space.low < action_space.high).all():
        raise ValueError(
            f"The action space {action_space} is unbounded or empty, but actions are scaled from "
            "[-1, 1] to the box, so every bound must be finite and low < high; wrap the "
            "environment with gymnasium.wrappers.RescaleAction or clip it."
        )
    if not np.issubdtype(action_space.dtype, np.floating):
        raise ValueError(
            f"The action space {action_space} has dtype {action_space.dtype}, but actions are "
            "floats."
        )
    if not isinstance(observation_space, gym.spaces.Box) or len(observation_space.shape) != 1:
        raise ValueError(
            f"The observation space {observation_space} is not supported: the networks take a "
            "vector, a one-dimensional Box; flatten dict observations with "
            "gymnasium.wrappers.FlattenObservation and encode images before training."
        )


def action_scale(action_space: gym.spaces.Box) -> ActionScale:
    """The map between [-1, 1] and the environment's box."""
    return ActionScale(action_space.low, action_space.high)


def check_environment_id(env_id: str) -> None:
    """Raises `ValueError` with the nearest names if neither Gymnasium nor Ray knows `env_id`."""
    if _global_registry.contains(ENV_CREATOR, env_id) or env_id in gym.registry:
        return
    if ":" in env_id or "." in env_id:  # "module:Env-v0", or a class path that RLlib imports
        return
    latest = {(spec.namespace, spec.name): spec.id for spec in gym.registry.values()}
    close = difflib.get_close_matches(env_id, latest.values(), n=3, cutoff=0.5)
    suggestion = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"There is no environment {env_id!r}.{suggestion} Allowed are Gymnasium's ids (such as "
        "'Ant-v5'), 'module:Id-v0', and names registered with ray.tune.register_env."
    )


# MuJoCo 4 says this for every HalfCheetah it makes, on stderr and in a file MUJOCO_LOG.TXT.
MODEL_FILE_NOTICE = "is deprecated and will be removed"


def filter_warnings() -> None:
    """Prints MuJoCo's warnings on stderr, without those a user can do nothing about."""
    mujoco.set_mju_user_warning(_show)


def _show(message: str) -> None:
    if MODEL_FILE_NOTICE not in message:
        print(f"MuJoCo: {message}", file=sys.stderr)
