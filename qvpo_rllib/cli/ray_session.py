"""The Ray that a command runs on."""

import logging
import os

# Ray replaces 127.0.0.1 by the machine's own address and would listen to the network.
LOOPBACK = "127.0.0.2"


def start_ray(num_processes: int, address: str | None = None) -> None:
    """The cluster at `address` or RAY_ADDRESS, else a Ray of its own on loopback.

    Args:
        num_processes: CPU slots needed at once. On fewer cores processes share them, instead of
            waiting for ever.
    """
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address or os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, **quiet)
        return
    ray.init(
        address="local",
        num_cpus=max(num_cores(), num_processes),
        include_dashboard=False,
        _node_ip_address=LOOPBACK,
        **quiet,
    )


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
