"""The Ray that a command runs on."""

import contextlib
import logging
import os
import secrets
from pathlib import Path
from typing import Any

from qvpo_rllib.files import scratch_directory

# Ray replaces 127.0.0.1 by the machine's own address, this one it leaves as it is.
LOOPBACK = "127.0.0.2"

# Ray 2.60's ports are open on all of the machine's addresses unless its node has 127.0.0.1, which
# it allows on Linux too if it is told, when it is imported, that it will never be a cluster.
NO_CLUSTER = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class RayNotStarted(RuntimeError):
    """A command's own Ray did not start in time."""


def keep_private(address: str | None) -> None:
    """Makes a command's own Ray listen on loopback alone and ask for a token of its own.

    It has to come before Ray is imported. A RAY_AUTH_MODE that is set stays as it is.

    Args:
        address: of the cluster that the command joins instead, if it does.
    """
    if not address and not os.environ.get("RAY_ADDRESS"):
        os.environ.update(NO_CLUSTER)
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def start_ray(num_processes: int, address: str | None = None) -> None:
    """The cluster at `address` or RAY_ADDRESS, else a Ray of its own on loopback.

    Args:
        num_processes: CPU slots needed at once. On fewer cores processes share them, instead of
            waiting for ever.
        address: of a running cluster; "auto" is the one that this machine is a node of.

    Raises:
        ValueError: there is no cluster at the address, or it wants another token. None is started
            in its place.
        RayNotStarted: the machine is too busy.
    """
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    _close_token_file()
    if address or os.environ.get("RAY_ADDRESS"):
        _attach(address, quiet)
        return
    try:
        ray.init(
            address="local",
            num_cpus=max(num_cores(), num_processes),
            include_dashboard=False,
            _node_ip_address=_own_address(),
            # Ray leaves its folder behind; the next command deletes it.
            _temp_dir=str(scratch_directory("qvpo-ray-", os.environ.get("RAY_TMPDIR"))),
            **quiet,
        )
    except Exception as error:  # Ray's has no type of its own
        if "timed out during startup" not in str(error):
            raise
        raise RayNotStarted(
            "Ray gave up starting after 30 seconds, as it does where many programs share the "
            f"cores ({num_cores()} here). Nothing is lost: give the command again when fewer run."
        ) from error


def _close_token_file() -> None:
    """Lets nobody else read the user's token, which `ray get-auth-token` leaves open to all."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token")
    with contextlib.suppress(OSError, RuntimeError):  # no file, no home
        path = path.expanduser()
        if path.stat().st_uid == os.getuid():
            path.chmod(0o600)


def _own_address() -> str:
    """127.0.0.1 if Ray allows it; if it was imported before `keep_private`, LOOPBACK."""
    import ray

    own: str = ray.util.get_node_ip_address()
    return own if own == "127.0.0.1" else LOOPBACK


def _attach(address: str | None, options: dict[str, Any]) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(address=address, **options)
    except (ConnectionError, AuthenticationError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        place = repr(address) if address else f"{os.environ['RAY_ADDRESS']!r} (RAY_ADDRESS)"
        alone = "leave --address out" if address else "unset RAY_ADDRESS"
        raise ValueError(
            f"No Ray cluster could be joined at the address {place}: {reason} Run this on a node "
            f"of the cluster, with the cluster's RAY_AUTH_MODE and token; {alone} to start a Ray "
            "on this machine alone."
        ) from error


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
