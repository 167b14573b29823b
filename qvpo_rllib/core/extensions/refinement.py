"""Moves an action towards a higher Q: after the chain, by its own ascent, or within the chain.

Both need the critics' gradient with respect to actions, and nothing here changes the critics.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from qvpo_rllib.core import losses
from qvpo_rllib.core.backends.native import PackedCritic
from qvpo_rllib.core.diffusion import NoiseSchedule, predict_x0
from qvpo_rllib.core.networks import NoisePredictor, TwinQ
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters

Gradient = Callable[[Tensor], Tensor]  # action [R, A] → the gradient of Q there [R, A]

CLIMB_RATIO = 0.1  # of the authors' `--gradient`
BETA_1, BETA_2, ADAM_EPS = 0.9, 0.999, 1e-5
# Of the running mean of (Q - V)², and its least: where all Q are equal, guidance divides by 1e-6.
ADVANTAGE_RATE, LEAST_SQUARE = 1e-3, 1e-12


def improved_actions(
    gradient_of: Gradient, action: Tensor, steps: int, lr: float, max_norm: float
) -> Tensor:
    """Returns actions [R, A] after `steps` steps of Adam on -Σ Q(s, a), clamped after each.

    DIPO (Yang et al. 2023, Algorithm 1) improves the replay's actions so, the authors' program
    of QVPO with `--gradient` the best samples. It is `torch.optim.Adam` to the last bit, but reads
    no step count from the device, so that it can be captured.

    Args:
        max_norm: of the gradient with respect to the whole batch of actions.
    """
    action = action.clone()
    mean, square = torch.zeros_like(action), torch.zeros_like(action)
    for step in range(1, steps + 1):
        gradient = -gradient_of(action)
        gradient = gradient * (max_norm / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1)
        mean.lerp_(gradient, 1 - BETA_1)
        square.mul_(BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
        scale = (square.sqrt() / math.sqrt(1 - BETA_2**step)).add_(ADAM_EPS)
        action.addcdiv_(mean, scale, value=-lr / (1 - BETA_1**step)).clamp_(-1, 1)
    return action


def guided_actions(
    actor: NoisePredictor,
    schedule: NoiseSchedule,
    gradient_of: Gradient,
    obs: Tensor,
    noise: Tensor,
    steps: int,
    scale: Tensor,
) -> Tensor:
    """Returns the actions of a reverse process whose last `steps` steps the critics guide.

    ε_g = ε_θ - scale·√(1 - ᾱ_t)·∇_{x_t} Q(s, x̂_0(x_t)), x̂_0 clipped: classifier guidance
    (Dhariwal & Nichol 2021, Algorithm 2) with Q for the classifier's logarithm, as CGPO has it in
    the last half of the chain. The gradient passes through ε_θ.

    Args:
        obs: [R, O].
        noise: [T, R, A] standard normal, used as in `sampler.sample_actions`: without a scale the
            actions are the same.
        steps: all, where the chain has fewer.
        scale: λ in units of 1/Q, a scalar.

    Returns:
        [R, A] in [-1, 1].
    """
    last = schedule.diffusion_steps - 1
    obs_part = actor.obs_part(obs).detach()
    x = noise[0]
    for t in range(last, -1, -1):
        step = actor.steps[t].expand(x.shape[0])
        with torch.set_grad_enabled(t < steps):
            leaf = x.detach().requires_grad_(t < steps)
            predicted = actor(leaf, step, obs_part)
            if t < steps:
                constants = schedule.reverse_steps[t].to(x.dtype).unbind()
                x0 = predict_x0(leaf, predicted, constants)
                (gradient,) = torch.autograd.grad(x0, leaf, gradient_of(x0))
                pull = scale * schedule.sqrt_one_minus_alphas_cumprod[t]
                predicted = predicted.detach() - pull * gradient
        x = schedule.p_sample(x, t, predicted, noise[last + 1 - t] if t > 0 else None)
    return x.clamp(-1, 1)


class Networks(Protocol):
    """What a refinement reads of `QVPONetworks`."""

    act_dim: int
    actor: NoisePredictor
    schedule: NoiseSchedule


class Refinement:
    """Moves the chosen samples of an update as `target_refinement` says.

    Attributes:
        advantage_square: the running mean of (Q - V)², a scalar; 0 before the first one.
    """

    def __init__(self, device: torch.device) -> None:
        self.advantage_square = torch.zeros((), device=device)

    def moved(
        self,
        nets: Networks,
        hp: QVPOHyperparameters,
        obs: Tensor,
        q: Tensor,
        chosen: Tensor,
        noise: Tensor,
        critic: TwinQ | PackedCritic,
    ) -> Tensor:
        """Returns the moved actions, [B, k, A].

        Deviation: guidance draws the chosen samples' chains once more, each by its own noise, as
        CGPO draws one chain for each state; guiding all N_d would take N_d times as long.

        Args:
            obs, q, noise: [B, O], [B, N_d], [T, B, N_d, A]: of all samples.
            chosen: [B, k, A], those of the highest q.
            critic: whose Q is to rise.
        """
        k = chosen.shape[1]
        rows = obs.repeat_interleave(k, dim=0)
        gradient_of = critic.q_gradient(rows)
        if hp.target_refinement == "gradient":
            limit = CLIMB_RATIO * nets.act_dim
            actions = chosen.flatten(0, 1)
            moved = improved_actions(gradient_of, actions, hp.gradient_steps, hp.gradient_lr, limit)
        else:
            index = losses.top(q, k)[1][None, ..., None]
            own = noise.gather(2, index.expand(len(noise), -1, -1, nets.act_dim)).flatten(1, 2)
            scale = hp.guidance_scale * self._advantage(q).rsqrt()
            moved = guided_actions(
                nets.actor, nets.schedule, gradient_of, rows, own, hp.guidance_steps, scale
            )
        return moved.view_as(chosen)

    def _advantage(self, q: Tensor) -> Tensor:
        """Returns the running mean of (Q - V)² with that of q [B, N_d] taken in."""
        known, new = self.advantage_square, q.var(dim=1, correction=0).mean()
        known.copy_(torch.where(known > 0, known.lerp(new, ADVANTAGE_RATE), new))
        return known.clamp(min=LEAST_SQUARE)
