"""Figure 2 of the paper: a continuous bandit with three peaks, with and without Eq. 10.

The reward itself is Q (there is no critic). Each update draws N_d actions for every copy of the one
state, weighs them by the reward and trains the policy, as in QVPO; the two rows differ in nothing
but ω_ent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Generator, Tensor

from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.seeding import Stream, spawn_seed
from qvpo_rllib.paper.single_state import SingleStatePolicy

PEAKS = ((-1.35, 0.65), (-0.65, 1.35), (-1.61, 1.61))  # the paper's μ_i
PEAK_WEIGHT = 1.5  # the paper's w_i
VARIANCE = 0.1  # σ²; the paper prints σ = 0.1, but its picture has σ² = 0.1: saddle / peak = 0.6
BOX = 2.0  # actions are in [-BOX, BOX]²
PEAK_RADIUS = 0.4  # a sample this close to a peak counts as on it; peaks are 0.99 apart
# A peak is covered while at least as many samples are on it as uniform actions would have: 0.031.
COVERED_SHARE = math.pi * PEAK_RADIUS**2 / (2 * BOX) ** 2

# The same for both rows, except that the first has entropy_weight = 0. T, N_d and N_e are the
# paper's. Small networks and 16 copies of the state make an update 9 ms instead of a second.
HYPERPARAMETERS: dict[str, Any] = {
    "hidden": (64, 64),
    "actor_lr": 1e-3,
    "batch_size": 16,
    "entropy_weight": 0.02,
}
NUM_UPDATES = 800
SNAPSHOTS = (0, 1 / 16, 1 / 4, 1)  # in units of the number of updates
NUM_RECORDS = 16  # how often a run is measured, apart from its beginning
NUM_MEASURED_SAMPLES = 2000


def reward(actions: Tensor, variance: float = VARIANCE) -> Tensor:
    """Returns R(x) = Σ_i w / (2πσ²) · exp(-‖x - μ_i‖² / (2σ²)), section 4.3; [..., 2] → [...]."""
    distance2 = (actions[..., None, :] - torch.tensor(PEAKS)).square().sum(dim=-1)
    bumps = torch.exp(-distance2 / (2 * variance))
    return PEAK_WEIGHT / (2 * math.pi * variance) * bumps.sum(dim=-1)


@dataclass(frozen=True)
class Measurement:
    """The policy after `updates` updates."""

    updates: int
    peak_shares: tuple[float, ...]  # share of the samples within PEAK_RADIUS of each peak
    reward_mean: float
    samples: Tensor  # [NUM_MEASURED_SAMPLES, 2] in the box

    def __str__(self) -> str:
        shares = " ".join(f"{share:4.0%}" for share in self.peak_shares)
        return (
            f"{self.updates:5,} updates, near the peaks {shares}, {self.num_covered} covered, "
            f"reward {self.reward_mean:.2f}"
        )

    @property
    def num_covered(self) -> int:
        return sum(share >= COVERED_SHARE for share in self.peak_shares)

    def to_row(self) -> dict[str, float | int]:
        """Returns the numbers, without the samples."""
        shares = {f"peak_{i}_share": share for i, share in enumerate(self.peak_shares, start=1)}
        return {
            "updates": self.updates,
            **shares,
            "peaks_covered": self.num_covered,
            "reward_mean": self.reward_mean,
        }


@dataclass(frozen=True)
class BanditRun:
    """One training: its measurements in order, the first before any update."""

    entropy_weight: float
    seed: int
    variance: float
    measurements: tuple[Measurement, ...]

    @property
    def final(self) -> Measurement:
        return self.measurements[-1]

    def to_rows(self) -> list[dict[str, float | int]]:
        """Returns a row of numbers per measurement."""
        about = {"seed": self.seed, "entropy_weight": self.entropy_weight}
        return [about | found.to_row() for found in self.measurements]

    def snapshots(self) -> list[Measurement]:
        """Returns the measurements that the figure shows: those nearest to SNAPSHOTS."""
        total = self.final.updates
        return [
            min(self.measurements, key=lambda m: abs(m.updates - share * total))
            for share in SNAPSHOTS
        ]


def train(
    hp: QVPOHyperparameters,
    *,
    seed: int,
    num_updates: int = NUM_UPDATES,
    variance: float = VARIANCE,
    report: Callable[[Measurement], None] | None = None,
) -> BanditRun:
    """Trains one policy on the bandit.

    Args:
        hp: see `single_state.APPLICABLE`; ω_ent = 0 is the row without the entropy term.
        seed: of the network, the training and the measurements; the same for both rows, which
            therefore begin with the same policy.
        report: called with every measurement as it is made.

    Raises:
        NonFiniteError: the loss is no longer finite.
    """
    policy = SingleStatePolicy(2, hp, seed=seed)
    measured = Generator().manual_seed(spawn_seed(seed, Stream.EVALUATION))
    marks = {round(num_updates * i / NUM_RECORDS) for i in range(NUM_RECORDS + 1)}
    measurements = []
    for updates in range(num_updates + 1):
        if updates in marks:
            samples = BOX * policy.sample(1, NUM_MEASURED_SAMPLES, measured)[0]
            measurements.append(measure(samples, updates, variance))
            if report is not None:
                report(measurements[-1])
        if updates < num_updates:
            samples = policy.sample(hp.batch_size, hp.num_policy_samples)
            policy.improve(samples, reward(BOX * samples, variance))
    return BanditRun(float(hp.entropy_weight), seed, variance, tuple(measurements))


def measure(samples: Tensor, updates: int, variance: float) -> Measurement:
    """Returns the numbers of `samples` [N, 2] in the box."""
    distance = torch.cdist(samples, torch.tensor(PEAKS))
    shares = (distance <= PEAK_RADIUS).float().mean(dim=0)
    return Measurement(
        updates,
        tuple(round(share, 6) for share in shares.tolist()),
        float(reward(samples, variance).mean()),
        samples,
    )


WINDOW = ((-2.0, 0.0), (0.0, 2.0))  # the paper's: x, y
CONTOURS = 7
SHOWN_SAMPLES = 400  # more would merge into a blot
SAMPLE_COLOR = "#0b3c6f"
PEAK_COLOR = "#c2410c"


def bandit_figure(without: BanditRun, with_entropy: BanditRun) -> Figure:
    """Returns policy samples over the reward's contours, both runs at the same four times."""
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
