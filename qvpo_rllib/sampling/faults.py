"""What went wrong while sampling, and what it cost: result keys `faults/…`."""

from dataclasses import asdict, dataclass


@dataclass
class Faults:
    """Counts since the algorithm was built.

    A lost fragment was asked for and never taken in, so `env_steps_lost` is at most what the
    environments really did in vain.
    """

    workers_lost: int = 0  # processes that died, or whose node did
    env_errors: int = 0  # exceptions of an environment
    timeouts: int = 0  # answers that took longer than `sample_timeout_s`
    restarts: int = 0  # workers that came back
    fragments_lost: int = 0
    env_steps_lost: int = 0
    fragments_stale: int = 0  # dropped because of `max_staleness`
    env_steps_stale: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)
