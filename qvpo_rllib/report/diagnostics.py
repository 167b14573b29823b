"""What the policy and its critics are doing: a panel for each diagnostic of the learner."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qvpo_rllib.report.figures import STYLES, WIDTH_IN, best_groups, legend_below, plain, step_axis
from qvpo_rllib.report.runs import Group
from qvpo_rllib.report.statistics import common_points
from qvpo_rllib.training.rows import points

# Column of a metrics row → its panel's title.
PANELS = {
    "learner/q_weight_zero_share": "states whose q-weight is 0",
    "learner/advantage_mean": "advantage of the best sample",
    "learner/sample_std": "spread of the samples",
    "learner/nearest_sample_distance": "distance to the nearest sample",
    "evaluation/q_overestimation": "Q predicted − observed",
    "learner/td_target_std": "spread of the TD target",
    "learner/entropy_weight": "effective ω_ent",
}
PANEL_HEIGHT_IN = 1.25


def diagnostics(groups: Sequence[Group], *, title: str) -> Figure | None:
    """Draws means over seeds, every seed faint; None if no run has any of the columns."""
    shown = best_groups(groups)
    columns = [c for c in PANELS if any(points(r.rows, c) for g in shown for r in g.evaluated)]
    if not columns:
        return None
    height = PANEL_HEIGHT_IN * -(-len(columns) // 2) + 0.35 + 0.13 * len(shown)
    figure = Figure(figsize=(WIDTH_IN, height), dpi=300, layout="constrained")
    grid = list(figure.subplots(-(-len(columns) // 2), 2, squeeze=False).flat)
    for axes, column in zip(grid, columns, strict=False):
        for group, (color, dashes, _) in zip(shown, STYLES, strict=False):
            _draw(axes, group, column, color, dashes)
        axes.set_title(PANELS[column], fontsize=6.5)
        axes.tick_params(labelsize=6)
        plain(axes)
        step_axis(axes, ticks=3)
    for axes in grid[len(columns) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=8)
    legend_below(figure, figure.axes[0])
    return figure


def _draw(axes: Axes, group: Group, column: str, color: str, dashes: Any) -> None:
    # A run has no values before its first update.
    runs = [found for run in group.evaluated if (found := points(run.rows, column))]
    if not runs:
        return
    for run in runs:
        axes.plot(*zip(*run, strict=True), color=color, alpha=0.3, linewidth=0.5)
    steps, values = common_points(runs)
    axes.plot(
        steps, values.mean(0), color=color, linestyle=dashes, linewidth=1.2, label=group.label
    )
