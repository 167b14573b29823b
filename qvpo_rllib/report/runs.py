"""Runs and their evaluations, from results of `qvpo tune` and run directories of `qvpo train`.

It needs no Ray: a report can be made anywhere.
"""

import dataclasses
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvpo_rllib.algorithms import entry_of
from qvpo_rllib.core.options import completed
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.files import read_json
from qvpo_rllib.training.metrics_log import MetricsLog
from qvpo_rllib.training.rows import RETURN, Row
from qvpo_rllib.tuning.results import FAILED, FINISHED, STOPPED, read_rows, read_trials

# A run that has only begun has the first of them alone.
OF_A_RUN = ("run.json", "metrics.jsonl", "metrics.parquet")
# What is read of a run's configuration, of an experiment's record, and of its parts.
CONFIG: dict[str, type] = {"algo": str, "env": str, "preset": str, "seed": int, "env_steps": int}
CONFIG |= {"hyperparameters": dict}
RECORD = {"spec": dict, "parts": list}
PART = {"name": str, "label": str, "stage": str, "swept": list}
LEAVE_OUT = "Restore it, or leave that directory out."
MISSING, UNFINISHED = "not started", "unfinished"
POPULATION = "population"
SYMBOLS = {f.name: f.metadata["symbol"] for f in dataclasses.fields(QVPOHyperparameters)}
# A train run's options that say nothing about its setting.
NOT_A_SETTING = ("entropy_decay_steps", "lr_decay_steps")
# What sets train runs apart beside their options.
SIZES = ("env_steps", "num_env_runners", "num_envs_per_env_runner")
# What sets experiments of one name apart beside the options that their files fix.
SPEC = ("preset", *SIZES, "evaluation_episodes")


@dataclass(frozen=True)
class Setting:
    """What the seeds of a group share.

    Attributes:
        experiment: name of the experiment, or of the preset of a `qvpo train` run.
        stage: "search", "confirm", "population" or "train".
        setting: the options that set it apart within its experiment.
    """

    experiment: str
    stage: str
    algorithm: str
    task: str
    setting: dict[str, Any]

    @property
    def label(self) -> str:
        """The setting in symbols, such as "K_b=4, K_t=2"."""
        return setting_label(self.setting) or self.algorithm

    @property
    def key(self) -> Hashable:
        """Algorithm and setting: what differs has another key, if not another (rounded) label."""
        values = {n: tuple(v) if isinstance(v, list) else v for n, v in self.setting.items()}
        return self.algorithm, frozenset(values.items())


@dataclass(frozen=True)
class Run(Setting):
    """One seed of one setting.

    Attributes:
        status: finished, stopped early (by the search), unfinished, failed, or not started.
        planned_steps: env steps of a whole run.
        rows: its evaluations by rising env steps, named as in `metrics.jsonl`.
        error: the last line of a failed run's error.
        directory: of a `qvpo train` run or of a trial.
    """

    seed: int
    status: str
    planned_steps: int
    rows: list[Row]
    error: str = ""
    directory: str = ""

    @property
    def env_steps(self) -> int:
        """Env steps of the last evaluation; 0 before the first."""
        return self.steps[-1] if self.rows else 0

    @property
    def steps(self) -> list[int]:
        """Env steps of the evaluations."""
        return [int(row["env_steps"] or 0) for row in self.rows]

    @property
    def returns(self) -> list[float]:
        """Mean returns of the evaluations."""
        return [float(row[RETURN] or 0) for row in self.rows]


@dataclass(frozen=True)
class Group(Setting):
    """The seeds of one setting on one task."""

    runs: tuple[Run, ...]

    @property
    def evaluated(self) -> tuple[Run, ...]:
        """Runs that have an evaluation."""
        return tuple(run for run in self.runs if run.rows)

    @property
    def complete(self) -> tuple[Run, ...]:
        """Runs that reached their planned env steps: only these can be compared."""
        return tuple(run for run in self.evaluated if run.status == FINISHED)

    @property
    def last_returns(self) -> list[float]:
        """The last returns of the complete runs."""
        return [run.returns[-1] for run in self.complete]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Returns the runs by experiment, stage, algorithm, task and setting."""
    groups: dict[Hashable, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.experiment, run.stage, run.task, run.key), []).append(run)
    return [
        Group(one.experiment, one.stage, one.algorithm, one.task, one.setting, (one, *others))
        for one, *others in groups.values()
    ]


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Returns all runs in `paths`; raises `ValueError` for a path that holds no results."""
    runs: list[Run] = []
    tuned: list[tuple[Path, dict[str, Any]]] = []
    trained: list[tuple[Path, dict[str, Any]]] = []
    origins: dict[Any, Path] = {}
    for path in paths:
        if _is_experiment(path):
            file = path / "experiment.json"
            tuned.append((path, read_json(file, dict, LEAVE_OUT, RECORD, ("parts", PART))))
        elif _is_run(path):
            trained.append((path, read_json(path / "config.json", dict, LEAVE_OUT, CONFIG)))
        else:
            below = sorted(
                inner for inner in path.glob("*/") if _is_experiment(inner) or _is_run(inner)
            )
            raise ValueError(
                f"{str(path)!r} holds no results: it has neither experiment.json (qvpo tune) nor "
                "config.json with metrics (qvpo train). Give such directories"
                + (f", such as {str(below[0])!r} in it." if below else ".")
            )
    specs = [record["spec"] for _, record in tuned]
    for path, record in tuned:
        found = _tune_runs(path, record, specs)
        for run in found:
            same = (run.experiment, run.stage, run.key, run.task, run.seed)
            _refuse_twice(origins, same, path)
        runs += found
    return runs + _train_runs(trained)


def _refuse_twice(seen: dict[Any, Path], run: Hashable, path: Path) -> None:
    """Raises `ValueError` if `seen` has such a run already, else notes where it is."""
    if run in seen:
        raise ValueError(
            f"{str(seen[run])!r} and {str(path)!r} have the same algorithm, options, task and "
            "seed: a report would count them as two seeds. Leave one of them out."
        )
    seen[run] = path


def _is_experiment(path: Path) -> bool:
    return (path / "experiment.json").is_file()


def _is_run(path: Path) -> bool:
    return (path / "config.json").is_file() and any((path / n).is_file() for n in OF_A_RUN)


def setting_label(setting: Mapping[str, Any]) -> str:
    """Returns the setting in symbols, such as "K_b=4, K_t=2"."""
    return ", ".join(
        f"{symbol(name)}={value:.4g}" if isinstance(value, float) else f"{symbol(name)}={value}"
        for name, value in setting.items()
    )


def task_label(env: str, env_config: Mapping[str, Any] | None) -> str:
    """Returns what names a task: with arguments an environment is another task."""
    arguments = ", ".join(f"{name}={value}" for name, value in (env_config or {}).items())
    return f"{env} ({arguments})" if arguments else env


def symbol(option: str) -> str:
    """Returns the paper's symbol for an option, or its name if it has none: k_behavior → K_b."""
    return SYMBOLS.get(option) or option


def _tune_runs(
    path: Path, record: Mapping[str, Any], specs: Sequence[Mapping[str, Any]]
) -> list[Run]:
    """Returns an experiment's runs.

    What it fixes otherwise than one of its name in `specs` is part of its settings, as it is of
    train runs': else runs of 1,000 and of a million env steps would pass for seeds of one setting.
    """
    spec = record["spec"]
    of_its_name = [other for other in specs if other["name"] == spec["name"]]
    population = spec["search"]["method"] == "pbt"
    runs = []
    for part in record["parts"]:
        swept, directory = part["swept"], path / part["name"]
        left_out = part.get("left_out", {})  # of earlier versions
        fixed, *others = (_fixed(s, part.get("algorithm")) for s in (spec, *of_its_name))
        apart = {n: v for n, v in fixed.items() if any(o.get(n, ...) != v for o in others)}
        entries = read_trials(directory)
        # A search may try a setting again: with the same seed it is the same run.
        started: dict[str, str] = {}
        for trial, entry in entries.items():
            identity = _identity(entry["config"], swept)
            if identity not in started or entry["status"] == FINISHED:
                started[identity] = trial
        planned = part["trials"]
        if planned is None:  # the search decides as it goes
            planned = [entry["config"] for entry in entries.values()]
        for identity, config in {_identity(config, swept): config for config in planned}.items():
            trial = started.get(identity, "")
            entry = entries.get(trial, {"status": MISSING})
            known = entry["status"] in (FINISHED, STOPPED, FAILED, MISSING)
            found = entry.get("directory")
            setting = {n: config[n] for n in swept if left_out.get(n, ...) != config[n]}
            if population:
                setting = {"member": config["seed"]}
            runs.append(
                Run(
                    experiment=spec["name"],
                    stage=POPULATION if population else part["stage"],
                    algorithm=part["label"],
                    task=task_label(config["env"], spec.get("env_config")),
                    setting=setting | apart,
                    seed=config["seed"],
                    status=entry["status"] if known else UNFINISHED,
                    planned_steps=spec["env_steps"],
                    rows=_evaluations(read_rows(directory, trial)),
                    error=entry.get("error", ""),
                    directory=str(directory / "tune" / found) if found else "",
                )
            )
    return runs


def _fixed(spec: Mapping[str, Any], algorithm: str | None) -> dict[str, Any]:
    """Returns what an experiment gives to every run of an algorithm, and its results depend on."""
    values = {name: spec[name] for name in SPEC if name in spec}
    values |= spec.get("training", {}) | spec.get("per_algorithm", {}).get(algorithm, {})
    if spec["search"]["method"] == "pbt":  # its members' options come from these alone
        values |= spec["search"] | spec["space"]
    return values


def _identity(config: Mapping[str, Any], swept: Sequence[str]) -> str:
    return json.dumps([config[name] for name in ("env", "seed", *swept)])


def _evaluations(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get(RETURN) is not None]


def _train_runs(trained: Sequence[tuple[Path, dict[str, Any]]]) -> list[Run]:
    """Returns runs whose setting is the preset and the options that differ under it on a task."""
    trained = [(path, _with_sizes(config)) for path, config in _in_full(trained)]
    alike: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for _, config in trained:
        task = task_label(config["env"], config.get("env_config"))
        key = (config["algo"], config["preset"], task)
        alike.setdefault(key, []).append(config["hyperparameters"])
    names = [
        name
        for name in dict.fromkeys(n for _, config in trained for n in config["hyperparameters"])
        if name not in NOT_A_SETTING
        and any(o.get(name) != group[0].get(name) for group in alike.values() for o in group)
    ]
    several = len({config["algo"] for _, config in trained}) > 1
    runs: list[Run] = []
    seen: dict[Any, Path] = {}
    for path, config in trained:
        label, options = entry_of(config["algo"]).label, config["hyperparameters"]
        setting = {"algorithm": label} if several else {}
        setting |= {"preset": config["preset"]}
        for name in names:
            if name in options:
                value = options[name]
                setting[name] = str(value) if isinstance(value, list) else value  # hashable
        task = task_label(config["env"], config.get("env_config"))
        same = (label, task, config["seed"], tuple(setting.items()))
        _refuse_twice(seen, same, path)
        rows = _evaluations(_recorded(path))
        done = bool(rows) and int(rows[-1]["env_steps"] or 0) >= config["env_steps"]
        runs.append(
            Run(
                experiment="train",
                stage="train",
                algorithm=label,
                task=task,
                setting=setting,
                seed=config["seed"],
                status=FINISHED if done else UNFINISHED,
                planned_steps=config["env_steps"],
                rows=rows,
                directory=str(path),
            )
        )
    return runs


def _with_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration with the run's length and workers among its options."""
    sizes = {name: config[name] for name in SIZES if name in config}
    return {**config, "hyperparameters": {**config["hyperparameters"], **sizes}}


def _in_full(trained: Sequence[tuple[Path, dict[str, Any]]]) -> list[tuple[Path, dict[str, Any]]]:
    """Returns the runs with the options that those of earlier versions lack at their defaults.

    Only runs that know different options need it, and with it Ray, which their classes import.
    """
    known: dict[str, set[frozenset[str]]] = {}
    for _, config in trained:
        known.setdefault(config["algo"], set()).add(frozenset(config["hyperparameters"]))
    found = []
    for path, config in trained:
        if len(known[config["algo"]]) > 1:
            kind = entry_of(config["algo"]).hyperparameters
            config = {**config, "hyperparameters": completed(config["hyperparameters"], kind)}
        found.append((path, config))
    return found


def _recorded(path: Path) -> list[Row]:
    """Returns all rows; of a run kept as its table alone, as in tune_configs/results, the table."""
    if (path / "metrics.jsonl").exists() or not (path / "metrics.parquet").exists():
        return MetricsLog(path).rows()
    import pyarrow.parquet as pq

    file = path / "metrics.parquet"
    try:
        rows: list[Row] = pq.read_table(file).to_pylist()
    except (OSError, ValueError) as error:  # Arrow's errors are either
        raise ValueError(f"{str(file)!r} is damaged ({error}). {LEAVE_OUT}") from error
    return rows
