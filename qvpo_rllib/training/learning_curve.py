"""The learning curve of a run as a picture that stays readable in grey and in one column."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qvpo_rllib.files import replacing
from qvpo_rllib.training.rows import RETURN, Value, points

EVALUATION_COLOR = "#0b3c6f"  # dark: stands out from the training line in grey too
TRAINING_COLOR = "#b0b0b0"
BEST_COLOR = "#c2410c"

Style = dict[str, Any]  # keyword arguments of matplotlib's


def plot_learning_curve(rows: Sequence[Mapping[str, Value]], path: Path, *, title: str) -> None:
    """Writes the learning curve of `rows` (see `learning_curve`) to the PNG file `path`.

    `path` is replaced in one step, so that a viewer never finds half a picture.
    """
    with replacing(path) as temporary:
        learning_curve(rows, title=title).savefig(temporary, format="png")


def learning_curve(rows: Sequence[Mapping[str, Value]], *, title: str) -> Figure:
    """Returns a figure of evaluation return (mean, one std) and training return over env steps.

    Of each row are read "env_steps", "evaluation/return_mean", "evaluation/return_std" and
    "episode_return_mean"; values that are missing, null or not finite are left out.
    """
    # A figure of its own, not pyplot's: no display is needed and nothing outlives it.
    figure = Figure(figsize=(6.0, 3.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    training = points(rows, "episode_return_mean")
    evaluations = points(rows, RETURN)
    if training:
        line: Style = {
            "color": TRAINING_COLOR,
            "linewidth": 0.9,
            "label": "training episodes (mean)",
        }
        axes.plot(*zip(*training, strict=True), **line)
    if evaluations:
        _draw_evaluations(axes, evaluations, dict(points(rows, "evaluation/return_std")))
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return (sum of rewards per episode)", fontsize=9)
    axes.margins(x=0.03, y=0.14)  # room above the best evaluation for its value
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if training or evaluations:
        axes.legend(loc="best", fontsize=8, framealpha=0.8, edgecolor="none")
    else:
        axes.set(xticks=[], yticks=[])
        note: Style = {"transform": axes.transAxes, "ha": "center", "color": "#555555"}
        axes.text(0.5, 0.5, "no episode has ended yet", **note)
    return figure


def short_count(count: float) -> str:
    """Returns `count` with a suffix for thousands or millions: 500, 10k, 2.5k, 1.5M."""
    count = float(f"{count:.4g}")  # rounded first: 999999 is 1M, not 1000k
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.4g}{suffix}"
    return f"{count:.4g}"


def _draw_evaluations(
    axes: Axes, evaluations: Sequence[tuple[int, float]], stds: Mapping[int, float]
) -> None:
    """Draws line, band and the mark of the best.

    Args:
        evaluations: (env steps, mean return), by rising env steps.
        stds: standard deviation by env steps.
    """
    x = [steps for steps, _ in evaluations]
    mean = [value for _, value in evaluations]
    std = [stds.get(steps, 0.0) for steps in x]
    line: Style = {"color": EVALUATION_COLOR, "marker": "o", "label": "evaluation (mean ± 1 std)"}
    if len(x) == 1:
        # A band needs two points to have a width.
        axes.errorbar(x, mean, yerr=std, markersize=4, capsize=3, linestyle="none", **line)
    else:
        low = [m - s for m, s in zip(mean, std, strict=True)]
        high = [m + s for m, s in zip(mean, std, strict=True)]
        axes.fill_between(x, low, high, color=EVALUATION_COLOR, alpha=0.2, linewidth=0)
        # Many markers would merge into a thick line: about thirty are drawn.
        every = max(1, len(x) // 30)
        axes.plot(x, mean, linewidth=1.6, markersize=3.5, markevery=every, **line)
    best = max(range(len(x)), key=mean.__getitem__)
    star: Style = {"marker": "*", "markersize": 12, "markeredgecolor": "white", "linestyle": "none"}
    axes.plot(x[best], mean[best], color=BEST_COLOR, zorder=5, label="best evaluation", **star)
    value = f"{mean[best]:,.0f}" if abs(mean[best]) >= 100 else f"{mean[best]:.3g}"
    share = (x[best] - x[0]) / (x[-1] - x[0]) if x[-1] > x[0] else 0.5
    side = "left" if share < 0.2 else "right" if share > 0.8 else "center"
    axes.annotate(
        f"{value} at {short_count(x[best])}",
        (x[best], mean[best]),
        xytext=(0, 9),
        textcoords="offset points",
        ha=side,
        fontsize=8,
        color=BEST_COLOR,
        zorder=6,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
    )
