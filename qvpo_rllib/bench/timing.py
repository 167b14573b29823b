"""Timing alternatives side by side, so that a noisy machine disturbs them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from qvpo_rllib.bench.options import Row
from qvpo_rllib.core.engine import matmul_precision
from qvpo_rllib.core.kernels import linear

# A measured call lasts at least this long, so that the clock's resolution does not matter.
MIN_CALL_S = 0.01
MATRIX_WIDTH = 256
MATRIX_ROWS = {"cpu": 1024, "cuda": 16_384}


class Times(NamedTuple):
    """Seconds per call, or a ratio or a rate of such, one entry per round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest."""
        return min(self.rounds), max(self.rounds)

    def columns(self, name: str, scale: float = 1.0) -> Row:
        """Returns the median as `name` and the spread as `name`_range, times `scale`."""
        return {name: scale * self.median, f"{name}_range": [scale * t for t in self.spread]}


def ratio(slow: Times, fast: Times) -> Times:
    """Returns `slow` over `fast`, round by round."""
    return Times([s / f for s, f in zip(slow.rounds, fast.rounds, strict=True)])


def compare(
    name: str,
    call: Callable[[], object],
    straightforward: Callable[[], object],
    flops: int,
    *,
    repeats: int,
    device: torch.device,
    per_call: int = 1,
    precision: str = "fp32",
) -> Row:
    """Returns what `call` and a straightforward version of the same take, as columns of a row.

    `name`_ms and straightforward_ms are milliseconds, speedup the straightforward version's time
    over the call's, and matmul_bound the share of the call's time that its `flops` would take at
    the rate of this machine's own matrix product.

    Args:
        per_call: how often `call` does what the straightforward version does once.
        precision: of the matrix product that is the yardstick.
    """
    product, product_flops = matrix_product(device, precision)
    times = measure(
        {"call": call, "straightforward": straightforward, "product": product},
        repeats=repeats,
        device=device,
    )
    times["call"] = Times([t / per_call for t in times["call"].rounds])
    bound = ratio(times["product"], times["call"])
    return {
        **times["call"].columns(f"{name}_ms", 1e3),
        "straightforward_ms": 1e3 * times["straightforward"].median,
        **ratio(times["straightforward"], times["call"]).columns("speedup"),
        "matmul_gflop_per_s": product_flops / times["product"].median / 1e9,
        "gflop": flops / 1e9,
        **bound.columns("matmul_bound", flops / product_flops),
    }


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


def matrix_product(
    device: torch.device, precision: str = "fp32"
) -> tuple[Callable[[], object], int]:
    """Returns a call of a matrix product of the size of a chunk's hidden layer, and its FLOPs.

    It is the faster of PyTorch's product and the package's `linear`, so that a slow library does
    not make the yardstick easy to reach.
    """
    rows = MATRIX_ROWS[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.randn(rows, MATRIX_WIDTH, device=device, dtype=dtype)
    weight = torch.randn(MATRIX_WIDTH, MATRIX_WIDTH, device=device, dtype=dtype)
    out = torch.empty(rows, MATRIX_WIDTH, device=device, dtype=dtype)

    def multiply() -> object:
        with matmul_precision(precision, device):
            return torch.mm(x, weight, out=out)

    candidates: Sequence[Callable[[], object]] = (multiply, lambda: linear(x, weight))
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
