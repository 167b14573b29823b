"""How results were obtained: commands, machines, versions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvpo_rllib.report.tables import Table

RECORDS = ("experiment.json", "run.json")
VERSIONS = ("qvpo_rllib", "torch", "ray", "mujoco")


def provenance_table(paths: Sequence[Path]) -> Table | None:
    """One row per start of an experiment or run; None if none was recorded."""
    rows = [
        (
            path.name,
            " ".join(start["command"]) or "–",
            start["started_at"],
            f"{start['cpu_count']} CPUs, {start['gpu'] or 'no GPU'}, {start['platform']}",
            ", ".join(f"{n} {start['versions'].get(n) or '?'}" for n in VERSIONS),
        )
        for path in paths
        for start in _starts(path)
    ]
    if not rows:
        return None
    return Table(
        "How these results were obtained",
        "Every start, the resumed ones too. Machine: the one the command ran on; with --address, "
        "trials ran on the cluster's.",
        ("results", "command", "started (UTC)", "machine", "versions"),
        rows,
    )


def _starts(path: Path) -> list[dict[str, Any]]:
    for name in RECORDS:
        if (path / name).is_file():
            starts: list[dict[str, Any]] = json.loads((path / name).read_text())["starts"]
            return starts
    return []
