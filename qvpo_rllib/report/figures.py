"""The report's figures: one style, readable in grey and at a column's width (3.5 inches)."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qvpo_rllib.report.runs import UNFINISHED, Group, Run, setting_label, symbol
from qvpo_rllib.report.statistics import Array, Estimate, common_points, curve_band, profile
from qvpo_rllib.training.learning_curve import short_count
from qvpo_rllib.tuning.results import FAILED, FINISHED, STOPPED

WIDTH_IN, HEIGHT_IN = 3.5, 2.7
LEGEND_CHARACTERS = 34  # in a line of a panel's width
# Dark to light, so that they differ in grey too; dashes and markers tell them apart as well.
STYLES = (
    ("#0b3c6f", "-", "o"),
    ("#c2410c", "--", "s"),
    ("#4c8f5a", "-.", "^"),
    ("#9a78b8", (0, (1, 1)), "D"),
    ("#222222", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("#d39b1f", (0, (7, 2)), "P"),
    ("#5fa8d3", (0, (3, 1)), "X"),
    ("#8a8a8a", "-", "*"),
)
MAX_LINES = len(STYLES)


def new_figure(
    title: str, x_label: str, y_label: str, height: float = HEIGHT_IN
) -> tuple[Figure, Axes]:
    """Returns an empty figure of a column's width and its axes; `height` is in inches."""
    figure = Figure(figsize=(WIDTH_IN, height), dpi=300, layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(labelsize=7)
    axes.set_title(title, fontsize=8)
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    plain(axes)
    axes.set_axisbelow(True)
    return figure, axes


def plain(axes: Axes) -> None:
    """Draws a faint grid and leaves out the frame's upper and right side."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.5)


def learning_curves(groups: Sequence[Group], *, title: str) -> Figure:
    """Draws the IQM over seeds with its 95 % interval, and every seed faint, over env steps.

    A group's line ends where the first of its runs ends, as a mean over other seeds is another
    mean; the faint lines go on. Of more groups than there are styles the best are drawn.
    """
    shown = best_groups(groups)
    height = HEIGHT_IN + 0.13 * len(shown)
    figure, axes = new_figure(title, "environment steps", "evaluation return", height)
    for group in groups:
        if group not in shown and group.evaluated:
            _faint(axes, group.evaluated, "#bbbbbb")
            axes.plot([], [], color="#bbbbbb", linewidth=0.8, label="other settings")
    for group, (color, dashes, _) in zip(shown, STYLES, strict=False):
        _faint(axes, group.evaluated, color)
        _curve(axes, group, f"{group.label} ({_count(group)})", color, dashes, 1.5)
    step_axis(axes)
    legend_below(figure, axes)
    return figure


def curves_of_tasks(groups: Sequence[Group], name_of: Callable[[Group], str]) -> Figure:
    """Draws every task's learning curves as panels of one figure: means over the seeds there.

    A line is a mean of more seeds where it is full, and ends where the first of them ends.
    """
    tasks = list(dict.fromkeys(group.task for group in groups))
    shown = best_groups_of([[g for g in groups if g.task == task] for task in tasks], name_of)
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    width = columns * 2.4
    texts = {name: textwrap.fill(name, LEGEND_CHARACTERS) for name in shown}
    longest = max((len(line) for text in texts.values() for line in text.split("\n")), default=0)
    beside = max(1, min(3, int(width / (0.5 + 0.055 * longest))))  # entries of the legend, inches
    rows = -(-sum(text.count("\n") + 1 for text in texts.values()) // beside)
    size = (width, lines * 1.9 + 0.2 + 0.13 * rows)
    figure = Figure(figsize=size, dpi=300, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    styles = dict(zip(shown, STYLES, strict=False))
    for axes, task in zip(grid, tasks, strict=False):
        for group in groups:
            if group.task != task or name_of(group) not in styles or not group.evaluated:
                continue
            color, dashes, _ = styles[name_of(group)]
            _curve(axes, group, texts[name_of(group)], color, dashes, 1.3)
        axes.set_title(task, fontsize=8)
        axes.tick_params(labelsize=6.5)
        plain(axes)
        step_axis(axes, ticks=4)
    for axes in grid[len(tasks) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(tasks) - columns) : len(tasks)]:  # nothing is below them
        axes.set_xlabel("environment steps", fontsize=7)
    for axes in grid[: len(tasks) : columns]:
        axes.set_ylabel("evaluation return", fontsize=7)
    entries = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if entries:
        figure.legend(list(entries.values()), list(entries), loc="outside lower center",
                      ncols=beside, fontsize=7, frameon=False, handlelength=2.6)  # fmt: skip
    return figure


def best_groups_of(
    by_task: Sequence[Sequence[Group]], name_of: Callable[[Group], str]
) -> list[str]:
    """Returns the names of the groups that are drawn on any task, at most one per style."""
    names = dict.fromkeys(name_of(group) for task in by_task for group in best_groups(task))
    return list(names)[:MAX_LINES]


def _count(group: Group) -> str:
    """Returns "5 seeds", or "3 of 5 seeds ended"."""
    total = len(group.runs)
    ended = sum(run.status in (FINISHED, STOPPED) for run in group.runs)
    noun = "seed" if total == 1 else "seeds"
    return f"{total} {noun}" if ended == total else f"{ended} of {total} {noun} ended"


def best_groups(groups: Sequence[Group]) -> list[Group]:
    """Returns the best by their last returns, at most as many as there are styles, in order."""
    drawable = [group for group in groups if group.evaluated]
    if len(drawable) <= MAX_LINES:
        return drawable
    ranked = sorted(drawable, key=lambda g: -np.mean([r.returns[-1] for r in g.evaluated]))
    return [group for group in drawable if group in ranked[: MAX_LINES - 2]]


def common_returns(runs: Sequence[Run]) -> tuple[Array, Array]:
    """Returns env steps at which all runs were evaluated, and their returns [runs, evaluations]."""
    return common_points([list(zip(run.steps, run.returns, strict=True)) for run in runs])


def _curve(axes: Axes, group: Group, label: str, color: str, dashes: Any, width: float) -> None:
    """Draws the IQM over a group's seeds with its 95 % interval."""
    steps, returns = common_returns(group.evaluated)
    centre, low, high = curve_band(returns)
    if np.isfinite(low).all():
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, centre, color=color, linestyle=dashes, linewidth=width, marker=marker,
              markersize=3, label=label)  # fmt: skip


def _faint(axes: Axes, runs: Sequence[Run], color: str) -> None:
    for run in runs:
        marker = "." if len(run.rows) == 1 else None
        axes.plot(run.steps, run.returns, color=color, alpha=0.35, linewidth=0.5, marker=marker)


def heat_map(
    cells: dict[tuple[Any, Any], Estimate],
    x_option: str,
    y_option: str,
    *,
    title: str,
    seeds: dict[tuple[Any, Any], str],
) -> Figure:
    """Draws a setting's score in each cell; hatched where nothing was run or nothing has ended.

    Args:
        cells: (x, y) → score.
        seeds: (x, y) → how many seeds it is of, for cells that lack some.
    """
    xs, ys = (sorted({key[i] for key in cells}) for i in (0, 1))
    values = np.array([[cells[x, y].value if (x, y) in cells else np.nan for x in xs] for y in ys])
    figure, axes = new_figure(title, symbol(x_option), symbol(y_option), 1.0 + 0.42 * len(ys))
    axes.grid(False)
    norm = _greys(values)
    axes.imshow(values, cmap="Greys", origin="lower", aspect="auto", norm=norm)
    for row, y in enumerate(ys):
        for column, x in enumerate(xs):
            found = cells.get((x, y))
            if found is None or not np.isfinite(found.value):
                box = Rectangle(
                    (column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor="#bbbbbb",
                    linewidth=0,
                )  # fmt: skip
                axes.add_patch(box)
                continue
            shade = float(norm(found.value))
            text = f"{found.value:,.0f}"
            if found.has_interval:
                text += f"\n[{found.low:,.0f}, {found.high:,.0f}]"
            if (x, y) in seeds:
                text += f"\n{seeds[x, y]}"
            axes.text(
                column, row, text, ha="center", va="center", fontsize=6.5,
                color="white" if shade > 0.55 else "black",
            )  # fmt: skip
    axes.set_xticks(range(len(xs)), [_short(x) for x in xs])
    axes.set_yticks(range(len(ys)), [_short(y) for y in ys])
    return figure


def _greys(values: Array) -> Normalize:
    """Returns shades of which the darkest is not black and the lightest not white."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = max(high - low, 1e-9)
    return Normalize(vmin=low - 0.25 * margin, vmax=high + 0.35 * margin)


def option_lines(
    lines: dict[str, list[tuple[Any, Estimate, list[float]]]], option: str, *, title: str
) -> Figure:
    """Draws scores over an option's values: estimate, 95 % interval, every seed as a faint dot.

    Args:
        lines: label → (value, estimate, seeds' scores), values rising.
    """
    height = HEIGHT_IN + (0.13 * len(lines) if len(lines) > 1 else 0.0)
    figure, axes = new_figure(title, symbol(option), "last evaluation return", height)
    ticks = sorted({value for points in lines.values() for value, _, _ in points})
    for number, (label, points) in enumerate(lines.items()):
        color, dashes, marker = STYLES[number % MAX_LINES]
        shift = 0.12 * (number - (len(lines) - 1) / 2)  # so that intervals do not cover each other
        x = [ticks.index(value) + shift for value, _, _ in points]
        for place, (_, _, seeds) in zip(x, points, strict=True):
            axes.plot([place] * len(seeds), seeds, ".", color=color, alpha=0.35, markersize=3.5)
        centre = [e.value for _, e, _ in points]
        below = [e.value - e.low if e.has_interval else 0.0 for _, e, _ in points]
        above = [e.high - e.value if e.has_interval else 0.0 for _, e, _ in points]
        axes.errorbar(
            x, centre, yerr=[below, above], color=color, linestyle=dashes, marker=marker,
            markersize=4, linewidth=1.3, capsize=2.5, label=label,
        )  # fmt: skip
    axes.set_xticks(range(len(ticks)), [_short(value) for value in ticks])
    axes.margins(x=0.12)
    if len(lines) > 1:
        legend_below(figure, axes)
    return figure


def option_scatter(points: Sequence[tuple[float, Run]], option: str, *, title: str) -> Figure:
    """Draws the last return of every run over an option's value, for settings drawn at random.

    Runs that have not finished are hollow: their last return is of fewer env steps.
    """
    figure, axes = new_figure(title, symbol(option), "last evaluation return")
    for status, marker in ((FINISHED, "o"), (STOPPED, "o"), (UNFINISHED, "s"), (FAILED, "X")):
        chosen = [(x, run.returns[-1]) for x, run in points if run.status == status]
        face = "#0b3c6f" if status == FINISHED else "white"
        if chosen:
            axes.plot(
                *zip(*chosen, strict=True), marker, markersize=4, markerfacecolor=face,
                markeredgecolor="#0b3c6f", markeredgewidth=0.8, label=status,
            )  # fmt: skip
    values = sorted({x for x, _ in points})
    if values[0] > 0 and values[-1] / values[0] >= 10:
        axes.set_xscale("log")
    if len(values) <= MAX_LINES:
        axes.set_xticks(values, [_short(value) for value in values])
        axes.set_xticks([], minor=True)
    legend_below(figure, axes)
    return figure


def improvements(rows: Sequence[tuple[str, Estimate]], *, title: str) -> Figure:
    """Draws P(the best setting beats another), one line per other setting; 0.5 is a draw."""
    figure, axes = new_figure("", "probability of improvement", "", 0.95 + 0.24 * len(rows))
    for place, (_, estimate) in enumerate(rows):
        if estimate.has_interval:
            axes.plot(
                [estimate.low, estimate.high], [place, place], color="#9fb6cf", linewidth=6,
                solid_capstyle="butt",
            )  # fmt: skip
        axes.plot(estimate.value, place, "|", color="#0b3c6f", markersize=11, markeredgewidth=2)
    axes.axvline(0.5, color="#777777", linestyle="--", linewidth=0.8)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.tick_params(axis="y", labelsize=6.5)
    figure.suptitle(title, fontsize=8)
    return figure


def performance_profiles(
    scores: dict[str, list[list[float]]], *, title: str, x_label: str
) -> Figure:
    """Draws the share of runs above a normalised score, one line per setting or algorithm.

    Args:
        scores: label → for each task its seeds' normalised scores.
    """
    height = HEIGHT_IN + 0.13 * len(scores)
    figure, axes = new_figure(title, x_label, "share of runs above", height)
    top = max(1.0, max(max(map(max, tasks)) for tasks in scores.values()))
    thresholds = np.linspace(0, top * 1.05, 200)
    for number, (label, tasks) in enumerate(scores.items()):
        color, dashes, _ = STYLES[number % MAX_LINES]
        axes.plot(
            thresholds, profile(tasks, thresholds), color=color, linestyle=dashes, label=label,
            linewidth=1.4,
        )  # fmt: skip
    axes.set_ylim(-0.02, 1.02)
    legend_below(figure, axes)
    return figure


def step_axis(axes: Axes, ticks: int = 6) -> None:
    """Makes the x axis one of env steps, from 0, with at most `ticks` marks."""
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))


def legend_below(figure: Figure, axes: Axes) -> None:
    """Puts the legend below the axes, where it covers no line; says so if nothing is drawn."""
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))  # each label once
    labels, handles = list(entries), list(entries.values())
    if not handles:
        axes.text(
            0.5, 0.5, "nothing has been evaluated yet", transform=axes.transAxes, ha="center",
            fontsize=8, color="#555555",
        )  # fmt: skip
        return
    columns = 2 if max(map(len, labels)) <= 24 and len(labels) > 1 else 1
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=7, frameon=False,
        handlelength=2.6,
    )  # fmt: skip


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else setting_label({"": value})[1:]
