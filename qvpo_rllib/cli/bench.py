"""`qvpo bench PART`: adds the options of every part, runs one and prints its rows."""

import json
import os
import platform
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qvpo_rllib.bench import act, learner, peers, replay, rivals, rollout, runtime, serve, snapshot
from qvpo_rllib.bench.options import Row

PARTS = {
    "learner": learner,
    "act": act,
    "replay": replay,
    "snapshot": snapshot,
    "rollout": rollout,
    "runtime": runtime,
    "rivals": rivals,
    "peers": peers,
}


def add(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="time the parts on this machine: updates, acting, replay, rollouts, server",
        description="Time the parts on this machine, side by side with a straightforward "
        "implementation of the same. Figures are medians over rounds that visit both in turn, with "
        "the smallest and the largest round in brackets. The matrix-product bound is the share of "
        "the time that the needed products alone would take at this machine's own rate.",
        allow_abbrev=False,
    )
    parts = bench.add_subparsers(dest="part", required=True, metavar="PART")
    for name, part in PARTS.items():
        parser = parts.add_parser(name, help=part.HELP, allow_abbrev=False)
        parser.set_defaults(run=_bench, device="cpu", threads=1)
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        part.add_arguments(parser)
    serve.add(parts)


def _bench(options: Namespace) -> int:
    part = PARTS[options.part]
    about = _prepare(options)
    if options.json:
        print(json.dumps({"machine": about, "rows": list(part.run(options))}, indent=2))
        return 0
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    _print_table(part.run(options), part.COLUMNS)
    return 0


def _prepare(options: Namespace) -> dict[str, str | int]:
    """Sets the number of PyTorch's threads; returns what the benchmark will run on.

    Raises:
        ValueError: the device does not exist, or not here.
    """
    import torch

    if options.device not in ("cpu", "cuda"):
        raise ValueError(f"--device {options.device!r} does not exist: use cpu or cuda.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda: PyTorch {torch.__version__} finds no CUDA device here. Use --device "
            "cpu, or a machine and a PyTorch build with CUDA."
        )
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _print_table(rows: Iterable[Row], columns: Mapping[str, str]) -> None:
    """Prints a line per row as soon as it is there. `columns`: key of the value → heading."""
    widths = {name: max(len(heading), 10) for name, heading in columns.items()}
    print("  ".join(heading.rjust(widths[name]) for name, heading in columns.items()))
    for row in rows:
        cells = (_cell(row, name).rjust(widths[name]) for name in columns)
        print("  ".join(cells), flush=True)


def _cell(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, float):
        return str(value)
    text = _number(value)
    if f"{name}_range" in row:
        low, high = row[f"{name}_range"]
        text += f" ({_number(low)}-{_number(high)})"
    return text


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
