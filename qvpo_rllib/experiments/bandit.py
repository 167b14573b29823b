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
from torch import Generator, Tensor

from qvpo_rllib.core.hyperparameters import Hyperparameters
from qvpo_rllib.core.seeding import Stream, spawn_seed
from qvpo_rllib.experiments.single_state import SingleStatePolicy

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
    """R(x) = Σ_i w / (2πσ²) · exp(-‖x - μ_i‖² / (2σ²)), section 4.3. [..., 2] → [...]."""
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

    @property
    def num_covered(self) -> int:
        return sum(share >= COVERED_SHARE for share in self.peak_shares)

    def to_row(self) -> dict[str, float | int]:
        """The numbers, without the samples."""
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

    def snapshots(self) -> list[Measurement]:
        """The measurements that the figure shows: those nearest to SNAPSHOTS."""
        total = self.final.updates
        return [
            min(self.measurements, key=lambda m: abs(m.updates - share * total))
            for share in SNAPSHOTS
        ]


def train(
    hp: Hyperparameters,
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
    return BanditRun(hp.entropy_weight, seed, variance, tuple(measurements))


def measure(samples: Tensor, updates: int, variance: float) -> Measurement:
    """The numbers of `samples` [N, 2] in the box."""
    distance = torch.cdist(samples, torch.tensor(PEAKS))
    shares = (distance <= PEAK_RADIUS).float().mean(dim=0)
    return Measurement(
        updates,
        tuple(round(share, 6) for share in shares.tolist()),
        float(reward(samples, variance).mean()),
        samples,
    )
