"""The files that say what became of every trial: crash-safe, and readable without Ray.

    trials.json            trial → what sets it apart, status, env steps, starts, error
    results/<trial>.jsonl  one row per evaluation, by the names of a run's `metrics.jsonl`

Ray Tune's own `result.json` is copied to the experiment from time to time: a killed driver may
leave it behind. These are written at once.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvpo_rllib.files import write_json
from qvpo_rllib.training.metrics_log import append_line
from qvpo_rllib.training.rows import Row

RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped early", "failed"
TRIALS_FILE, RESULTS = "trials.json", "results"

# "name", "directory", "config" (env, seed, swept options), "status", "starts"; once there is a row
# its "env_steps", "time_total_s" and "evaluation/return_mean"; of a failed trial "error".
Entry = dict[str, Any]


def read_trials(directory: Path) -> dict[str, Entry]:
    """Returns trial id → entry, as written to `directory`; empty if none was started."""
    file = directory / TRIALS_FILE
    if not file.exists():
        return {}
    trials: dict[str, Entry] = json.loads(file.read_text())["trials"]
    return trials


def write_trials(directory: Path, trials: Mapping[str, Entry]) -> None:
    """Replaces the entries of all trials."""
    write_json(directory / TRIALS_FILE, {"trials": trials})


def read_rows(directory: Path, trial: str) -> list[Row]:
    """Returns a trial's rows by rising env steps.

    A trial that went on from a checkpoint after a crash has written some rows twice: the later
    ones count, with all that follow. A line cut short by a crash is left out.
    """
    file = directory / RESULTS / f"{trial}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows: list[Row] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        while rows and int(rows[-1]["env_steps"] or 0) >= row["env_steps"]:
            rows.pop()
        rows.append(row)
    return rows


def append_row(directory: Path, trial: str, row: Row) -> None:
    """Adds a row to those of a trial."""
    append_line(directory / RESULTS / f"{trial}.jsonl", row)


def prepare(directory: Path) -> None:
    """Makes `directory` ready for rows; ends lines that a crash cut short."""
    (directory / RESULTS).mkdir(parents=True, exist_ok=True)
    for file in (directory / RESULTS).glob("*.jsonl"):
        if not file.read_bytes().endswith(b"\n"):
            with file.open("ab") as end:
                end.write(b"\n")
