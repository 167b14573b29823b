"""The Ray that a command runs on."""

import logging
import os
from typing import Any

# Ray replaces 127.0.0.1 by the machine's own address and would listen to the network.
LOOPBACK = "127.0.0.2"


def start_ray(num_processes: int, address: str | None = None) -> None:
    """The cluster at `address` or RAY_ADDRESS, else a Ray of its own on loopback.

    Args:
        num_processes: CPU slots needed at once. On fewer cores processes share them, instead of
            waiting for ever.
        address: of a running cluster; "auto" is the one that this machine is a node of.

    Raises:
        ValueError: there is no cluster at the address, or it wants another token. None is started
            in its place.
    """
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address or os.environ.get("RAY_ADDRESS"):
        _attach(address, quiet)
        return
    ray.init(
        address="local",
        num_cpus=max(num_cores(), num_processes),
        include_dashboard=False,
        _node_ip_address=LOOPBACK,
        **quiet,
    )


def _attach(address: str | None, options: dict[str, Any]) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(address=address, **options)
    except (ConnectionError, AuthenticationError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"No Ray cluster could be joined at the address {address or 'in RAY_ADDRESS'!r}: "
            f"{reason} Run this on a node of the cluster, with the cluster's RAY_AUTH_MODE and "
            "token; leave the address out to start a Ray on this machine alone."
        ) from error


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
