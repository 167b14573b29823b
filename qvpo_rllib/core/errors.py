"""Errors of training itself, which callers tell apart from others."""


class NonFiniteError(ArithmeticError):
    """A number became NaN or infinite; the message says which one and where."""


class UnusableOutcome(TypeError):
    """An environment returned what its spaces or Gymnasium's API rule out; the message says it."""


class EnvironmentFailure(RuntimeError):
    """An environment raised; the message names the environment, the worker and the exception."""


ENDS_TRAINING = (NonFiniteError, UnusableOutcome)  # a restarted worker would meet it again
