"""The update-to-data ratio, kept as a ledger of env steps taken in and updates done."""

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass
class UpdateLedger:
    """updates owed = floor(ratio · (ingested - warm-up)) - updates done.

    The ratio is exact (0.1 is a tenth, not its binary neighbour), so nothing drifts.
    """

    update_ratio: float
    warmup_steps: int
    ingested: int = 0  # env steps taken into the replay
    done: int = 0  # updates done
    free_steps: int = 0  # env steps after the warm-up that owe nothing (see `refill`)

    @property
    def owed(self) -> int:
        steps = self.ingested - self.warmup_steps - self.free_steps
        return max(0, math.floor(Fraction(repr(self.update_ratio)) * steps) - self.done)

    @property
    def warming_up(self) -> bool:
        return self.ingested < self.warmup_steps

    def refill(self) -> None:
        """The replay was lost: let it fill by one warm-up again before updates are owed."""
        owed_for = Fraction(self.done) / Fraction(repr(self.update_ratio))
        self.free_steps = self.ingested - math.ceil(owed_for)

    def state_dict(self) -> dict[str, int]:
        return {"ingested": self.ingested, "done": self.done, "free_steps": self.free_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.ingested, self.done = state["ingested"], state["done"]
        self.free_steps = state["free_steps"]
