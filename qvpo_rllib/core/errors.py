"""Errors of training itself, which callers tell apart from others."""


class NonFiniteError(ArithmeticError):
    """A number became NaN or infinite; the message says which one and where."""


class EnvironmentFailure(RuntimeError):
    """An environment raised; the message names the environment, the worker and the exception."""
