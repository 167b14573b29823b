"""Errors of training itself, which callers tell apart from others."""

import traceback
from pathlib import Path


class NonFiniteError(ArithmeticError):
    """A number became NaN or infinite; the message says which one and where."""


class UnusableOutcome(TypeError):
    """An environment returned what its spaces or Gymnasium's API rule out; the message says it."""


class EnvironmentFailure(RuntimeError):
    """An environment raised; the message names the environment, the worker and the exception."""


# What an environment's code may raise: a viewer whose window is closed may exit.
RAISED_BY_ENVIRONMENT = (Exception, SystemExit)


def described(error: BaseException) -> str:
    """Returns an error of somebody else's code with its place: "KeyError: 'ip' [robot.py:12]"."""
    text, frames = f"{type(error).__name__}: {error}", traceback.extract_tb(error.__traceback__)
    return f"{text} [{Path(frames[-1].filename).name}:{frames[-1].lineno}]" if frames else text


ENDS_TRAINING = (NonFiniteError, UnusableOutcome)  # a restarted worker would meet it again
