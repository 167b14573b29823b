"""The picture of Theorem 2: samples of each trained policy under the density they should have."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qvpo_rllib.experiments.run_directory import write_atomically
from qvpo_rllib.experiments.theorem2 import GRID, VariantResult, behavior_density, q_function

SAMPLE_COLOR = "#b9c7d6"
EXPECTED_COLOR = "#0b3c6f"
THEOREM_COLOR = "#c2410c"
BINS = 80


def plot_theorem2(results: Sequence[VariantResult], path: Path) -> None:
    """Writes the PNG file `path`, in one step. The first of the five results is Eq. 7's."""
    picture = io.BytesIO()
    theorem2_figure(results).savefig(picture, format="png")
    write_atomically(path, picture.getvalue())


def theorem2_figure(results: Sequence[VariantResult]) -> Figure:
    figure = Figure(figsize=(7.0, 4.2), dpi=200, layout="constrained")
    panels = figure.subplots(2, 3, sharex=True).flatten()
    _draw_setting(panels[0])
    for panel, result in zip(panels[1:], results, strict=True):
        _draw_result(panel, result, results[0])
    for panel in panels:
        panel.set_xlim(-1, 1)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[3:]:
        panel.set_xlabel("action $a$", fontsize=9)
    for panel in panels[[0, 3]]:
        panel.set_ylabel("density", fontsize=9)
    figure.legend(
        *panels[1].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    return figure


def _draw_setting(panel: Axes) -> None:
    panel.plot(GRID, behavior_density(), color="black", linewidth=1.3, linestyle="-.")
    panel.plot(GRID, q_function(GRID), color="#777777", linewidth=1.3)
    panel.axhline(0, color="#bbbbbb", linewidth=0.6, zorder=0)
    panel.text(-0.1, 0.92, "π", ha="center", fontsize=9)
    panel.text(0.42, 1.5, "$Q$", ha="left", fontsize=9, color="#555555")
    panel.set_title("behaviour policy π and Q", fontsize=9)


def _draw_result(panel: Axes, result: VariantResult, theorem: VariantResult) -> None:
    panel.hist(
        result.samples,
        bins=BINS,
        range=(-1, 1),
        density=True,
        color=SAMPLE_COLOR,
        label="samples of the trained policy",
    )
    panel.plot(
        GRID,
        theorem.expected,
        color=THEOREM_COLOR,
        linewidth=1.1,
        linestyle="--",
        label="Theorem 2 (Eq. 7)",
    )
    panel.plot(
        GRID,
        result.expected,
        color=EXPECTED_COLOR,
        linewidth=1.3,
        label="what these weights ask for",
    )
    title = result.variant.title.replace("N_d", "$N_d$")
    panel.set_title(title, fontsize=9)
    panel.text(
        0.03,
        0.97,
        f"KS {result.ks_expected:.3f}\nto Eq. 7 {result.ks_theorem2:.3f}",
        transform=panel.transAxes,
        va="top",
        fontsize=8,
    )
    top = max(result.expected.max(), theorem.expected.max())
    panel.set_ylim(0, 1.35 * top)
