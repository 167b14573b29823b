"""Saves an environment in mid-episode as bytes and restores it bit for bit.

The state is every attribute of the environment and of its wrappers, including MuJoCo's model and
data and all random generators. (MuJoCo's own `mjSTATE_INTEGRATION` is not enough: Ant's and
Humanoid's next observation differs.) Pickling the environment itself would lose its state:
Gymnasium's `EzPickle` keeps the arguments it was made with and nothing else.

Of a vector environment it is the same, with the sub-environments that it holds in this process.

The state of an environment may be elsewhere, in a simulator behind a handle. A class that has its
own `__getstate__` and `__setstate__` is saved by them; where they raise, it cannot be saved.
"""

import io
import pickle
from typing import Any, TypeAlias

import gymnasium as gym
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from gymnasium.utils import EzPickle
from ray import cloudpickle

from qvpo_rllib.rollout.environments import layers_of

Environment: TypeAlias = gym.Env[Any, Any] | gym.vector.VectorEnv[Any, Any, Any]

# Attributes that say how an environment was made, not where it is.
CONSTANT = ("spec", "_cached_spec", "env_fns")
OTHER_PARTS = "it has other wrappers, or is another environment, than when its state was taken"


class NotCapturableError(Exception):
    """The environment's state cannot be taken; the text says why."""


def capture(env: Environment) -> bytes:
    """Returns the state of an environment and its wrappers. Raises `NotCapturableError`."""
    layers = layers_of(env)
    file = io.BytesIO()
    try:
        states = [(type(layer).__name__, _state_of(layer)) for layer in layers]
        _Pickler(file, layers).dump(states)
    except NotCapturableError:
        raise
    except Exception as error:  # an environment's own code may raise anything
        raise NotCapturableError(f"{type(error).__name__}: {error}") from error
    return file.getvalue()


def restore(env: Environment, state: bytes) -> None:
    """Restores the state that `capture` returned in an environment made in the same way.

    Raises:
        NotCapturableError: the environment was made in another way; reset it then.
    """
    layers = layers_of(env)
    try:
        states = _Unpickler(io.BytesIO(state), layers).load()
        if [name for name, _ in states] != [type(layer).__name__ for layer in layers]:
            raise NotCapturableError(OTHER_PARTS)
        for layer, (_, found) in zip(layers, states, strict=True):
            _set_state(layer, found)
    except NotCapturableError:
        raise
    except Exception as error:
        raise NotCapturableError(f"{type(error).__name__}: {error}") from error


def _has_own_state(layer: Environment) -> bool:
    own = getattr(type(layer), "__getstate__", None)
    return own not in (object.__getstate__, EzPickle.__getstate__)


def _state_of(layer: Environment) -> Any:
    if _has_own_state(layer):
        return layer.__getstate__()
    # Raises for an object whose state is, in part, not in its attributes but in C or C++.
    object.__reduce_ex__(layer, 2)
    return dict(vars(layer))


def _set_state(layer: Environment, state: Any) -> None:
    if _has_own_state(layer):
        layer.__setstate__(state)
        return
    attributes = vars(layer)
    attributes.clear()
    attributes.update(state)
    for value in attributes.values():
        if isinstance(value, MujocoRenderer):
            value.model, value.data = attributes["model"], attributes["data"]


def _kept(layers: list[Environment]) -> dict[tuple[int, str], Any]:
    """Returns what a state leaves out: it stays as it is in the environment that is restored."""
    kept: dict[tuple[int, str], Any] = {(i, ""): layer for i, layer in enumerate(layers)}
    for i, layer in enumerate(layers):
        for name, value in vars(layer).items():
            if isinstance(value, MujocoRenderer) or name in CONSTANT:
                kept[i, name] = value
    return kept


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, layers: list[Environment]) -> None:
        super().__init__(file)
        kept = _kept(layers).items()  # a spec that nobody has asked for yet is None
        self._names = {id(value): name for name, value in kept if value is not None}

    def persistent_id(self, value: Any) -> tuple[int, str] | None:
        name = self._names.get(id(value))
        if name is None and isinstance(value, gym.Env | gym.vector.VectorEnv):
            raise NotCapturableError(f"it holds another environment, {value}")
        return name


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, layers: list[Environment]) -> None:
        super().__init__(file)
        self._kept = _kept(layers)

    def persistent_load(self, name: tuple[int, str]) -> Any:
        if name not in self._kept:
            raise NotCapturableError(OTHER_PARTS)
        return self._kept[name]
