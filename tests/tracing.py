"""Whether any transition was taken in twice, and whether the update ledger is exact."""

import math
from fractions import Fraction
from typing import Any


class Trace:
    """Watches an algorithm on `environments.Traceable`: every transition that it takes in.

    The steps of an episode arrive in order, so the last one of each says whether one comes again.
    """

    def __init__(self, algorithm: Any) -> None:
        self.algorithm = algorithm
        self.last_step: dict[tuple[float, float], float] = {}
        self.num_taken_in = self.repeated = 0
        add = algorithm.replay.add

        def recording(transitions: Any, steps: Any = None) -> None:
            for high, low, step in transitions.obs.tolist():
                self.repeated += step <= self.last_step.get((high, low), -1)
                self.last_step[high, low] = step
                self.num_taken_in += 1
            add(transitions, steps)

        algorithm.replay.add = recording

    def check(self) -> None:
        """Raises `AssertionError` if a count is off."""
        ledger = self.algorithm.ledger
        assert self.repeated == 0
        assert ledger.ingested == self.num_taken_in == self.algorithm.replay.num_added
        steps = ledger.ingested - ledger.warmup_steps
        expected = max(0, math.floor(Fraction(repr(ledger.update_ratio)) * steps))
        assert ledger.done == expected == self.algorithm.learner.num_updates
        assert ledger.owed == 0
