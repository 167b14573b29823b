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
    free_steps: int = 0  # env steps after the warm-up that owe nothing (see `settle`)

    @property
    def owed(self) -> int:
        steps = self.ingested - self.warmup_steps - self.free_steps
        return max(0, math.floor(Fraction(repr(self.update_ratio)) * steps) - self.done)

    @property
    def warming_up(self) -> bool:
        lost = self.free_steps if self.done == 0 else 0
        return self.ingested - lost < self.warmup_steps

    def settle(self, *, refill: bool) -> None:
        """From here on as if nothing were owed: the ratio or the warm-up was changed.

        With `refill` the replay was lost too: one warm-up fills it again before updates are owed.
        """
        paid_for = math.ceil(Fraction(self.done) / Fraction(repr(self.update_ratio)))
        self.free_steps = self.ingested - paid_for - (0 if refill else self.warmup_steps)

    def state_dict(self) -> dict[str, int]:
        return {"ingested": self.ingested, "done": self.done, "free_steps": self.free_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.ingested, self.done = state["ingested"], state["done"]
        self.free_steps = state["free_steps"]
