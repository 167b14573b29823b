"""From runs to a folder: Parquet, figures (PNG and PDF), tables (Markdown), one HTML page."""

import base64
import html
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qvpo_rllib.files import replacing, write_atomically
from qvpo_rllib.report import figures
from qvpo_rllib.report.comparison import (
    Candidate,
    against_best,
    candidates,
    comparison_table,
    verdict,
)
from qvpo_rllib.report.diagnostics import diagnostics
from qvpo_rllib.report.runs import POPULATION, Group, Run, grouped, load_runs, setting_label
from qvpo_rllib.report.statistics import Estimate, estimate
from qvpo_rllib.report.tables import (
    PAPER_TABLE_1,
    Table,
    column_of,
    provenance_table,
    returns_table,
    status_table,
    summary_table,
    task_name,
    time_table,
)

MARK = "evaluations.parquet"  # by it a report's folder is known, and may be written again
FIGURE_KINDS = ("png", "pdf")
MIN_SCATTER = 5  # settings from which on a cloud of points says something
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84em; margin: 2em auto; padding: 0 1em;
       color: #1a1a1a; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 0.86em; display: block; overflow-x: auto; }
th, td { border: 1px solid #d5d5d5; padding: 0.25em 0.6em; text-align: left; }
th { background: #f2f2f2; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(24em, 1fr)); gap: 1em;
           align-items: start; }
figure { margin: 0; } figure.wide { grid-column: 1 / -1; } figure img { width: 100%; }
.verdict { border-left: 4px solid #0b3c6f; padding: 0.3em 1em; background: #f6f8fb; }
"""


def build_report(
    paths: Sequence[Path],
    out: Path,
    action_time: Callable[[Path], float | None] | None = None,
) -> Path:
    """Writes the report over the results in `paths` and returns its `report.html`.

    Args:
        action_time: measures the milliseconds of one action of the policy in a run's directory;
            None leaves the column of the time table empty.

    An earlier report in `out` is replaced, its figures included.

    Raises:
        ValueError: a path without results, or `out` holds something else.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / MARK).exists():
        raise ValueError(
            f"{str(out)!r} holds something that is not a report. Give a directory that is new, "
            "empty, or holds an earlier report."
        )
    runs = load_runs(paths)
    if not runs:
        raise ValueError(f"There is no run in {', '.join(map(str, paths))} yet: nothing to report.")
    page = _Page(out)
    _write_evaluations(out / MARK, runs)
    groups = grouped(runs)
    page.table("summary", summary_table(groups))
    page.figure(
        "curves", figures.curves_of_tasks(groups, lambda g: column_of(g, groups)), wide=True
    )
    stages: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        stages.setdefault((group.experiment, group.stage), []).append(group)
    for (experiment, stage), members in stages.items():
        _experiment(page, experiment, stage, members)
    measured = {}
    if action_time is not None:
        times = {run.directory: action_time(Path(run.directory)) for run in runs if run.directory}
        measured = {directory: ms for directory, ms in times.items() if ms is not None}
    page.table("table1", returns_table(groups))
    page.table("times", time_table(groups, measured))
    page.table("runs", status_table(runs))
    origin = provenance_table(paths)
    if origin is not None:
        page.table("provenance", origin)
    return page.write(paths)


def _experiment(page: "_Page", experiment: str, stage: str, groups: Sequence[Group]) -> None:
    name = experiment + ("-confirm" if stage == "confirm" else "")
    page.heading(name + (": the best settings on fresh seeds" if stage == "confirm" else ""))
    tasks = list(dict.fromkeys(group.task for group in groups))
    for task in tasks:
        here = [group for group in groups if group.task == task]
        # Each task by itself: a mean of returns of different scales would be the largest one's.
        prefix, own = (f"{task}: ", f"{name}-{task}") if len(tasks) > 1 else ("", name)
        compared, left_out = candidates(here)
        if len(here) > 1:
            page.verdict(prefix + verdict(compared, left_out, stage))
        title = _title(here, task)
        page.figure(f"{name}-{task}-curves", figures.learning_curves(here, title=title))
        algorithms = list(dict.fromkeys(group.algorithm for group in here))
        # Each algorithm by itself: all have the same values of the swept options.
        for algorithm in algorithms if stage != POPULATION else ():
            of_one = [group for group in here if group.algorithm == algorithm]
            file = f"{name}-{task}" + (f"-{algorithm}" if len(algorithms) > 1 else "")
            _sweep_figures(page, file, of_one, _title(of_one, task))
        panels = diagnostics(here, title=f"{title}: diagnostics")
        if panels is not None:
            page.figure(f"{name}-{task}-diagnostics", panels)
        several = all(candidate.estimate.has_interval for candidate in compared)
        if len(compared) > 1 and several and stage != POPULATION:
            best, others = against_best(compared)
            chart = figures.improvements(others[:12], title=f"{prefix}P({best.label} is better)")
            page.figure(f"{own}-improvement", chart)
            heading = f"{prefix}which is better" if prefix else f"{name}: which is better"
            page.table(f"{own}-comparison", comparison_table(compared, heading))
    compared, _ = candidates(groups)
    if len(tasks) > 1 and compared and (profiles := _profiles(groups, compared)):
        page.figure(f"{name}-profile", profiles)


def _title(groups: Sequence[Group], task: str) -> str:
    """Returns the task, and the algorithms where they have room; the legend has them all."""
    algorithms = list(dict.fromkeys(group.algorithm for group in groups))
    return f"{', '.join(algorithms)} on {task}" if len(algorithms) <= 3 else task


def _sweep_figures(page: "_Page", name: str, groups: Sequence[Group], title: str) -> None:
    """Draws a heat map of two swept options, and lines over each option, of ended runs alone.

    Args:
        groups: of one algorithm on one task.
    """
    ended = [group for group in groups if group.complete]
    swept = [n for n in dict.fromkeys(n for g in groups for n in g.setting) if _varies(n, groups)]
    numeric = [n for n in swept if all(_is_number(g.setting.get(n)) for g in groups)]
    if not ended:
        return
    if len(swept) == len(numeric) == 2 and _mostly_filled(groups, *numeric):
        x, y = numeric
        cells = {(g.setting[x], g.setting[y]): _score(g) for g in ended}
        some = {
            (g.setting[x], g.setting[y]): f"{len(g.complete)} of {len(g.runs)} seeds"
            for g in ended
            if len(g.complete) < len(g.runs)
        }
        chart = figures.heat_map(cells, x, y, title=f"{title}: last return", seeds=some)
        page.figure(f"{name}-heatmap", chart)
    for option in numeric:
        lines: dict[str, list[Any]] = {}
        for group in sorted(ended, key=lambda g: g.setting[option]):
            others = {n: v for n, v in group.setting.items() if n in swept and n != option}
            label = setting_label(others)
            point = (group.setting[option], _score(group), group.last_returns)
            lines.setdefault(label, []).append(point)
        # A line needs two values; a search that draws every value anew has none.
        lines = {label: points for label, points in lines.items() if len(points) > 1}
        covered = sum(map(len, lines.values())) == len(ended)
        if not covered and len(groups) >= MIN_SCATTER:  # settings drawn at random
            lines = {}
            points = [(g.setting[option], r) for g in groups for r in g.evaluated]
            page.figure(f"{name}-{option}", figures.option_scatter(points, option, title=title))
        if lines and len(lines) <= figures.MAX_LINES:
            page.figure(f"{name}-{option}", figures.option_lines(lines, option, title=title))


def _mostly_filled(groups: Sequence[Group], x: str, y: str) -> bool:
    """Says whether a heat map would have enough cells: settings drawn at random leave it empty."""
    xs, ys = ({group.setting[name] for group in groups} for name in (x, y))
    return len(groups) >= 0.4 * len(xs) * len(ys)


def _varies(option: str, groups: Sequence[Group]) -> bool:
    return len({json.dumps(group.setting.get(option)) for group in groups}) > 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _score(group: Group) -> Estimate:
    return estimate([group.last_returns])


def _profiles(groups: Sequence[Group], compared: Sequence[Candidate]) -> Figure | None:
    """Draws scores relative to the paper's QVPO on its tasks, elsewhere to the report's best.

    There is none where a task's best return is not positive: a share of it would mean nothing.
    """
    tasks = list(dict.fromkeys(group.task for group in groups))
    paper = PAPER_TABLE_1["QVPO"]
    scale = {
        task: float(paper[task_name(task)].split(" ")[0])
        if task_name(task) in paper
        else max(r.returns[-1] for g in groups if g.task == task for r in g.evaluated)
        for task in tasks
    }
    if min(scale.values()) <= 0:
        return None
    scores = {
        candidate.label: [
            [value / scale[task] for value in values]
            for task, values in zip(tasks, candidate.scores, strict=True)
        ]
        for candidate in compared
    }
    known = all(task_name(task) in paper for task in tasks)
    return figures.performance_profiles(
        scores,
        title=f"Performance profile over {len(tasks)} tasks",
        x_label="last return / the paper's QVPO" if known else "last return / reference return",
    )


def _write_evaluations(path: Path, runs: Sequence[Run]) -> None:
    """Writes a row per evaluation of every run; one with nulls for a run that has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for run in runs:
        about = {
            "experiment": run.experiment,
            "stage": run.stage,
            "algorithm": run.algorithm,
            "task": run.task,
            "setting": run.label,
            "seed": run.seed,
            "status": run.status,
            "planned_env_steps": run.planned_steps,
            **{f"option/{name}": str(value) for name, value in run.setting.items()},
        }
        rows += [{**about, **row} for row in run.rows] or [about]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


class _Page:
    """Collects the parts of the report, writing each as a file of its own too."""

    def __init__(self, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self._html: list[str] = []
        self._figures = ""  # those since the last text
        self._markdown: list[str] = []

    def _add(self, text: str) -> None:
        if self._figures:
            self._html.append(f'<div class="figures">{self._figures}</div>')
            self._figures = ""
        self._html.append(text)

    def heading(self, text: str) -> None:
        self._add(f"<h1>{html.escape(text)}</h1>")
        self._markdown.append(f"# {text}\n")

    def verdict(self, text: str) -> None:
        self._add(f'<p class="verdict">{html.escape(text)}</p>')
        self._markdown.append(f"{text}\n")

    def figure(self, name: str, figure: Figure, *, wide: bool = False) -> None:
        """Adds a figure beside the one before; a wide one takes the page's width."""
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
        for kind in FIGURE_KINDS:
            with replacing(self.out / f"{name}.{kind}") as temporary:
                figure.savefig(temporary)
        image = base64.b64encode((self.out / f"{name}.png").read_bytes()).decode()
        kind = ' class="wide"' if wide else ""
        self._figures += (
            f'<figure{kind}><img alt="{html.escape(name)}" src="data:image/png;base64,{image}">'
            "</figure>"
        )
        self._markdown.append(f"![{name}]({name}.png)\n")

    def table(self, name: str, table: Table) -> None:
        write_atomically(self.out / f"{name}.md", table.markdown().encode())
        self._add(table.html())
        self._markdown.append(table.markdown())

    def write(self, paths: Sequence[Path]) -> Path:
        sources = ", ".join(map(str, paths))
        made = time.strftime("%Y-%m-%d %H:%M")
        self._add(f"<p>From {html.escape(sources)}, {made}.</p>")
        page = (
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width'><title>qvpo report</title>"
            f"<style>{STYLE}</style></head><body>{''.join(self._html)}"
            "</body></html>"
        )
        report, markdown = self.out / "report.md", "\n".join(self._markdown)
        earlier = report.read_text() if report.is_file() else ""
        write_atomically(report, markdown.encode())
        write_atomically(self.out / "report.html", page.encode())
        for name in _figures_in(earlier) - _figures_in(markdown):
            for kind in FIGURE_KINDS:
                (self.out / f"{name}.{kind}").unlink(missing_ok=True)
        return self.out / "report.html"


def _figures_in(markdown: str) -> set[str]:
    return set(re.findall(r"^!\[([A-Za-z0-9_.-]+)\]\(\1\.png\)$", markdown, re.MULTILINE))
