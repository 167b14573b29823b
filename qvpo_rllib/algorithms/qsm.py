"""QSM (Psenka et al., ICML 2024): a diffusion policy whose score matches the critics' gradient."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from ray.tune.registry import register_trainable
from torch import Generator, Tensor

from qvpo_rllib.algorithms.shared_options import LIGHT, QUICK, DiffusionRivalHyperparameters
from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.learner import OffPolicyLearner
from qvpo_rllib.core.networks import NoisePredictor, TwinQ
from qvpo_rllib.core.options import NON_NEGATIVE, POSITIVE, Setting, option, with_default
from qvpo_rllib.core.qvpo import QVPONetworks
from qvpo_rllib.core.replay import Transitions
from qvpo_rllib.core.sampler import Trunk, min_q, run_trunk
from qvpo_rllib.rollout.policy import OffPolicyTorchPolicy
from qvpo_rllib.runtime.algorithm import OffPolicyAlgorithm
from qvpo_rllib.runtime.config import OffPolicyConfig


@dataclass(frozen=True, kw_only=True)
class QSMHyperparameters(DiffusionRivalHyperparameters):
    """The values of QVPO's comparison (T = 20) and of QSM's authors."""

    presets: ClassVar[Mapping[str, Setting]] = {
        "default": {},
        # M_q · √β_1 times the curvature of Q has to stay below 2, or the last step overshoots.
        "light": LIGHT
        | {"diffusion_steps": 10, "q_gradient_scale": 1.0, "hidden": (256, 256), "tau": 0.01},
        "quick": QUICK | {"q_gradient_scale": 1.0, "tau": 0.01},
    }

    hidden: tuple[int, ...] = with_default(DiffusionRivalHyperparameters, "hidden", (512, 512))
    adam_eps: float = with_default(DiffusionRivalHyperparameters, "adam_eps", 1e-8)
    grad_clip: float | None = with_default(DiffusionRivalHyperparameters, "grad_clip", None)
    noise_schedule: str = with_default(DiffusionRivalHyperparameters, "noise_schedule", "vp")
    q_gradient_scale: float = option(
        50.0, "the critics' gradient times this is the score to be matched", "M_q", range=POSITIVE
    )
    exploration_noise: float = option(
        0.1,
        "standard deviation of what is added to act with, and to the target's action",
        range=NON_NEGATIVE,
    )


class UpdateNoise(NamedTuple):
    """Every random number of one update."""

    target: Tensor  # [T, B, A] standard normal: the TD target's actions
    exploration: Tensor  # [B, A] standard normal: what is added to them
    step: Tensor  # [B] int64 in [0, T): the diffusion step of each trained row
    forward: Tensor  # [B, A] standard normal: what makes replay actions noisy


@torch.no_grad()
def sample(actor: NoisePredictor, schedule: NoiseSchedule, obs: Tensor, noise: Tensor) -> Tensor:
    """One action per state by the reverse process of QSM's authors.

    x_{t-1} = clip((x_t - β_t / √(1 - ᾱ_t) · ε_θ) / √(1 - β_t) + √β_t · z, ±1); the last step adds
    no z.

    Args:
        obs: [B, O].
        noise: [T, B, A] standard normal; the first slice is x_T.

    Returns:
        [B, A] in [-1, 1].
    """
    firsts = actor.time_part()[:, None] + actor.obs_part(obs) + actor.mlp.linears()[0].bias
    trunk = Trunk.of(actor.mlp, 0)
    betas, spread = schedule.betas, schedule.sqrt_one_minus_alphas_cumprod
    x, last = noise[0], schedule.diffusion_steps - 1
    for t in range(last, -1, -1):
        predicted = run_trunk(x, firsts[t], trunk)
        x = (x - betas[t] / spread[t] * predicted) / (1 - betas[t]).sqrt()
        if t > 0:
            x = x + betas[t].sqrt() * noise[last - t + 1]
        x = x.clamp(-1, 1)
    return x


def with_noise(action: Tensor, noise: Tensor, std: float) -> Tensor:
    """clip(a + std · noise, ±1): all [B, A]."""
    return (action + std * noise).clamp(-1, 1)


def q_gradient(critic: TwinQ, obs: Tensor, action: Tensor) -> Tensor:
    """The mean over the twins of ∇_a Q(s, a): obs [B, O], action [B, A] → [B, A]."""
    action = action.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(obs, action).mean(dim=0).sum(), action)
    return gradient


def score_matching_loss(predicted: Tensor, gradient: Tensor, scale: float) -> Tensor:
    """mean ‖-M_q ∇Q - ε_θ‖² over the rows: predicted, gradient [B, A]."""
    return (-scale * gradient - predicted).square().sum(dim=-1).mean()


class QSMLearner(OffPolicyLearner[QVPONetworks, QSMHyperparameters, UpdateNoise]):
    """Fits critics, then the actor, to one batch; it does not use the target actor."""

    def draw_update_noise(self, batch_size: int) -> UpdateNoise:
        steps, shape = self.hp.diffusion_steps, (batch_size, self.networks.act_dim)
        drawn: dict[str, Any] = {"generator": self.generator, "device": self.device}
        return UpdateNoise(
            target=torch.randn(steps, *shape, **drawn),
            exploration=torch.randn(shape, **drawn),
            step=torch.randint(steps, (batch_size,), **drawn),
            forward=torch.randn(shape, **drawn),
        )

    def update(
        self, batch: Transitions, /, *, noise: UpdateNoise | None = None
    ) -> dict[str, Tensor]:
        if noise is None:
            noise = self.draw_update_noise(batch.reward.shape[0])
        metrics = self._update_critic(batch, noise) | self._update_policy(batch, noise)
        self.move_target(self.networks.target_critic, self.networks.critic)
        return metrics

    def _update_critic(self, batch: Transitions, noise: UpdateNoise) -> dict[str, Tensor]:
        nets, hp = self.networks, self.hp
        sampled = sample(nets.actor, nets.schedule, batch.next_obs, noise.target)
        next_action = with_noise(sampled, noise.exploration, hp.exploration_noise)
        next_q = min_q(
            nets.target_critic, batch.next_obs, next_action[:, None], self.kernels.sampler
        ).squeeze(1)
        return self.fit_critics(batch, next_q)

    def _update_policy(self, batch: Transitions, noise: UpdateNoise) -> dict[str, Tensor]:
        nets = self.networks
        noisy = nets.schedule.q_sample(batch.action, noise.step, noise.forward)
        gradient = q_gradient(nets.critic, batch.obs, noisy)
        predicted = nets.actor(noisy, noise.step, nets.actor.obs_part(batch.obs))
        loss = score_matching_loss(predicted, gradient, self.hp.q_gradient_scale)
        grad_norm = self.descend(loss, self.actor_optimizer)
        return {
            "actor_loss": loss.detach(),
            "actor_grad_norm": grad_norm,
            "q_gradient_norm": gradient.norm(dim=-1).mean(),
        }


class QSMTorchPolicy(OffPolicyTorchPolicy[QVPONetworks, QSMHyperparameters]):
    """Acts with one diffusion sample, plus Gaussian noise to explore."""

    hyperparameters_class = QSMHyperparameters
    networks_class = QVPONetworks
    learner_class = QSMLearner

    def _act(self, obs: Tensor, explore: bool, k: int, generator: Generator) -> tuple[Tensor, None]:
        nets, shape = self.acting_networks(), (obs.shape[0], self.act_dim)
        noise = torch.randn(self.hp.diffusion_steps, *shape, generator=generator)
        action = sample(nets.actor, nets.schedule, obs, noise)
        if not explore:
            return action, None
        added = torch.randn(shape, generator=generator)
        return with_noise(action, added, self.hp.exploration_noise), None


class QSMConfig(OffPolicyConfig):
    """Configuration of `QSM`; `training(...)` takes every field of `QSMHyperparameters`."""

    hyperparameters_class = QSMHyperparameters
    algorithm_name = "QSM"


class QSM(OffPolicyAlgorithm):
    """QSM on this package's runtime; see `OffPolicyAlgorithm`."""

    config_class = QSMConfig
    policy_class = QSMTorchPolicy


register_trainable("QSM", QSM)
