"""Which observation spaces are flattened, and into which parts."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from qvpo_rllib.core.observation_parts import ObservationParts, Part


def why_unsuited(space: gym.Space[Any]) -> str:
    """Returns why the networks cannot take such observations, and what to do."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        try:
            parts_of(space)
        except ValueError as error:
            return str(error)
    advice = "encode images before training" if is_image(space) else "flatten it"
    return (
        f"the networks take a vector, a one-dimensional Box; {advice} in a wrapper (the option "
        "wrappers)"
    )


def is_image(space: gym.Space[Any]) -> bool:
    """Returns whether a Box has the form of an image: height, width and maybe colours."""
    if not isinstance(space, spaces.Box):
        return False
    return len(space.shape) >= 3 or (len(space.shape) == 2 and space.dtype == np.uint8)


def parts_of(space: gym.Space[Any]) -> ObservationParts:
    """Returns the parts of a Dict or Tuple space, in Gymnasium's order.

    Raises:
        ValueError: a part is an image or of another kind than numbers and choices; it is named.
    """
    parts = ObservationParts(_parts(space, ()))
    if not parts.size:
        raise ValueError("it has no numbers in it")
    return parts


def _parts(space: gym.Space[Any], path: tuple[str, ...]) -> list[Part]:
    match space:
        case spaces.Dict():
            if not all(isinstance(key, str) for key in space.spaces):
                raise ValueError("its keys must be texts")
            children: list[tuple[str, gym.Space[Any]]] = list(space.spaces.items())
        case spaces.Tuple():
            children = [(str(number), child) for number, child in enumerate(space.spaces)]
        case spaces.Discrete():
            return [Part(path=path, choices=(int(space.n),), first=(int(space.start),))]
        case spaces.MultiDiscrete():
            choices = tuple(int(n) for n in space.nvec.reshape(-1))
            first = tuple(int(n) for n in np.asarray(space.start).reshape(-1))
            return [Part(path=path, shape=space.nvec.shape, choices=choices, first=first)]
        case spaces.MultiBinary():
            return [Part(path=path, shape=tuple(space.shape))]
        case spaces.Box() if not is_image(space):
            return [Part(path=path, shape=tuple(space.shape))]
        case _:
            what = "an image" if isinstance(space, spaces.Box) else f"a {type(space).__name__}"
            raise ValueError(
                f"its part {'.'.join(path)!r}, {space}, is {what}, and the networks take a vector "
                "of numbers; encode it in a wrapper (the option wrappers)"
            )
    return [part for key, child in children for part in _parts(child, (*path, key))]
