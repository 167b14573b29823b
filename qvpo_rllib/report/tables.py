"""The report's tables, as Markdown and HTML from the same rows."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qvpo_rllib.report.runs import Group, Run
from qvpo_rllib.report.statistics import Estimate, estimate
from qvpo_rllib.training.rows import number

# Ding et al. 2024, Table 1: mean (std) over five seeds, on the -v3 tasks, probably of each run's
# best checkpoint.
_TASKS = ("Hopper", "Walker2d", "Ant", "HalfCheetah", "Humanoid")
_ROWS = """
PPO: 3154.3 (426.2), 3751.5 (609.1), 2781.9 (74.1), 4773.5 (53.4), 713.7 (85.9)
SPO: 2212.8 (988.4), 3321.8 (1328.9), 2100.2 (302.4), 4008.2 (246.8), 797.4 (262.1)
TD3: 3267.5 (8.5), 3513.9 (40.7), 4583.8 (69.5), 10388.6 (80.4), 5353.5 (53.7)
SAC: 2996.6 (111.9), 4888.1 (80.0), 5030.9 (1000.3), 10616.9 (72.8), 5159.7 (475.3)
DIPO: 3295.4 (7.0), 4681.7 (25.7), 5665.9 (54.7), 9590.5 (67.5), 4945.5 (898.6)
QSM: 2154.7 (998.2), 3613.4 (1443.5), N/A, 3888.2 (632.6), 4793.1 (229.5)
QVPO: 3728.5 (13.8), 5191.8 (60.2), 6425.1 (67.6), 11385.6 (164.5), 5306.6 (14.5)
"""
PAPER_TABLE_1: dict[str, dict[str, str]] = {
    name: dict(zip(_TASKS, values.split(", "), strict=True))
    for name, values in (row.split(": ") for row in _ROWS.strip().splitlines())
}
# Figure 3 at 200,000 env steps, read off the plot, ±100.
PAPER_FIGURE_3 = {"Hopper": 3000, "Walker2d": 4000, "Ant": 4800, "HalfCheetah": 8300,
                  "Humanoid": 4000}  # fmt: skip
FIGURE_3_STEPS = 200_000
MAX_COLUMNS = 7  # algorithms or settings of the summary
# Table 4: hours for 1e6 env steps of Ant-v3, milliseconds per action, on an RTX 4090.
PAPER_TABLE_4: dict[str, tuple[float, float]] = {
    "QVPO": (6.8, 6.2),
    "DIPO": (10.5, 5.7),
    "TD3": (0.5, 0.2),
    "SAC": (2.5, 0.3),
    "PPO": (0.3, 0.2),
    "SPO": (0.3, 0.3),
    "QSM": (1.0, 0.9),
}


PROVENANCE = ("experiment.json", "run.json")
VERSIONS = ("qvpo_rllib", "torch", "ray", "mujoco")


@dataclass(frozen=True)
class Table:
    """A heading, a note below it, column names, rows of text; **text** is bold."""

    heading: str
    note: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [f"## {self.heading}", "", self.note, "", _line(self.columns)]
        lines += [_line(["---"] * len(self.columns)), *map(_line, self.rows)]
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        def cells(tag: str, texts: Sequence[str]) -> str:
            bold = (re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text)) for text in texts)
            return "".join(f"<{tag}>{text}</{tag}>" for text in bold)

        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        return (
            f"<h2>{html.escape(self.heading)}</h2><p>{html.escape(self.note)}</p>"
            f"<table><thead><tr>{cells('th', self.columns)}</tr></thead><tbody>{body}</tbody>"
            "</table>"
        )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def task_name(env: str) -> str:
    """Returns an environment's name without its version: "Ant-v5" → "Ant".

    One with arguments keeps both: it is none of the paper's.
    """
    if env.endswith(")"):
        return env
    return env.rsplit("/", 1)[-1].rsplit("-v", 1)[0]


def summary_table(groups: Sequence[Group]) -> Table:
    """Returns the tasks × algorithms (or settings): mean of the last returns, the best in bold."""
    by_task: dict[str, dict[str, Group]] = {}
    for group in groups:
        by_task.setdefault(group.task, {})[column_of(group, groups)] = group
    names = list(dict.fromkeys(column_of(group, groups) for group in groups))
    means = {
        (task, name): float(np.mean(group.last_returns))
        for task, found in by_task.items()
        for name, group in found.items()
        if group.complete
    }
    best = {
        task: max((m for (t, _), m in means.items() if t == task), default=0) for task in by_task
    }
    if len(names) > MAX_COLUMNS:

        def rank(name: str) -> tuple[int, float]:
            gaps = [best[task] - means[task, name] for task in by_task if (task, name) in means]
            return -len(gaps), float(np.mean(gaps)) if gaps else 0.0

        names = sorted(sorted(names, key=rank)[:MAX_COLUMNS], key=names.index)

    def cell(task: str, name: str) -> str:
        group = by_task[task].get(name)
        if group is None or not group.complete:
            return "–"
        text = with_interval(estimate([group.last_returns], np.mean), ",.0f")
        if len(group.complete) < len(group.runs):
            text += f" ({_counted(group)} seeds)"
        several = sum((task, n) in means for n in names) > 1
        return f"**{text}**" if several and means[task, name] == best[task] else text

    steps = max(run.planned_steps for group in groups for run in group.runs)
    early = steps <= FIGURE_3_STEPS
    paper = {t: f"{v:,}" for t, v in PAPER_FIGURE_3.items()} if early else PAPER_TABLE_1["QVPO"]
    known = any(task_name(task) in paper for task in by_task)
    where = "Figure 3 at 200,000 env steps, ±100" if early else "Table 1, a million env steps"
    seeds = sorted({len(group.runs) for group in groups})
    return Table(
        "Summary",
        f"Last evaluation, mean over the seeds that ended ({' or '.join(map(str, seeds))} planned) "
        f"of up to {steps:,} env steps, with its 95 % bootstrap interval; the highest of a task in "
        "bold." + (f" Paper: QVPO, {where}, on the -v3 tasks." if known else ""),
        ("task", *names, *(["paper"] if known else [])),
        [
            (task, *(cell(task, n) for n in names),
             *([paper.get(task_name(task), "–")] if known else []))
            for task in by_task
        ],
    )  # fmt: skip


def column_of(group: Group, groups: Sequence[Group]) -> str:
    """Returns the algorithm, the setting, or both: what sets a group apart on its task."""
    algorithms = {g.algorithm for g in groups}
    settings = {g.label for g in groups if g.algorithm == group.algorithm}
    parts = [group.algorithm] if len(algorithms) > 1 else []
    if len(settings) > 1 and group.label != group.algorithm:
        parts.append(group.label)
    if len({(g.experiment, g.stage) for g in groups}) > 1:
        parts.append(f"({group.experiment}{', confirmed' if group.stage == 'confirm' else ''})")
    return " ".join(parts) or group.label


def returns_table(groups: Sequence[Group]) -> Table:
    """Returns Table 1: best and last evaluation, mean (std) over seeds, beside the paper's."""
    rows = []
    for group in groups:
        last = group.last_returns
        rows.append(
            (
                group.task,
                group.algorithm,
                _origin(group),
                _counted(group),
                _mean_std([max(run.returns) for run in group.complete]),
                _mean_std(last),
                with_interval(estimate([last]), ",.1f") if last else "–",
                PAPER_TABLE_1.get(group.algorithm, {}).get(task_name(group.task), "–"),
            )
        )
    return Table(
        "Returns",
        "Undiscounted return of whole evaluation episodes. Best: each seed's best evaluation; "
        "last: its last one; mean (sample standard deviation) over the seeds that reached the "
        "planned env steps. IQM: interquartile mean of the last, with its 95 % bootstrap interval "
        "(the mean below four seeds). Paper: Table 1, one million env steps on the -v3 tasks.",
        ("task", "algorithm", "setting", "seeds", "best", "last", "IQM of the last [95 %]",
         "paper"),
        rows,
    )  # fmt: skip


def status_table(runs: Sequence[Run]) -> Table:
    """Returns every run, so that none is silently missing."""
    rows = [
        (
            f"{run.experiment}" + (" (confirmation)" if run.stage == "confirm" else ""),
            run.task,
            run.label,
            str(run.seed),
            run.status,
            f"{run.env_steps:,} of {run.planned_steps:,}",
            f"{run.returns[-1]:,.1f}" if run.rows else "–",
            run.error,
        )
        for run in runs
    ]
    ended = sum(run.status in ("finished", "stopped early") for run in runs)
    return Table(
        "Runs",
        f"{ended} of {len(runs)} runs have ended. Runs that have not are drawn faintly in the "
        "curves and are left out of every statistic over the last evaluation.",
        ("experiment", "task", "setting", "seed", "status", "env steps", "last", "error"),
        rows,
    )


def time_table(groups: Sequence[Group], action_ms: Mapping[str, float]) -> Table:
    """Returns Table 4: training time and time per action, beside the paper's.

    Args:
        action_ms: a run's directory → milliseconds per action.
    """
    rows = []
    for group in groups:
        runs = [run for run in group.evaluated if run.rows[-1].get("time_total_s")]
        if not runs:
            continue
        speed = float(np.mean([_speed(run) for run in runs]))
        actions = [action_ms[run.directory] for run in runs if run.directory in action_ms]
        paper = PAPER_TABLE_4.get(group.algorithm) if task_name(group.task) == "Ant" else None
        rows.append(
            (
                group.task,
                group.algorithm,
                _origin(group),
                str(len(runs)),
                f"{speed:.3g}",
                f"{1e6 / speed / 3600:.3g}",
                f"{np.mean(actions):.2f}" if actions else "–",
                f"{paper[0]} h, {paper[1]} ms" if paper else "–",
            )
        )
    return Table(
        "Time",
        "Env steps per second of wall-clock time in training after the warm-up, the evaluations "
        "of `qvpo tune` included, mean over seeds; hours for one million at that speed. One "
        "action: the best of K for one observation on this machine, if it was measured "
        "(--time-actions). Paper: Table 4, RTX 4090.",
        ("task", "algorithm", "setting", "seeds", "env steps/s", "h per 1M", "ms per action",
         "paper"),
        rows,
    )  # fmt: skip


def _speed(run: Run) -> float:
    """Returns env steps per second between the first evaluation after the warm-up and the last."""
    rows = [row for row in run.rows if row.get("updates")]
    first, last = (rows[0], rows[-1]) if len(rows) > 1 else ({}, run.rows[-1])
    steps, seconds = (
        (number(last, name) or 0) - (number(first, name) or 0)
        for name in ("env_steps", "time_total_s")
    )
    return steps / seconds


def _origin(group: Group) -> str:
    label = "" if group.label == group.algorithm else group.label
    confirmed = " (confirmed on fresh seeds)" if group.stage == "confirm" else ""
    return (label + confirmed).strip() or "–"


def _counted(group: Group) -> str:
    total, ended = len(group.runs), len(group.complete)
    return str(total) if ended == total else f"{ended} of {total}"


def _mean_std(values: Sequence[float]) -> str:
    if not values:
        return "–"
    spread = f" ({np.std(values, ddof=1):,.1f})" if len(values) > 1 else ""
    return f"{np.mean(values):,.1f}{spread}"


def with_interval(e: Estimate, style: str) -> str:
    """Returns "1.0 [0.9, 1.1]", or the value alone where there is no interval."""
    text = format(e.value, style)
    return f"{text} [{format(e.low, style)}, {format(e.high, style)}]" if e.has_interval else text


def provenance_table(paths: Sequence[Path]) -> Table | None:
    """Returns a row per start of an experiment or run; None if none was recorded."""
    rows = []
    for file in (path / name for path in paths for name in PROVENANCE):
        for start in json.loads(file.read_text())["starts"] if file.is_file() else ():
            machine = f"{start['cpu_count']} CPUs, {start['gpu'] or 'no GPU'}, {start['platform']}"
            versions = ", ".join(f"{n} {start['versions'].get(n) or '?'}" for n in VERSIONS)
            command = " ".join(start["command"]) or "–"
            rows.append((file.parent.name, command, start["started_at"], machine, versions))
    if not rows:
        return None
    return Table(
        "How these results were obtained",
        "Every start, the resumed ones too. Machine: the one the command ran on; with --address, "
        "trials ran on the cluster's.",
        ("results", "command", "started (UTC)", "machine", "versions"),
        rows,
    )
