"""The files that say what became of every trial: crash-safe, and readable without Ray.

    trials.json            trial → what sets it apart, status, env steps, starts, error
    results/<trial>.jsonl  one row per evaluation, by the names of a run's `metrics.jsonl`

Ray Tune's own `result.json` is copied to the experiment from time to time: a killed driver may
leave it behind. These are written at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvpo_rllib.files import read_json, write_json
from qvpo_rllib.training import metrics_log
from qvpo_rllib.training.rows import Row

RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped early", "failed"
TRIALS_FILE, RESULTS = "trials.json", "results"

# "name", "directory", "config" (env, seed, swept options), "status", "starts"; once there is a row
# its "env_steps", "time_total_s" and "evaluation/return_mean"; of a failed trial "error".
Entry = dict[str, Any]
OF_AN_ENTRY = {"name": str, "directory": str, "config": dict, "status": str, "starts": list}


def read_trials(directory: Path) -> dict[str, Entry]:
    """Returns trial id → entry, as written to `directory`; empty if none was started."""
    file = directory / TRIALS_FILE
    if not file.exists():
        return {}
    advice = "Restore it, or give another --storage to begin anew."
    entries = ("trials", OF_AN_ENTRY)
    trials: dict[str, Entry] = read_json(file, dict, advice, {"trials": dict}, entries)["trials"]
    return trials


def write_trials(directory: Path, trials: Mapping[str, Entry]) -> None:
    """Replaces the entries of all trials."""
    write_json(directory / TRIALS_FILE, {"trials": trials})


def read_rows(directory: Path, trial: str) -> list[Row]:
    """Returns a trial's rows by rising env steps.

    A trial that went on from a checkpoint after a crash has written some rows twice: the later
    ones count, with all that follow. A line cut short by a crash is left out.
    """
    rows: list[Row] = []
    for row in metrics_log.read_rows(directory / RESULTS / f"{trial}.jsonl", skip_damaged=True):
        while rows and int(rows[-1]["env_steps"] or 0) >= int(row["env_steps"] or 0):
            rows.pop()
        rows.append(row)
    return rows


def append_row(directory: Path, trial: str, row: Row) -> None:
    """Adds a row to those of a trial."""
    metrics_log.append_line(directory / RESULTS / f"{trial}.jsonl", row)


def delete_rows(directory: Path, trial: str) -> None:
    """Deletes the rows of a trial, if it has any."""
    (directory / RESULTS / f"{trial}.jsonl").unlink(missing_ok=True)


def prepare(directory: Path) -> None:
    """Makes `directory` ready for rows; ends lines that a crash cut short."""
    (directory / RESULTS).mkdir(parents=True, exist_ok=True)
    for file in (directory / RESULTS).glob("*.jsonl"):
        if not file.read_bytes().endswith(b"\n"):
            with file.open("ab") as end:
                end.write(b"\n")
