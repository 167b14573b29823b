"""Errors that training raises about its own numbers."""


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity where none may be; the message names where it appeared."""


class EnvironmentFailure(RuntimeError):
    """An environment raised; the message names the environment, the worker and the exception."""
