"""Checks of environments before they are stepped, and MuJoCo's warnings."""

import functools
import logging
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from qvpo_rllib.core.action_scale import ActionScale
from qvpo_rllib.rollout.env_batch import EnvBatch
from qvpo_rllib.rollout.families import family_of
from qvpo_rllib.rollout.observation_spaces import why_unsuited

logger = logging.getLogger(__name__)

MAX_EPISODE_STEPS = 10_000  # of an evaluation's episode, where no time limit is declared


def name_of(env: Any) -> str:
    """Returns the name of a configuration's `env`; a class has its path, "module.Class"."""
    return f"{env.__module__}.{env.__qualname__}" if isinstance(env, type) else str(env)


def layers_of(env: Any) -> list[Any]:
    """Returns the environment's wrappers, outermost first, and the environment itself.

    Those of a vector environment are followed by the layers of its sub-environments, if it holds
    them in this process.
    """
    layers = [env.env if isinstance(env, EnvBatch) else env]
    while isinstance(layers[-1], gym.Wrapper | gym.vector.VectorWrapper):
        layers.append(layers[-1].env)
    if isinstance(layers[-1], gym.vector.VectorEnv):
        held = getattr(layers[-1], "envs", None)
        held = held if isinstance(held, list | tuple) else []
        layers += [layer for e in held if isinstance(e, gym.Env) for layer in layers_of(e)]
    return layers


def check_environment(env: gym.Env[Any, Any], name: str) -> None:
    """Checks all that can be seen before the first step; warns if there is no time limit.

    Args:
        name: of the environment, in messages.

    Raises:
        ValueError: its spaces do not suit, or a wrapper changes with the steps that it has seen.
    """
    try:
        check_spaces(env.observation_space, env.action_space)
        _refuse_running_statistics(env)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not has_time_limit(env) and not _ends_itself(env):
        _warn_of_endless_episodes(name)


def has_time_limit(env: gym.Env[Any, Any]) -> bool:
    """Returns whether a wrapper cuts episodes off, or a vector environment's id says that it does.

    Environments may do so without either.
    """
    if isinstance(env, EnvBatch) and env.spec and env.spec.max_episode_steps:
        return True
    return any(isinstance(layer, gym.wrappers.TimeLimit) for layer in layers_of(env))


def _ends_itself(env: gym.Env[Any, Any]) -> bool:
    family = family_of(env.spec.id) if env.spec else None
    return family is not None and family.ends_itself


@functools.cache  # once in a process
def _warn_of_endless_episodes(name: str) -> None:
    logger.warning(
        "%s declares no time limit (max_episode_steps). If it does not end its episodes itself, "
        "training may see no end of one; evaluations cut theirs off after %s steps. Register it "
        "with max_episode_steps, or wrap it in gymnasium.wrappers.TimeLimit.",
        name,
        f"{MAX_EPISODE_STEPS:,}",
    )


RUNNING_STATISTICS_OF_OBSERVATIONS = (
    gym.wrappers.NormalizeObservation,
    gym.wrappers.vector.NormalizeObservation,
)
RUNNING_STATISTICS = (
    *RUNNING_STATISTICS_OF_OBSERVATIONS,
    gym.wrappers.NormalizeReward,
    gym.wrappers.vector.NormalizeReward,
)


def _refuse_running_statistics(env: gym.Env[Any, Any]) -> None:
    """Each environment would have statistics of its own, and checkpoints and bundles none."""
    for layer in layers_of(env):
        if isinstance(layer, RUNNING_STATISTICS) and layer.update_running_mean:
            own = _own_statistics(layer, isinstance(env, EnvBatch))
            is_vector = isinstance(layer, gym.vector.VectorWrapper)
            home = "gymnasium.wrappers.vector" if is_vector else "gymnasium.wrappers"
            raise ValueError(
                f"The wrapper {type(layer).__name__} is not supported: its statistics move with "
                "the steps that it sees, so workers, evaluations and the exported policy would "
                f"each see other observations or rewards. Instead {own}scale by a fixed mean and "
                f"deviation ({home}.TransformObservation or TransformReward, the numbers given by "
                "env_config), or set the wrapper's statistics and update_running_mean=False."
            )


def _own_statistics(wrapper: Any, in_vector: bool) -> str:
    """Returns the option to use instead of the wrapper, if there is one for such environments."""
    if isinstance(wrapper, RUNNING_STATISTICS_OF_OBSERVATIONS):
        return "train with normalize_observations=true, whose statistics are part of the policy, "
    # PPO and SPO take no vector environment.
    return "" if in_vector else "train PPO or SPO with normalize_rewards=true, "


def check_spaces(observation_space: gym.Space, action_space: gym.Space) -> None:
    """Raises `ValueError` unless observations are a vector and actions a bounded vector.

    Dict and Tuple observations have been flattened before (`wrapping`), where they can be.
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
            f"The observation space {observation_space} is not supported: "
            f"{why_unsuited(observation_space)}."
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
