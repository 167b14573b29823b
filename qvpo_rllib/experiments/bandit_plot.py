"""The picture of the bandit: Figure 2's two rows of four snapshots."""

import io
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qvpo_rllib.experiments.bandit import PEAKS, BanditRun, Measurement, reward
from qvpo_rllib.experiments.run_directory import write_atomically

WINDOW = ((-2.0, 0.0), (0.0, 2.0))  # the paper's: x, y
CONTOURS = 7
SHOWN_SAMPLES = 400  # more would merge into a blot
SAMPLE_COLOR = "#0b3c6f"
PEAK_COLOR = "#c2410c"


def plot_bandit(without: BanditRun, with_entropy: BanditRun, path: Path) -> None:
    """Writes the PNG file `path`, in one step."""
    picture = io.BytesIO()
    bandit_figure(without, with_entropy).savefig(picture, format="png")
    write_atomically(path, picture.getvalue())


def bandit_figure(without: BanditRun, with_entropy: BanditRun) -> Figure:
    """Policy samples over the reward's contours, both runs at the same four times."""
    figure = Figure(figsize=(7.0, 3.75), dpi=200, layout="constrained")
    axes = figure.subplots(2, 4, sharex=True, sharey=True)
    labels = (
        r"without: $\omega_\mathrm{ent} = 0$",
        rf"with: $\omega_\mathrm{{ent}} = {with_entropy.entropy_weight:g}$",
    )
    for row, (run, label) in enumerate(zip((without, with_entropy), labels, strict=True)):
        for column, snapshot in enumerate(run.snapshots()):
            panel = axes[row, column]
            _draw(panel, snapshot, run.variance)
            if row == 0:
                panel.set_title(f"{snapshot.updates:,} updates", fontsize=9)
        axes[row, 0].set_ylabel(f"{label}\n$a_2$", fontsize=9)
    for panel in axes[1]:
        panel.set_xlabel("$a_1$", fontsize=9)
    return figure


def _draw(panel: Axes, snapshot: Measurement, variance: float) -> None:
    (left, right), (bottom, top) = WINDOW
    x, y = torch.linspace(left, right, 200), torch.linspace(bottom, top, 200)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    panel.contour(
        x, y, reward(grid, variance), levels=CONTOURS, colors="#9a9a9a", linewidths=0.7, zorder=1
    )
    shown = snapshot.samples[:SHOWN_SAMPLES]
    panel.scatter(
        shown[:, 0], shown[:, 1], s=5, color=SAMPLE_COLOR, alpha=0.55, linewidths=0, zorder=2
    )
    # A peak's share beside it, on the side away from the other two.
    for (peak_x, peak_y), share, (dx, dy) in zip(
        PEAKS, snapshot.peak_shares, ((0, -0.47), (0.05, -0.47), (0.05, 0.26)), strict=True
    ):
        panel.plot(peak_x, peak_y, marker="+", color=PEAK_COLOR, markersize=7, zorder=3)
        panel.text(
            peak_x + dx,
            peak_y + dy,
            f"{share:.0%}",
            ha="center",
            va="center",
            fontsize=8,
            color=PEAK_COLOR,
            fontweight="bold",
            zorder=4,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8},
        )
    panel.set(xlim=WINDOW[0], ylim=WINDOW[1], aspect="equal", xticks=[-2, -1, 0], yticks=[0, 1, 2])
    panel.tick_params(labelsize=8)
