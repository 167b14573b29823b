"""Timing alternatives side by side, so that a noisy machine disturbs them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from qvpo_rllib.core.kernels import linear

# A measured call lasts at least this long, so that the clock's resolution does not matter.
MIN_CALL_S = 0.01
MATRIX_WIDTH = 256
MATRIX_ROWS = {"cpu": 1024, "cuda": 16_384}


class Times(NamedTuple):
    """Seconds per call, one entry per round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest."""
        return min(self.rounds), max(self.rounds)


def ratio(slow: Times, fast: Times) -> Times:
    """`slow` over `fast`, round by round."""
    return Times([s / f for s, f in zip(slow.rounds, fast.rounds, strict=True)])


def measure(
    calls: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device
) -> dict[str, Times]:
    """Times each call in `repeats` rounds that visit all of them in turn, after a warm-up."""
    numbers = {name: _calls_per_measurement(call, device) for name, call in calls.items()}
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            rounds[name].append(_seconds(call, numbers[name], device) / numbers[name])
    return {name: Times(values) for name, values in rounds.items()}


def matrix_product(device: torch.device) -> tuple[Callable[[], object], int]:
    """This machine's own matrix product, at the size of a chunk's hidden layer, and its FLOPs.

    The faster of PyTorch's product and the package's `linear`: the yardstick is not to be flattered
    by a slow library.
    """
    rows = MATRIX_ROWS[device.type]
    x = torch.randn(rows, MATRIX_WIDTH, device=device)
    weight = torch.randn(MATRIX_WIDTH, MATRIX_WIDTH, device=device)
    out = torch.empty(rows, MATRIX_WIDTH, device=device)
    candidates: Sequence[Callable[[], object]] = (
        lambda: torch.mm(x, weight, out=out),
        lambda: linear(x, weight),
    )
    with torch.no_grad():
        fastest = min(
            candidates, key=lambda call: min(_seconds(call, 20, device) for _ in range(3))
        )
    return fastest, 2 * rows * MATRIX_WIDTH * MATRIX_WIDTH


def _calls_per_measurement(call: Callable[[], object], device: torch.device) -> int:
    for _ in range(2):  # the first call may compile
        call()
    return max(1, round(MIN_CALL_S / _seconds(call, 1, device)))


def _seconds(call: Callable[[], object], times: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
