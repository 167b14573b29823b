"""Checks of environments' spaces, and MuJoCo's warnings."""

import logging

import gymnasium as gym
import mujoco
import numpy as np

from qvpo_rllib.core.action_scale import ActionScale

logger = logging.getLogger(__name__)


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
    """Returns the map between [-1, 1] and the environment's box."""
    return ActionScale(action_space.low, action_space.high)


# MuJoCo 4 warns so of every HalfCheetah that it makes, on stderr and in a file MUJOCO_LOG.TXT.
MODEL_FILE_NOTICE = "is deprecated and will be removed"


def filter_warnings() -> None:
    """Logs MuJoCo's warnings, except those about which a user can do nothing."""
    mujoco.set_mju_user_warning(_log)


def _log(message: str) -> None:
    if MODEL_FILE_NOTICE not in message:
        logger.warning("MuJoCo: %s", message)
