"""`qvpo bench replay`: adding to the columnar ring and sampling from it."""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from qvpo_rllib.bench.sizes import TASKS, Task
from qvpo_rllib.bench.timing import measure, ratio
from qvpo_rllib.core.replay import ReplayBuffer, Transitions

BATCH_SIZE = 256
FRAGMENT = 64  # env steps added at once


def run(
    *, tasks: Sequence[str], capacity: int, device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """Rows "add" (a fragment) and "sample" (a batch on `device`) of a full buffer.

    The straightforward version is a deque of tuples of NumPy arrays that stacks a random sample.
    """
    for name in tasks:
        for operation, numbers in _rows(TASKS[name], capacity, device, repeats).items():
            yield {"task": name, "operation": operation, "capacity": capacity} | numbers


def _rows(
    task: Task, capacity: int, device: torch.device, repeats: int
) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rng = random.Random(0)

    def transitions(count: int) -> Transitions:
        shapes = ((task.obs_dim,), (task.act_dim,), (), (task.obs_dim,), ())
        return Transitions(*(torch.randn(count, *s, generator=generator) for s in shapes))

    ring = ReplayBuffer(capacity, task.obs_dim, task.act_dim, seed=0, device=device)
    plain: deque[tuple[Any, ...]] = deque(maxlen=capacity)

    def add_plainly(new: Transitions) -> None:
        plain.extend(zip(*(column.numpy() for column in new), strict=True))

    while len(ring) < capacity:
        chunk = transitions(min(capacity - len(ring), 10_000))
        ring.add(chunk)
        add_plainly(chunk)
    fragment = transitions(FRAGMENT)

    def sample_plainly() -> list[torch.Tensor]:
        chosen = [plain[rng.randrange(len(plain))] for _ in range(BATCH_SIZE)]
        return [torch.as_tensor(np.stack(c)).to(device) for c in zip(*chosen, strict=True)]

    times = measure(
        {
            "add": lambda: ring.add(fragment),
            "add plainly": lambda: add_plainly(fragment),
            "sample": lambda: ring.sample(BATCH_SIZE),
            "sample plainly": sample_plainly,
        },
        repeats=repeats,
        device=device,
    )
    rows = {}
    for operation, count in (("add", FRAGMENT), ("sample", BATCH_SIZE)):
        ours, other = times[operation], times[f"{operation} plainly"]
        speedup = ratio(other, ours)
        rows[operation] = {
            "transitions": count,
            "call_us": 1e6 * ours.median,
            "call_us_range": [1e6 * t for t in ours.spread],
            "straightforward_us": 1e6 * other.median,
            "speedup": speedup.median,
            "speedup_range": list(speedup.spread),
        }
    return rows
