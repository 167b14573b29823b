"""DIPO (Yang et al. 2023): replay actions climb the critics' gradient, diffusion fits them.

The replay keeps a second copy of every action, which each update improves and writes back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from ray.tune.registry import register_trainable
from torch import Generator, Tensor, nn

from qvpo_rllib.core import losses
from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.hyperparameters import Hyperparameters, OffPolicyHyperparameters
from qvpo_rllib.core.learner import Networks
from qvpo_rllib.core.networks import NoisePredictor, TwinQ
from qvpo_rllib.core.objectives import critic_objective
from qvpo_rllib.core.off_policy_learner import OffPolicyLearner
from qvpo_rllib.core.options import COUNT, POSITIVE, option, with_default
from qvpo_rllib.core.replay import ReplayBuffer, Transitions
from qvpo_rllib.core.sampler import draw_noise, min_q, sample_actions
from qvpo_rllib.off_policy.algorithm import OffPolicyAlgorithm
from qvpo_rllib.off_policy.config import OffPolicyConfig
from qvpo_rllib.off_policy.policy import OffPolicyTorchPolicy

ACTION_ADAM_EPS = 1e-5


def _task(
    grad_clip: float, action_clip_ratio: float, action_steps: int = 20, target_interval: int = 1
) -> dict[str, Any]:
    return {
        "grad_clip": grad_clip,
        "action_clip_ratio": action_clip_ratio,
        "action_steps": action_steps,
        "target_actor_interval": target_interval,
    }


@dataclass(frozen=True, kw_only=True)
class DIPOHyperparameters(OffPolicyHyperparameters):
    """The values of DIPO's authors, which differ from task to task."""

    task_values: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "Hopper": _task(1.0, 0.3),
        "Walker2d": _task(2.0, 0.08),
        "Ant": _task(0.8, 0.1),
        "HalfCheetah": _task(2.0, 0.08, action_steps=40, target_interval=2),
        "Humanoid": _task(2.0, 0.1),
    }
    other_task_values: ClassVar[Mapping[str, Any]] = _task(2.0, 0.1)
    fixed_by_checkpoint: ClassVar[tuple[str, ...]] = Hyperparameters.fixed_by_checkpoint

    actor_lr: float = with_default(OffPolicyHyperparameters, "actor_lr", 3e-4)
    grad_clip: float | None = option(
        None,
        "largest gradient norm of actor and of critics, each; none: the authors' value for the "
        "task, 2 for other tasks",
        range=POSITIVE,
    )
    engine: str = option(
        "native",
        "how actions are drawn and ranked: native: by the C++ library on a CPU; eager: PyTorch's "
        "operations one by one, as all the rest is",
        choices=("native", "eager"),
    )
    diffusion_steps: int = option(100, "steps of the diffusion chain", "T", range=COUNT)
    noise_schedule: str = with_default(Hyperparameters, "noise_schedule", "cosine")
    action_steps: int | None = option(
        None, "steps of Adam that improve a batch's actions; none: 40 for HalfCheetah, 20 for "
        "other tasks", range=COUNT,
    )  # fmt: skip
    action_lr: float = option(0.03, "their learning rate", "η", range=POSITIVE)
    action_clip_ratio: float | None = option(
        None,
        "largest norm of a batch's action gradient, divided by the action's dimensions; none: the "
        "authors' value for the task, 0.1 for other tasks",
        range=POSITIVE,
    )
    target_actor_interval: int | None = option(
        None,
        "updates for one of the target actor; none: 2 for HalfCheetah, 1 for other tasks",
        range=COUNT,
    )


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "light": {
        "diffusion_steps": 20,
        "action_steps": 5,
        "hidden": (256, 256),
        "critic_lr": 1e-3,
        "tau": 0.01,
        "batch_size": 128,
        "replay_capacity": 200_000,
        "warmup_steps": 5_000,
    },
    "quick": {
        "diffusion_steps": 20,
        "action_steps": 5,
        "hidden": (64, 64),
        "actor_lr": 1e-3,
        "critic_lr": 1e-3,
        "tau": 0.02,
        "batch_size": 128,
        "replay_capacity": 50_000,
        "warmup_steps": 1_000,
    },
}


class UpdateNoise(NamedTuple):
    """Every random number of one update."""

    target: Tensor  # [T, B, 1, A] standard normal: the TD target's actions
    step: Tensor  # [B] int64 in [0, T): the diffusion step of each trained row
    forward: Tensor  # [B, A] standard normal: the noise to be predicted


def improved_actions(
    critic: TwinQ, obs: Tensor, action: Tensor, *, steps: int, lr: float, max_norm: float
) -> Tensor:
    """Actions [B, A] after `steps` steps of Adam on -Σ min Q(s, a), clamped after each.

    Args:
        max_norm: of the gradient with respect to the whole batch of actions.
    """
    action = action.clone().requires_grad_()
    adam = torch.optim.Adam([action], lr=lr, eps=ACTION_ADAM_EPS)
    for _ in range(steps):
        lowest = critic(obs, action).amin(dim=0)
        (action.grad,) = torch.autograd.grad(-lowest.sum(), action)
        nn.utils.clip_grad_norm_([action], max_norm)
        adam.step()
        with torch.no_grad():
            action.clamp_(-1, 1)
    return action.detach()


def diffusion_loss(
    actor: NoisePredictor,
    schedule: NoiseSchedule,
    obs: Tensor,
    action: Tensor,
    step: Tensor,
    noise: Tensor,
) -> Tensor:
    """mean ‖ε - ε_θ(x_t, s, t)‖² / A of obs [B, O], action, noise [B, A] and step [B]."""
    noisy = schedule.q_sample(action, step, noise)
    return losses.denoising_error(actor(noisy, step, actor.obs_part(obs)), noise).mean()


class DIPOLearner(OffPolicyLearner):
    """Critics on one batch; actor on the improved actions of another, which are written back."""

    networks: Networks
    hp: DIPOHyperparameters

    def draw_update_noise(self, batch_size: int) -> UpdateNoise:
        steps, act_dim = self.hp.diffusion_steps, self.networks.act_dim
        drawn: dict[str, Any] = {"generator": self.generator, "device": self.device}
        return UpdateNoise(
            target=draw_noise(steps, batch_size, 1, act_dim, **drawn),
            step=torch.randint(steps, (batch_size,), **drawn),
            forward=torch.randn(batch_size, act_dim, **drawn),
        )

    def update_from(self, replay: ReplayBuffer) -> dict[str, Tensor]:
        assert replay.improved_action is not None
        batch = replay.sample(self.hp.batch_size)
        noise = self.draw_update_noise(self.hp.batch_size)
        metrics = self._update_critic(batch, noise)
        index = replay.sample_index(self.hp.batch_size)
        obs, action = replay.columns.obs[index], replay.improved_action[index]
        improved, policy_metrics = self._update_policy(obs, action, noise)
        replay.improved_action[index] = improved
        return metrics | policy_metrics

    def step(self, batch: Transitions, noise: UpdateNoise) -> dict[str, Tensor]:
        """Of a batch without a replay, the very actions are improved, and forgotten."""
        metrics = self._update_critic(batch, noise)
        return metrics | self._update_policy(batch.obs, batch.action, noise)[1]

    def _update_critic(self, batch: Transitions, noise: UpdateNoise) -> dict[str, Tensor]:
        nets, kernels = self.networks, self.kernels.sampler
        next_action = sample_actions(
            nets.target_actor, nets.schedule, batch.next_obs, noise.target, kernels
        )
        next_q = min_q(nets.target_critic, batch.next_obs, next_action, kernels).squeeze(1)
        target = losses.td_target(batch.reward, batch.terminal, next_q, self.hp.gamma)
        loss, q_mean = critic_objective(nets.critic, batch.obs, batch.action, target)
        grad_norm = self.descend(loss, self.critic_optimizer, nets.critic)
        return {
            "critic_loss": loss.detach(),
            "critic_grad_norm": grad_norm,
            "q_mean": q_mean,
            "td_target_mean": target.mean(),
        }

    def _update_policy(
        self, obs: Tensor, action: Tensor, noise: UpdateNoise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Improves the actions, fits the actor to them, moves the targets."""
        nets, hp = self.networks, self.hp
        assert hp.action_steps is not None
        assert hp.action_clip_ratio is not None
        assert hp.target_actor_interval is not None
        improved = improved_actions(
            nets.critic,
            obs,
            action,
            steps=hp.action_steps,
            lr=hp.action_lr,
            max_norm=hp.action_clip_ratio * nets.act_dim,
        )
        loss = diffusion_loss(nets.actor, nets.schedule, obs, improved, noise.step, noise.forward)
        grad_norm = self.descend(loss, self.actor_optimizer, nets.actor)
        self.move_target(nets.target_critic, nets.critic)
        if (self.num_updates + 1) % hp.target_actor_interval == 0:
            self.move_target(nets.target_actor, nets.actor)
        return improved, {
            "actor_loss": loss.detach(),
            "actor_grad_norm": grad_norm,
            "action_change": (improved - action).square().mean().sqrt(),
        }


class DIPOTorchPolicy(OffPolicyTorchPolicy):
    """Acts with one diffusion sample; evaluated, the reverse steps add no noise."""

    hyperparameters_class = DIPOHyperparameters
    networks_class = Networks
    learner_class = DIPOLearner

    def select(self, obs: Tensor, explore: bool, generator: Generator) -> Tensor:
        nets, steps = self.networks, self.hp.diffusion_steps
        noise = draw_noise(steps, obs.shape[0], 1, self.act_dim, generator, self.device)
        if not explore:
            noise[1:] = 0
        return sample_actions(nets.actor, nets.schedule, obs, noise, self.kernels.sampler)[:, 0]


class DIPOConfig(OffPolicyConfig):
    """Configuration of `DIPO`; `training(...)` takes every field of `DIPOHyperparameters`."""

    hyperparameters_class = DIPOHyperparameters
    algorithm_name = "DIPO"

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class or DIPO)


class DIPO(OffPolicyAlgorithm):
    """DIPO on this package's runtime; see `OffPolicyAlgorithm`."""

    improves_actions = True

    config_class = DIPOConfig
    policy_class = DIPOTorchPolicy


register_trainable("DIPO", DIPO)
