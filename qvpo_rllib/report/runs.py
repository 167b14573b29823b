"""Runs and their evaluations, from results of `qvpo tune` and run directories of `qvpo train`.

Needs no Ray: a report can be made anywhere.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvpo_rllib.algorithms import entry_of
from qvpo_rllib.core.hyperparameters import QVPOHyperparameters
from qvpo_rllib.training.metrics_log import MetricsLog
from qvpo_rllib.tuning.results import FAILED, FINISHED, STOPPED, read_rows, read_trials

MISSING, UNFINISHED = "not started", "unfinished"
POPULATION = "population"
RETURN = "evaluation/return_mean"
SYMBOLS = {f.name: f.metadata["symbol"] for f in dataclasses.fields(QVPOHyperparameters)}
# A train run's options that say nothing about its setting.
NOT_A_SETTING = ("entropy_decay_steps", "lr_decay_steps")


@dataclass(frozen=True)
class Run:
    """One seed of one setting.

    Attributes:
        experiment: name of the experiment, or of the preset of a `qvpo train` run.
        stage: "search", "confirm", "population" or "train".
        setting: the options that set it apart within its experiment.
        status: finished, stopped early (by the search), unfinished, failed, or not started.
        planned_steps: env steps of a whole run.
        rows: its evaluations by rising env steps, named as in `metrics.jsonl`.
        error: the last line of a failed run's error.
        directory: of a `qvpo train` run or of a trial.
    """

    experiment: str
    stage: str
    algorithm: str
    task: str
    setting: dict[str, Any]
    seed: int
    status: str
    planned_steps: int
    rows: list[dict[str, Any]]
    error: str = ""
    directory: str = ""

    @property
    def env_steps(self) -> int:
        return int(self.rows[-1]["env_steps"]) if self.rows else 0

    @property
    def returns(self) -> list[float]:
        return [float(row[RETURN]) for row in self.rows]

    @property
    def label(self) -> str:
        """The setting in symbols, such as "K_b=4, K_t=2"."""
        return setting_label(self.setting) or self.algorithm


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """All runs in `paths`. Raises `ValueError` for a path that holds neither kind."""
    runs: list[Run] = []
    trained: list[tuple[Path, dict[str, Any]]] = []
    for path in paths:
        if (path / "experiment.json").is_file():
            runs += _tune_runs(path)
        elif (path / "config.json").is_file() and _metrics_of(path):
            trained.append((path, _read(path / "config.json")))
        else:
            raise ValueError(
                f"{str(path)!r} holds no results: it has neither experiment.json (qvpo tune) nor "
                "config.json with metrics (qvpo train). Give such directories."
            )
    return runs + _train_runs(trained)


def setting_label(setting: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{symbol(name)}={value:.4g}" if isinstance(value, float) else f"{symbol(name)}={value}"
        for name, value in setting.items()
    )


def symbol(option: str) -> str:
    """The paper's symbol for an option, or its name if it has none: k_behavior → K_b."""
    return SYMBOLS.get(option) or option


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); leave it out.") from error
    return values


def _tune_runs(path: Path) -> list[Run]:
    record = _read(path / "experiment.json")
    runs = []
    for part in record["parts"]:
        stage = POPULATION if record["spec"]["search"]["method"] == "pbt" else part["stage"]
        entries = read_trials(path / part["name"])
        started = {_identity(e["config"], part["swept"]): t for t, e in entries.items()}
        planned = part["trials"]
        if planned is None:  # the search decides as it goes
            planned = [entry["config"] for entry in entries.values()]
        for config in planned:
            trial = started.get(_identity(config, part["swept"]))
            entry = entries[trial] if trial is not None else {}
            rows = read_rows(path / part["name"], trial) if trial is not None else []
            found = entry.get("directory")
            runs.append(
                Run(
                    experiment=record["spec"]["name"],
                    stage=stage,
                    algorithm=part["label"],
                    task=config["env"],
                    setting={"member": config["seed"]}
                    if stage == POPULATION
                    else {name: config[name] for name in part["swept"]},
                    seed=config["seed"],
                    status=_trial_status(entry),
                    planned_steps=record["spec"]["env_steps"],
                    rows=[row for row in rows if row.get(RETURN) is not None],
                    error=entry.get("error", ""),
                    directory=str(path / part["name"] / "tune" / found) if found else "",
                )
            )
    return runs


def _identity(config: Mapping[str, Any], swept: Sequence[str]) -> str:
    return json.dumps([config[name] for name in ("env", "seed", *swept)])


def _trial_status(entry: Mapping[str, Any]) -> str:
    if not entry:
        return MISSING
    status = str(entry["status"])
    return status if status in (FINISHED, STOPPED, FAILED) else UNFINISHED


def _train_runs(trained: Sequence[tuple[Path, dict[str, Any]]]) -> list[Run]:
    """Their setting is the preset and whatever options differ under it on the same task."""
    alike: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for _, config in trained:
        key = (_algorithm(config), config["preset"], config["env"])
        alike.setdefault(key, []).append(config["hyperparameters"])
    names = [
        name
        for name in dict.fromkeys(n for _, config in trained for n in config["hyperparameters"])
        if name not in NOT_A_SETTING
        and any(o.get(name) != group[0].get(name) for group in alike.values() for o in group)
    ]
    several = len({_algorithm(config) for _, config in trained}) > 1
    runs = []
    for path, config in trained:
        label = entry_of(_algorithm(config)).label
        rows = [row for row in _recorded(path) if row.get(RETURN) is not None]
        done = bool(rows) and int(rows[-1]["env_steps"]) >= config["env_steps"]
        setting = {"algorithm": label} if several else {}
        setting |= {"preset": config["preset"]}
        options = config["hyperparameters"]
        setting |= {name: _hashable(options[name]) for name in names if name in options}
        runs.append(
            Run(
                experiment="train",
                stage="train",
                algorithm=label,
                task=config["env"],
                setting=setting,
                seed=config["seed"],
                status=FINISHED if done else UNFINISHED if rows else MISSING,
                planned_steps=config["env_steps"],
                rows=rows,
                directory=str(path),
            )
        )
    return runs


def _algorithm(config: Mapping[str, Any]) -> str:
    return str(config.get("algo", "qvpo"))  # runs of older versions do not say


def _metrics_of(path: Path) -> bool:
    """A run that has only begun has neither file, but it has run.json."""
    return any((path / n).is_file() for n in ("run.json", "metrics.jsonl", "metrics.parquet"))


def _recorded(path: Path) -> list[dict[str, Any]]:
    """All rows; of a run kept as its table alone, such as in tune_configs/results, the table's."""
    if (path / "metrics.jsonl").exists() or not (path / "metrics.parquet").exists():
        return [dict(row) for row in MetricsLog(path).rows()]
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path / "metrics.parquet").to_pylist()
    return rows


def _hashable(value: Any) -> Any:
    return str(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Group:
    """The seeds of one setting on one task."""

    experiment: str
    stage: str
    algorithm: str
    task: str
    label: str
    setting: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def evaluated(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.rows)

    @property
    def complete(self) -> tuple[Run, ...]:
        """Runs that reached their planned env steps: only these can be compared."""
        return tuple(run for run in self.runs if run.status == FINISHED and run.rows)


def grouped(runs: Sequence[Run]) -> list[Group]:
    groups: dict[tuple[str, str, str, str, str], list[Run]] = {}
    for run in runs:
        key = (run.experiment, run.stage, run.algorithm, run.task, run.label)
        groups.setdefault(key, []).append(run)
    return [
        Group(experiment, stage, algorithm, task, label, members[0].setting, tuple(members))
        for (experiment, stage, algorithm, task, label), members in groups.items()
    ]
