"""QVPO's targets, weights and losses: pure functions, one per equation.

The objectives at the end compose them into what the two optimisers descend. An engine may compile
these: they are functions of modules and tensors alone.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qvpo_rllib.core.diffusion import NoiseSchedule

Q_EXP_RANGE = 8.0  # qexp clips its normalised Q to ±8 before the exponential


class Denoiser(Protocol):
    """What the objectives need of `networks.NoisePredictor`."""

    def obs_part(self, obs: Tensor) -> Tensor: ...

    def __call__(self, noisy_action: Tensor, t: Tensor, obs_part: Tensor) -> Tensor: ...


class Critic(Protocol):
    """What they need of `networks.TwinQ`."""

    def __call__(self, obs: Tensor, action: Tensor) -> Tensor: ...

    def loss(self, estimates: Tensor, target: Tensor) -> Tensor: ...


def td_target(reward: Tensor, terminal: Tensor, next_q: Tensor, gamma: float) -> Tensor:
    """Returns y = r + γ(1 - terminal)·min Q̄(s', a'), Algorithm 1, line 10. All are [B].

    next_q may also be quantiles [m, B]; y then has that shape.
    """
    return reward + gamma * (1 - terminal) * next_q


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Returns the sum of the twins' mean squared errors, Algorithm 1, line 11: [2, B], [B] → []."""
    return (q - target).square().mean(dim=1).sum()


def lowest_of(values: Tensor, count: int) -> Tensor:
    """Returns the `count` lowest values in ascending order: [..., V] → [..., count].

    A NaN among the values makes all of them NaN, as a minimum does: it is not to be dropped.
    """
    ordered = values.sort(dim=-1).values  # a NaN comes last
    last = ordered[..., -1:]
    return torch.where(last.isnan(), last, ordered[..., :count])


def quantile_loss(quantiles: Tensor, target: Tensor) -> Tensor:
    """Returns the sum of the twins' quantile Huber losses (TQC, Kuznetsov et al. 2020, section 3).

    Each is the mean over transitions, i and j of |τ_i - 1[y_j < z_i]|·Huber₁(y_j - z_i) with the
    levels τ_i = (i - ½)/n, as quantile regression has it (Dabney et al. 2018).

    Args:
        quantiles: z [2, B, n].
        target: y [m, B].
    """
    num = quantiles.shape[2]
    levels = (torch.arange(num, device=target.device, dtype=target.dtype) + 0.5) / num
    error = target.t()[:, None] - quantiles[..., None]  # [2, B, n, m]
    weights = torch.where(error.detach() < 0, 1 - levels[:, None], levels[:, None])
    huber = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none")
    return (weights * huber).mean(dim=(1, 2, 3)).sum()


def best_of(q: Tensor, actions: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Returns the k highest q [B, k] of each state, best first, and their actions [B, k, A].

    With k = 1 this is the choice of the K-efficient policy (section 4.4).

    Args:
        q, actions: [B, N] and [B, N, A].
    """
    top_q, index = top(q, k)
    return top_q, actions.gather(1, index[..., None].expand(-1, -1, actions.shape[-1]))


def top(q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k highest q of each state, best first, and where they are: [B, N] → [B, k]."""
    if k == 1:
        top_q, index = q.max(dim=1, keepdim=True)
    else:
        top_q, index = q.topk(k, dim=1)
    return top_q, index


def q_weights(
    kind: str,
    chosen_q: Tensor,
    value: Tensor,
    *,
    q_cut: float,
    q_mean: Tensor,
    q_std: Tensor,
    temperature: Tensor,
) -> Tensor:
    """Returns the weights ω_eq(s, a) of Eq. 6 for the chosen actions of each state.

    Args:
        kind: `qadv` max(Q - V, 0), Eq. 9; `qcut` Q where Q ≥ 0 and `q_cut` (ε) below, section 4.2;
            `qrelu` max(Q, 0), Eq. 7 without its denominator; `qexp` exp of the normalised Q;
            `softmax` the shares softmax(Q/λ), which maximise Q within a KL divergence from equal
            ones (REPS, Peters et al. 2010; MPO, Abdolmaleki et al. 2018). They sum to 1: together
            the samples count for one action.
        chosen_q: [B, k], the lower of the twins' estimates.
        value: V(s) [B], the mean Q of the state's N_d samples.
        q_mean, q_std: running statistics of Q over all samples, scalars; used by `qexp` alone.
        temperature: λ, a scalar; used by `softmax` alone.

    Returns:
        [B, k], never negative.
    """
    if kind == "qadv":
        return (chosen_q - value[:, None]).clamp(min=0)
    if kind == "qcut":
        return torch.where(chosen_q >= 0, chosen_q, q_cut)
    if kind == "qrelu":
        return chosen_q.clamp(min=0)
    if kind == "qexp":
        return ((chosen_q - q_mean) / q_std).clamp(-Q_EXP_RANGE, Q_EXP_RANGE).exp()
    if kind == "softmax":
        return torch.softmax(chosen_q / temperature, dim=1)
    raise ValueError(f"q_weights={kind!r} does not exist: use qadv, qcut, qrelu, qexp or softmax.")


def soft_weight_kl(weights: Tensor) -> Tensor:
    """Returns ln N - H(w), the KL divergence of the shares w from equal ones: [B, N] → [].

    The mean over the states, in nats.
    """
    return math.log(weights.shape[1]) + torch.xlogy(weights, weights).sum(dim=1).mean()


def entropy_weights(weights: Tensor, entropy_weight: Tensor | float, num_chosen: int) -> Tensor:
    """Returns ω_ent(s) of Eq. 10: ω_ent times the chosen actions' mean ω_eq. [B, k] → [B].

    Args:
        num_chosen: as many actions the k ones count for.
    """
    return entropy_weight * weights.sum(dim=1) / num_chosen


def nearest_sample_distance(samples: Tensor) -> Tensor:
    """Returns a sample's mean Euclidean distance to the nearest other one of its state.

    [B, N, A] → []. It is near 0 where the samples of a state have collapsed into clusters, and 0
    for N = 1.
    """
    num_samples = samples.shape[1]
    if num_samples == 1:
        return samples.new_zeros(())
    squared = (samples[:, :, None] - samples[:, None]).square().sum(-1)  # [B, N, N]
    to_itself = torch.eye(num_samples, dtype=torch.bool, device=samples.device)
    return squared.masked_fill(to_itself, math.inf).amin(-1).sqrt().mean()


def denoising_error(predicted: Tensor, noise: Tensor) -> Tensor:
    """Returns ‖ε - ε_θ‖² of Eq. 5 per row: [R, A], [R, A] → [R].

    Deviation: the mean over action dimensions instead of their sum, as in the authors' program.
    It divides the loss by A, which Adam undoes except for the gradient clip.
    """
    return (predicted - noise).square().mean(dim=-1)


def policy_loss(
    best_error: Tensor,
    best_weight: Tensor,
    uniform_error: Tensor,
    uniform_weight: Tensor,
    reduction: str,
    num_best: int,
) -> tuple[Tensor, Tensor]:
    """Returns the Q-weighted VLO loss (Eq. 6) and the diffusion entropy term (Eq. 10).

    Args:
        best_error, best_weight: [B·k], the chosen samples' denoising errors and weights ω_eq.
        uniform_error, uniform_weight: [B·N_e], the uniform actions' errors and weights ω_ent(s).
        reduction: "mean" gives the two expectations. "sum" divides both sums by the number of all
            rows, B·k + B·N_e, as the authors' program does: the entropy term then counts N_e/k
            times Eq. 10.
        num_best: as many actions the B·k ones count for; B where a state's k weights are shares.

    Returns:
        The two terms, whose sum is the policy's loss.
    """
    best = (best_weight * best_error).sum()
    uniform = (uniform_weight * uniform_error).sum()
    if reduction == "sum":
        rows = num_best + uniform_error.numel()
        return best / rows, uniform / rows
    if reduction == "mean":
        return best / num_best, uniform / max(1, uniform_error.numel())
    raise ValueError(f"reduction={reduction!r} does not exist: use sum or mean.")


def critic_objective(
    critic: Critic, obs: Tensor, action: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the critics' loss and mean estimate: obs [B, O], action [B, A], target [..., B]."""
    q = critic(obs, action)
    return critic.loss(q, target), q.detach().mean()


def denoising_objective(
    actor: Denoiser,
    schedule: NoiseSchedule,
    obs: Tensor,
    action: Tensor,
    step: Tensor,
    noise: Tensor,
) -> Tensor:
    """Returns mean ‖ε - ε_θ(x_t, s, t)‖² / A: obs [B, O], action, noise [B, A], step [B] int64."""
    noisy = schedule.q_sample(action, step, noise)
    return denoising_error(actor(noisy, step, actor.obs_part(obs)), noise).mean()


def actor_objective(
    actor: Denoiser,
    schedule: NoiseSchedule,
    obs: Tensor,
    chosen: Tensor,
    chosen_weights: Tensor,
    uniform: Tensor,
    uniform_weights: Tensor,
    step: Tensor,
    noise: Tensor,
    reduction: str,
    vlo_coefficient: bool,
    num_counted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns Eq. 6 plus Eq. 10 on the k chosen and the N_e uniform actions of each state.

    Args:
        obs: [B, O].
        chosen, chosen_weights: [B, k, A] and [B, k].
        uniform, uniform_weights: [B, N_e, A] and [B].
        step, noise: [B·(k + N_e)] int64 and [B·(k + N_e), A]; the chosen actions' rows come
            first, state by state, then those of all uniform actions.
        num_counted: as many actions a state's k chosen ones count for.

    Returns:
        The loss, its entropy term, and the mean denoising error: scalars.
    """
    num_chosen, num_uniform = chosen.shape[1], uniform.shape[1]
    actions = torch.cat([chosen.flatten(0, 1), uniform.flatten(0, 1)])
    noisy = schedule.q_sample(actions, step, noise)
    obs_part = actor.obs_part(obs)
    row_part = torch.cat(
        [
            obs_part.repeat_interleave(num_chosen, dim=0),
            obs_part.repeat_interleave(num_uniform, dim=0),
        ]
    )
    error = denoising_error(actor(noisy, step, row_part), noise)
    mean_error = error.detach().mean()
    if vlo_coefficient:
        error = error * schedule.vlo_coefficient[step]
    best_rows = chosen_weights.numel()
    best_term, entropy_term = policy_loss(
        error[:best_rows],
        chosen_weights.flatten(),
        error[best_rows:],
        uniform_weights.repeat_interleave(num_uniform),
        reduction,
        obs.shape[0] * num_counted,
    )
    return best_term + entropy_term, entropy_term.detach(), mean_error
