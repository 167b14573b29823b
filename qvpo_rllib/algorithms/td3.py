"""TD3 (Fujimoto et al., ICML 2018): deterministic policy, twin critics, delayed policy updates."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from ray.tune.registry import register_trainable
from torch import Generator, Tensor, nn

from qvpo_rllib.algorithms.shared_options import LIGHT, QUICK
from qvpo_rllib.core.kernels import linear
from qvpo_rllib.core.learner import ActorCritic, OffPolicyLearner
from qvpo_rllib.core.losses import critic_loss
from qvpo_rllib.core.normalization import RunningMoments
from qvpo_rllib.core.options import COUNT, NON_NEGATIVE, Setting, option, with_default
from qvpo_rllib.core.options.shared import OffPolicyHyperparameters
from qvpo_rllib.core.replay import Transitions
from qvpo_rllib.rollout.policy import OffPolicyTorchPolicy
from qvpo_rllib.runtime.algorithm import OffPolicyAlgorithm
from qvpo_rllib.runtime.config import OffPolicyConfig


@dataclass(frozen=True, kw_only=True)
class TD3Hyperparameters(OffPolicyHyperparameters):
    """The values of TD3's authors. Noise is in units of the action's half range, 1 here."""

    presets: ClassVar[Mapping[str, Setting]] = {
        "default": {},
        "light": LIGHT | {"actor_lr": 1e-3, "warmup_steps": 10_000},
        "quick": QUICK | {"tau": 0.01},
    }

    hidden: tuple[int, ...] = with_default(OffPolicyHyperparameters, "hidden", (256, 256))
    actor_lr: float = with_default(OffPolicyHyperparameters, "actor_lr", 3e-4)
    adam_eps: float = with_default(OffPolicyHyperparameters, "adam_eps", 1e-8)
    grad_clip: float | None = with_default(OffPolicyHyperparameters, "grad_clip", None)
    warmup_steps: int = with_default(OffPolicyHyperparameters, "warmup_steps", 25_000)
    engine: str = option("eager", "PyTorch's operations one by one", choices=("eager",))
    policy_delay: int = option(
        2, "critic updates for one update of the actor and of the targets", "d", range=COUNT
    )
    exploration_noise: float = option(
        0.1, "standard deviation of what is added to act with", range=NON_NEGATIVE
    )
    target_noise: float = option(
        0.2, "standard deviation of what is added to the target's action", "σ̃", range=NON_NEGATIVE
    )
    target_noise_clip: float = option(
        0.5, "largest size of what is added to the target's action", "c", range=NON_NEGATIVE
    )


class ReluMLP(nn.Module):
    """Linear layers with ReLU between them, initialised as PyTorch does: [..., in] → [..., out]."""

    def __init__(self, in_dim: int, hidden: Sequence[int], out_dim: int) -> None:
        super().__init__()
        dims = itertools.pairwise([in_dim, *hidden, out_dim])
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in dims)

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = cast(list[nn.Linear], list(self.layers))
        for layer in inner:
            x = linear(x, layer.weight, layer.bias).relu()
        return linear(x, last.weight, last.bias)


class Actor(ReluMLP):
    """π(s): [B, O] → [B, A] in [-1, 1]."""

    def forward(self, obs: Tensor) -> Tensor:
        return super().forward(obs).tanh()


class TwinReluQ(nn.Module):
    """Two critics Q(s, a): obs [B, O], action [B, A] → [2, B]."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.q1 = ReluMLP(obs_dim + act_dim, hidden, 1)
        self.q2 = ReluMLP(obs_dim + act_dim, hidden, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        both = torch.cat([obs, action], dim=-1)
        return torch.stack([self.q1(both), self.q2(both)]).squeeze(-1)

    def loss(self, estimates: Tensor, target: Tensor) -> Tensor:
        """The twins' mean squared errors: [2, B], [B] → []."""
        return critic_loss(estimates, target)


class TD3Networks(ActorCritic):
    """Actor, twin critics and their targets."""

    actor: Actor
    critic: TwinReluQ
    target_actor: Actor
    target_critic: TwinReluQ

    def __init__(self, obs_dim: int, act_dim: int, hp: TD3Hyperparameters) -> None:
        actor = Actor(obs_dim, hp.hidden, act_dim)
        super().__init__(actor, TwinReluQ(obs_dim, act_dim, hp.hidden), act_dim)
        if hp.normalize_observations:
            self.observations = RunningMoments(obs_dim)


def smoothed_action(action: Tensor, noise: Tensor, std: float, clip: float) -> Tensor:
    """clip(a + clip(std · noise, ±c), ±1), the target policy smoothing: all [B, A]."""
    return (action + (std * noise).clamp(-clip, clip)).clamp(-1, 1)


def policy_loss(actor: nn.Module, critic: TwinReluQ, obs: Tensor) -> Tensor:
    """The deterministic policy gradient's: -mean Q₁(s, π(s)) over obs [B, O]."""
    q: Tensor = critic.q1(torch.cat([obs, actor(obs)], dim=-1))
    return -q.mean()


class TD3Learner(OffPolicyLearner[TD3Networks, TD3Hyperparameters, Tensor]):
    """Fits the critics in every update and the actor in some.

    An update's noise is [B, A] standard normal, for the target's action.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Loss and gradient norm of the last update of the actor.
        self.actor_metrics = torch.zeros(2, device=self.device)

    def draw_update_noise(self, batch_size: int) -> Tensor:
        shape = (batch_size, self.networks.act_dim)
        return torch.randn(shape, generator=self.generator, device=self.device)

    def update(self, batch: Transitions, /, *, noise: Tensor | None = None) -> dict[str, Tensor]:
        if noise is None:
            noise = self.draw_update_noise(batch.reward.shape[0])
        nets, hp = self.networks, self.hp
        with torch.no_grad():
            next_action = smoothed_action(
                nets.target_actor(batch.next_obs), noise, hp.target_noise, hp.target_noise_clip
            )
            next_q = nets.target_critic(batch.next_obs, next_action).amin(dim=0)
        metrics = self.fit_critics(batch, next_q)
        if (self.num_updates + 1) % hp.policy_delay == 0:
            self._update_policy(batch.obs)
            self.move_target(nets.target_actor, nets.actor)
            self.move_target(nets.target_critic, nets.critic)
        loss, grad_norm = self.actor_metrics
        return metrics | {"actor_loss": loss, "actor_grad_norm": grad_norm}

    def _update_policy(self, obs: Tensor) -> None:
        nets = self.networks
        loss = policy_loss(nets.actor, nets.critic, obs)
        grad_norm = self.descend(loss, self.actor_optimizer)
        self.actor_metrics = torch.stack([loss.detach(), grad_norm])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "actor_metrics": self.actor_metrics.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.actor_metrics = state["actor_metrics"].to(self.device, copy=True)
        super().load_state_dict(state)


class TD3TorchPolicy(OffPolicyTorchPolicy[TD3Networks, TD3Hyperparameters]):
    """Acts with π(s), plus Gaussian noise to explore."""

    hyperparameters_class = TD3Hyperparameters
    networks_class = TD3Networks
    learner_class = TD3Learner

    def _act(self, obs: Tensor, explore: bool, k: int, generator: Generator) -> tuple[Tensor, None]:
        action: Tensor = self.acting_networks().actor(obs)
        if not explore:
            return action, None
        noise = torch.randn(action.shape, generator=generator)
        return (action + self.hp.exploration_noise * noise).clamp_(-1, 1), None


class TD3Config(OffPolicyConfig):
    """Configuration of `TD3`; `training(...)` takes every field of `TD3Hyperparameters`."""

    hyperparameters_class = TD3Hyperparameters
    algorithm_name = "TD3"


class TD3(OffPolicyAlgorithm):
    """TD3 on this package's runtime; see `OffPolicyAlgorithm`."""

    config_class = TD3Config
    policy_class = TD3TorchPolicy


register_trainable("TD3", TD3)
