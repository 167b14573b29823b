"""Checks of what was given on a command line."""


def require_at_least(option: str, value: int | None, least: int) -> None:
    """Raises `ValueError` that names `option` ("--k") if `value` is given and below `least`."""
    if value is not None and value < least:
        raise ValueError(f"{option} {value} is not allowed: it must be {least} or more.")
