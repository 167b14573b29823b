"""Whether any transition was taken in twice, and whether the update ledger is exact."""

import math
from collections import OrderedDict
from fractions import Fraction
from typing import Any


class Trace:
    """Watches an algorithm on `environments.Traceable`: every transition that it takes in.

    Args:
        algorithm: one that has not begun.
        keep: transitions to remember, the last ones.
    """

    def __init__(self, algorithm: Any, keep: int = 1_000_000) -> None:
        self.algorithm = algorithm
        self.seen: OrderedDict[int, None] = OrderedDict()
        self.num_taken_in = self.repeated = 0
        add = algorithm.replay.add

        def recording(transitions: Any) -> None:
            for row in transitions.obs.tolist():
                key = hash(tuple(row))
                self.repeated += key in self.seen
                self.seen[key] = None
                self.num_taken_in += 1
                if len(self.seen) > keep:
                    self.seen.popitem(last=False)
            add(transitions)

        algorithm.replay.add = recording

    def check(self) -> None:
        """Raises `AssertionError` if a count is off."""
        ledger, replay = self.algorithm.ledger, self.algorithm.replay
        assert self.repeated == 0
        assert ledger.ingested == self.num_taken_in == replay.num_added
        steps = ledger.ingested - ledger.warmup_steps
        expected = max(0, math.floor(Fraction(repr(ledger.update_ratio)) * steps))
        assert ledger.done == expected == self.algorithm.learner.num_updates
        assert ledger.owed == 0
