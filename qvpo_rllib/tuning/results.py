"""Reading what a `TrialLedger` wrote; needs no Ray."""

import json
from pathlib import Path
from typing import Any

RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped early", "failed"
TRIALS_FILE, RESULTS = "trials.json", "results"


def read_trials(directory: Path) -> dict[str, dict[str, Any]]:
    """Trial id → its entry in the ledger of `directory`; empty if none was started."""
    file = directory / TRIALS_FILE
    if not file.exists():
        return {}
    trials: dict[str, dict[str, Any]] = json.loads(file.read_text())["trials"]
    return trials


def read_rows(directory: Path, trial: str) -> list[dict[str, Any]]:
    """A trial's rows by rising env steps.

    A trial that went on from a checkpoint after a crash has written some rows twice: the later
    ones count, with all that follow. A line cut short by a crash is left out.
    """
    file = directory / RESULTS / f"{trial}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        while rows and rows[-1]["env_steps"] >= row["env_steps"]:
            rows.pop()
        rows.append(row)
    return rows
