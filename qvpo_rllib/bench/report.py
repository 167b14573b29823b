"""Benchmark rows as a table for people or JSON for machines."""

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device) -> dict[str, Any]:
    """What ran the benchmark."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def print_table(rows: Iterable[dict[str, Any]], columns: dict[str, str]) -> None:
    """A line per row as soon as it is there. `columns`: name of the value → heading."""
    widths = {name: max(len(heading), 10) for name, heading in columns.items()}
    print("  ".join(h.rjust(widths[n]) for n, h in columns.items()))
    for row in rows:
        cells = (_cell(row, name).rjust(widths[name]) for name in columns)
        print("  ".join(cells), flush=True)


def print_json(rows: Iterable[dict[str, Any]], device: torch.device) -> None:
    print(json.dumps({"machine": machine(device), "rows": list(rows)}, indent=2))


def _cell(row: dict[str, Any], name: str) -> str:
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


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
