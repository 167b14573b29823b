"""`qvpo bench replay`: adding to the columnar ring and sampling from it."""

import random
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Iterator
from typing import Any

from qvpo_rllib.bench.learner import random_transitions
from qvpo_rllib.bench.options import Row, add_device, add_tasks, positive
from qvpo_rllib.bench.sizes import TASKS, Task

HELP = "adding to the replay and sampling from it"
COLUMNS = {
    "task": "task",
    "operation": "operation",
    "transitions": "transitions",
    "call_us": "µs per call",
    "straightforward_us": "straightforward µs",
    "speedup": "times as fast",
}
BATCH_SIZE = 256
FRAGMENT = 64  # env steps added at once
CHUNK = 10_000  # transitions


def add_arguments(parser: ArgumentParser) -> None:
    add_tasks(parser)
    add_device(parser)
    parser.add_argument("--capacity", type=positive, default=100_000, metavar="N")


def run(options: Namespace) -> Iterator[Row]:
    """Yields rows "add" (a fragment) and "sample" (a batch on the device) of a full buffer.

    The straightforward version is a deque of tuples of NumPy arrays that stacks a random sample.
    """
    for name in options.task:
        for row in _rows(TASKS[name], options.capacity, options.device, options.repeats):
            yield {"task": name, "capacity": options.capacity} | row


def _rows(task: Task, capacity: int, device_name: str, repeats: int) -> Iterator[Row]:
    import numpy as np
    import torch

    from qvpo_rllib.bench.timing import measure, ratio
    from qvpo_rllib.core.replay import ReplayBuffer, Transitions

    device = torch.device(device_name)
    generator = torch.Generator().manual_seed(0)
    rng = random.Random(0)
    ring = ReplayBuffer(capacity, task.obs_dim, task.act_dim, seed=0, device=device)
    plain: deque[tuple[Any, ...]] = deque(maxlen=capacity)

    def add_plainly(new: Transitions) -> None:
        plain.extend(zip(*(column.numpy() for column in new), strict=True))

    def sample_plainly() -> list[torch.Tensor]:
        chosen = [plain[rng.randrange(len(plain))] for _ in range(BATCH_SIZE)]
        return [torch.as_tensor(np.stack(c)).to(device) for c in zip(*chosen, strict=True)]

    while len(ring) < capacity:
        chunk = random_transitions(task, min(capacity - len(ring), CHUNK), generator)
        ring.add(chunk)
        add_plainly(chunk)
    fragment = random_transitions(task, FRAGMENT, generator)
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
    for operation, count in (("add", FRAGMENT), ("sample", BATCH_SIZE)):
        ours, plainly = times[operation], times[f"{operation} plainly"]
        yield {
            "operation": operation,
            "transitions": count,
            **ours.columns("call_us", 1e6),
            "straightforward_us": 1e6 * plainly.median,
            **ratio(plainly, ours).columns("speedup"),
        }
