"""The entropy of a diffusion policy, and its place in the TD target."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qvpo_rllib.core.diffusion import NoiseSchedule, predict_x0
from qvpo_rllib.core.extensions.learnt import LearntScale
from qvpo_rllib.core.networks import NoisePredictor
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.sampler import Trunk, run_trunk

Predictor = Callable[[Tensor, int], Tensor]  # noisy actions [B, M, A], step t → their noise


def noise_predictor(actor: NoisePredictor, obs: Tensor) -> Predictor:
    """Returns ε_θ(·, s, t) of the states obs [B, O]; to be called without gradients."""
    trunk = Trunk.of(actor.mlp, 0)
    obs_part = actor.obs_part(obs) + actor.mlp.linears()[0].bias  # [B, H]
    firsts = actor.time_part()[:, None] + obs_part  # [T, B, H]
    return lambda noisy, t: run_trunk(noisy.flatten(0, 1), firsts[t], trunk).view_as(noisy)


def log_density(
    predict: Predictor, schedule: NoiseSchedule, action: Tensor, noise: Tensor
) -> Tensor:
    """Returns an estimate of ln p(a | s), [B] in nats, from the noise predictor alone.

    ln p̂ = -(A/2)·ln(2πe) + Σ_t (ᾱ_{t-1} - ᾱ_t) / (2ᾱ_t(1 - ᾱ_t))·(A·ᾱ_t - E‖ε̂ - ε‖²), with ε̂ of x̂_0
    clipped to the box: the I-MMSE identity (Kong et al. 2023) as MaxEntDP sums it over the chain's
    steps (Dong et al. 2025). ε̂ - ε is written here as √(ᾱ_t / (1 - ᾱ_t))·(a - x̂_0), which it is:
    float32 loses the difference at the noisy end.

    A sum over few steps sees the density blurred by about the first step's noise, of standard
    deviation √(1 - ᾱ_1). For a Gaussian, the cosine schedule and T = 20 the estimate is too low by
    0.1 nat per dimension at a deviation of 0.3, and by 0.4 at 0.1; for T = 1000 by 0.02 at both.
    A schedule whose ᾱ_T is far from 0 (linear, few steps) leaves out what lies below it.

    Args:
        predict: see `noise_predictor`.
        action: [B, A] in [-1, 1].
        noise: [T, B, M, A] standard normal: M draws of ε for each step.
    """
    act_dim = action.shape[-1]
    bar = schedule.reverse_steps[:, 0].pow(-2)  # ᾱ in float64
    before = torch.cat([torch.ones_like(bar[:1]), bar[:-1]])
    shares = ((before - bar) / (2 * (1 - bar))).to(action.dtype).unbind()
    variances = (1 - bar).to(action.dtype).unbind()
    total = torch.full_like(action[:, 0], -act_dim / 2 * math.log(2 * math.pi * math.e))
    for t, (share, variance) in enumerate(zip(shares, variances, strict=True)):
        noisy = (1 - variance).sqrt() * action[:, None] + variance.sqrt() * noise[t]
        constants = schedule.reverse_steps[t].to(action.dtype).unbind()
        x0 = predict_x0(noisy, predict(noisy, t), constants)
        error = (action[:, None] - x0).square().sum(-1).mean(-1)
        total = total + share * (act_dim - error / variance)
    return total


class TargetEntropy:
    """What the TD target subtracts from min Q̄(s', a'): α·ln p̂(a' | s').

    Attributes:
        weight: α where it is learnt: it falls while the entropy is above `target_entropy`, as SAC's
            (Haarnoja et al. 2018, Eq. 18).
        estimate: the last mean of -ln p̂, a scalar.
    """

    def __init__(self, device: torch.device) -> None:
        self.weight = LearntScale(0.05, device)
        self.estimate = torch.zeros((), device=device)

    def weight_of(self, hp: QVPOHyperparameters) -> Tensor | float:
        """Returns α in force."""
        return self.weight.value if hp.entropy_in_target == "auto" else hp.entropy_in_target

    @torch.no_grad()
    def price(
        self,
        actor: NoisePredictor,
        schedule: NoiseSchedule,
        hp: QVPOHyperparameters,
        obs: Tensor,
        action: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Returns α·ln p̂ [B] of action [B, A] in obs [B, O], and learns α if it is `auto`.

        p is the policy that draws, not the best of K_t.
        """
        log_p = log_density(noise_predictor(actor, obs), schedule, action, noise)
        self.estimate.copy_(-log_p.mean())
        price = self.weight_of(hp) * log_p
        if hp.entropy_in_target == "auto":
            target = -action.shape[1] if hp.target_entropy is None else hp.target_entropy
            self.weight.descend(self.estimate - target)
        return price
