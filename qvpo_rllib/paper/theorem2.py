"""Theorem 2 in one dimension: what a policy becomes that is trained on Q-weighted samples.

A behaviour policy π and a Q on [-1, 1] are fixed and known. Training on samples of π, weighted by
Eq. 7's max(Q, 0), must give p = π·max(Q, 0) / ∫ π·max(Q, 0). The weights of the algorithm, qcut and
qadv, on all samples or on the best of N_d, give other densities, which are known here as well. The
Kolmogorov-Smirnov distance says how near the trained policy's samples are to each.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.integrate import cumulative_trapezoid, trapezoid
from scipy.stats import kstest, truncnorm
from torch import Generator, Tensor

from qvpo_rllib.core.diffusion import NoiseSchedule, q_posterior
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.seeding import Stream, sequence, spawn_seed
from qvpo_rllib.paper.single_state import SingleStatePolicy

Array = NDArray[np.float64]

BEHAVIOR_STD = 0.5
BEHAVIOR = truncnorm(-1 / BEHAVIOR_STD, 1 / BEHAVIOR_STD, scale=BEHAVIOR_STD)  # on [-1, 1]
GRID: Array = np.linspace(-1, 1, 4001)  # of actions, for every integral

# N_d is the paper's. No entropy term: the theorem is about Eq. 6 alone. T is 50, not 20, because a
# chain of 20 steps misses the density visibly even with a perfect network (see `chain_distance`).
HYPERPARAMETERS: dict[str, Any] = {
    "diffusion_steps": 50,
    "hidden": (128, 128),
    "actor_lr": 1e-2,
    "num_uniform_samples": 0,
    "entropy_weight": 0.0,
}
FIXED = ("q_weights", "num_chosen_samples", "batch_size")  # what each training sets itself
NUM_UPDATES = 3000
ROWS_PER_UPDATE = 512  # trained samples of one update
NUM_MEASURED_SAMPLES = 20_000


@dataclass(frozen=True)
class Variant:
    """A weighting: which weights, and on how many of the N_d samples."""

    q_weights: str
    best_only: bool
    title: str


VARIANTS = (
    Variant("qrelu", False, "Eq. 7: max(Q, 0)"),
    Variant("qcut", False, "qcut, all samples"),
    Variant("qadv", False, "qadv, all samples"),
    Variant("qcut", True, "qcut, best of N_d"),
    Variant("qadv", True, "qadv, best of N_d"),
)


def q_function(action: Any) -> Any:
    """Returns Q(a) = sin(2πa) + a/2 + 1/2 of an array or a tensor: unequal hills, and V = 1/2.

    V is not 0, so that qadv asks for something else than Eq. 7.
    """
    sine = torch.sin if isinstance(action, Tensor) else np.sin
    return sine(2 * np.pi * action) + action / 2 + 0.5


def behavior_density() -> Array:
    """Returns π on GRID."""
    return np.asarray(BEHAVIOR.pdf(GRID))


def expected_density(variant: Variant, hp: QVPOHyperparameters) -> Array:
    """Returns the density on GRID that the weighted samples have, and the policy should learn.

    All samples: p ∝ π·ω(Q). The best of N: its density is N·π·F(Q)^(N-1), F being the distribution
    function of Q under π, and p ∝ ω(Q) times that. V, for qadv, is the mean of Q under π (in
    training, the mean over N_d samples).
    """
    density, q = behavior_density(), q_function(GRID)
    value = trapezoid(density * q, GRID)
    weight = {
        "qrelu": np.maximum(q, 0),
        "qcut": np.where(q >= 0, q, hp.q_cut),
        "qadv": np.maximum(q - value, 0),
    }[variant.q_weights]
    if variant.best_only:
        order = np.argsort(q)
        below = np.empty_like(q)
        below[order] = np.cumsum(density[order]) / density.sum()  # F(Q)
        weight = weight * below ** (hp.num_policy_samples - 1)
    product = density * weight
    return np.asarray(product / trapezoid(product, GRID))


def ks_distance(samples: Array, density: Array) -> float:
    """Returns the Kolmogorov-Smirnov distance, in [0, 1], of `samples` [N] to `density` on GRID."""
    cumulative = cumulative_trapezoid(density, GRID, initial=0)
    cumulative /= cumulative[-1]
    return float(kstest(samples, lambda a: np.interp(a, GRID, cumulative)).statistic)


def chain_distance(
    density: Array,
    hp: QVPOHyperparameters,
    *,
    seed: int,
    num_samples: int = NUM_MEASURED_SAMPLES,
) -> float:
    """Returns the Kolmogorov-Smirnov distance that the chain of T steps itself makes.

    Samples are drawn with the exact posterior mean E[x_0 | x_t], by quadrature, in place of a
    network: what remains is the error of T Gaussian reverse steps, which no training removes.
    """
    schedule = NoiseSchedule(hp.noise_schedule, hp.diffusion_steps)
    grid, mass = torch.tensor(GRID[::10]), torch.tensor(density[::10])
    generator = Generator().manual_seed(spawn_seed(seed, Stream.EVALUATION))
    x = torch.randn(num_samples, generator=generator, dtype=torch.float64)
    for t in reversed(range(hp.diffusion_steps)):
        mean = float(schedule.sqrt_alphas_cumprod[t]) * grid
        std = float(schedule.sqrt_one_minus_alphas_cumprod[t])
        log_posterior = mass.log() - ((x[:, None] - mean) / std).square() / 2
        x0 = torch.softmax(log_posterior, dim=1) @ grid
        x, sigma = q_posterior(x0, x, schedule.reverse_steps[t].unbind())
        if t > 0:
            x = x + sigma * torch.randn(num_samples, generator=generator, dtype=torch.float64)
    return ks_distance(x.numpy(), density)


@dataclass(frozen=True)
class VariantResult:
    """A trained policy against the densities it might have."""

    variant: Variant
    expected: Array  # on GRID
    samples: Array  # [NUM_MEASURED_SAMPLES]
    ks_expected: float  # to the variant's own density
    ks_theorem2: float  # to Eq. 7's
    ks_behavior: float  # to π

    def __str__(self) -> str:
        return (
            f"{self.variant.title:18} KS to what it asks for {self.ks_expected:.3f}, to Eq. 7's "
            f"density {self.ks_theorem2:.3f}, to the behaviour policy {self.ks_behavior:.3f}"
        )

    @property
    def negative_share(self) -> float:
        """The share of the samples whose Q is negative."""
        return float((q_function(self.samples) < 0).mean())

    def to_row(self) -> dict[str, Any]:
        """Returns the numbers, without samples and density."""
        return {
            "q_weights": self.variant.q_weights,
            "trained_on": "best" if self.variant.best_only else "all",
            "ks_expected": self.ks_expected,
            "ks_theorem2": self.ks_theorem2,
            "ks_behavior": self.ks_behavior,
            "negative_q_share": self.negative_share,
            "q_mean": float(q_function(self.samples).mean()),
        }


def variant_hyperparameters(variant: Variant, hp: QVPOHyperparameters) -> QVPOHyperparameters:
    """Returns `hp` with the variant's weights, and a batch that trains ROWS_PER_UPDATE samples."""
    chosen = 1 if variant.best_only else hp.num_policy_samples
    return dataclasses.replace(
        hp,
        q_weights=variant.q_weights,
        num_chosen_samples=chosen,
        batch_size=max(1, ROWS_PER_UPDATE // chosen),
    )


def train(
    variant: Variant,
    hp: QVPOHyperparameters,
    *,
    seed: int,
    num_updates: int = NUM_UPDATES,
    report: Callable[[int], None] | None = None,
) -> VariantResult:
    """Trains a policy on weighted samples of π and measures it.

    Args:
        hp: see `single_state.APPLICABLE`; weights, chosen samples and batch size are the variant's.
        report: called with the number of updates done, now and then.
    """
    hp = variant_hyperparameters(variant, hp)
    policy = SingleStatePolicy(1, hp, seed=seed)
    drawn = np.random.default_rng(sequence(seed, Stream.ACTION))
    shape = (hp.batch_size, hp.num_policy_samples)
    cumulative = BEHAVIOR.cdf(GRID)
    for update in range(1, num_updates + 1):
        # A learning rate that falls to zero takes Adam's noise out of the final policy.
        policy.set_learning_rate(hp.actor_lr * (1 - (update - 1) / num_updates))
        # By the inverse of π's distribution function, interpolated: scipy's own takes longer than
        # the update.
        uniform = drawn.random(shape)
        actions = torch.from_numpy(np.interp(uniform, cumulative, GRID).astype(np.float32))
        policy.improve(actions[..., None], q_function(actions))
        if report is not None and (update % 50 == 0 or update == num_updates):
            report(update)
    generator = Generator().manual_seed(spawn_seed(seed, Stream.EVALUATION))
    samples = policy.sample(1, NUM_MEASURED_SAMPLES, generator).flatten().double().numpy()
    expected = expected_density(variant, hp)
    return VariantResult(
        variant,
        expected,
        samples,
        ks_distance(samples, expected),
        ks_distance(samples, expected_density(VARIANTS[0], hp)),
        ks_distance(samples, behavior_density()),
    )


SAMPLE_COLOR = "#b9c7d6"
EXPECTED_COLOR = "#0b3c6f"
THEOREM_COLOR = "#c2410c"
BINS = 80


def theorem2_figure(results: Sequence[VariantResult]) -> Figure:
    """Returns the five policies' samples and densities; the first result is Eq. 7's."""
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
