"""DIPO (Yang et al. 2023): replay actions climb the critics' gradient, diffusion fits them.

The replay keeps a second copy of every action, which each update improves and writes back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from ray.tune.registry import register_trainable
from torch import Generator, Tensor

from qvpo_rllib.algorithms.shared_options import LIGHT, QUICK, DiffusionRivalHyperparameters
from qvpo_rllib.core.engine import CPU
from qvpo_rllib.core.extensions.refinement import improved_actions
from qvpo_rllib.core.learner import OffPolicyLearner
from qvpo_rllib.core.options import COUNT, POSITIVE, Setting, option, with_default
from qvpo_rllib.core.qvpo import QVPONetworks
from qvpo_rllib.core.replay import ReplayBuffer, Transitions
from qvpo_rllib.core.sampler import draw_noise, min_q, sample_actions
from qvpo_rllib.rollout.policy import OffPolicyTorchPolicy
from qvpo_rllib.runtime.algorithm import OffPolicyAlgorithm
from qvpo_rllib.runtime.config import OffPolicyConfig

# What DIPO's authors set for each task.
TASK_OPTIONS = ("grad_clip", "action_clip_ratio", "action_steps", "target_actor_interval")
TASK_VALUES = {
    "Hopper": (1.0, 0.3, 20, 1),
    "Walker2d": (2.0, 0.08, 20, 1),
    "Ant": (0.8, 0.1, 20, 1),
    "HalfCheetah": (2.0, 0.08, 40, 2),
    "Humanoid": (2.0, 0.1, 20, 1),
}


@dataclass(frozen=True, kw_only=True)
class DIPOHyperparameters(DiffusionRivalHyperparameters):
    """The values of DIPO's authors, which differ from task to task."""

    presets: ClassVar[Mapping[str, Setting]] = {
        "default": {},
        "light": LIGHT
        | {"diffusion_steps": 20, "action_steps": 5, "hidden": (256, 256), "tau": 0.01},
        "quick": QUICK | {"diffusion_steps": 20, "action_steps": 5, "tau": 0.02},
    }
    smoke: ClassVar[Setting] = {**DiffusionRivalHyperparameters.smoke, "action_steps": 2}
    task_values: ClassVar[Mapping[str, Setting]] = {
        task: dict(zip(TASK_OPTIONS, values, strict=True)) for task, values in TASK_VALUES.items()
    }
    other_task_values: ClassVar[Setting] = dict(zip(TASK_OPTIONS, (2.0, 0.1, 20, 1), strict=True))

    grad_clip: float | None = option(
        None,
        "largest gradient norm of actor and of critics, each; none: the authors' value for the "
        "task, 2 for other tasks",
        range=POSITIVE,
    )
    diffusion_steps: int = with_default(DiffusionRivalHyperparameters, "diffusion_steps", 100)
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


class UpdateNoise(NamedTuple):
    """Every random number of one update."""

    target: Tensor  # [T, B, 1, A] standard normal: the TD target's actions
    step: Tensor  # [B] int64 in [0, T): the diffusion step of each trained row
    forward: Tensor  # [B, A] standard normal: the noise to be predicted


class DIPOLearner(OffPolicyLearner[QVPONetworks, DIPOHyperparameters, UpdateNoise]):
    """Fits critics to one batch, the actor to the improved actions of another, and writes these
    back to the replay."""

    def is_native(self) -> bool:
        return self.engine == "native"

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
        batch = self.draw(replay)
        noise = self.draw_update_noise(self.hp.batch_size)
        metrics = self.fit_critics(batch, self._next_q(batch.next_obs, noise))
        index = replay.sample_index(self.hp.batch_size)
        obs, action = replay.columns.obs[index], replay.improved_action[index]
        obs = self.networks.normalize(obs)
        improved, policy_metrics = self._update_policy(obs, action, noise)
        replay.improved_action[index] = improved
        return metrics | policy_metrics

    def update(
        self, batch: Transitions, /, *, noise: UpdateNoise | None = None
    ) -> dict[str, Tensor]:
        """Does one update on one batch; without a replay its improved actions are dropped."""
        if noise is None:
            noise = self.draw_update_noise(batch.reward.shape[0])
        metrics = self.fit_critics(batch, self._next_q(batch.next_obs, noise))
        return metrics | self._update_policy(batch.obs, batch.action, noise)[1]

    def _next_q(self, obs: Tensor, noise: UpdateNoise) -> Tensor:
        nets, kernels = self.networks, self.kernels.sampler
        action = sample_actions(nets.target_actor, nets.schedule, obs, noise.target, kernels)
        return min_q(nets.target_critic, obs, action, kernels).squeeze(1)

    def _update_policy(
        self, obs: Tensor, action: Tensor, noise: UpdateNoise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Improves the actions, fits the actor to them, moves the targets.

        Returns:
            The improved actions [B, A], and metrics.
        """
        nets, hp = self.networks, self.hp
        assert hp.action_clip_ratio is not None
        assert hp.action_steps is not None
        assert hp.target_actor_interval is not None
        limit = hp.action_clip_ratio * nets.act_dim
        improved = improved_actions(
            self.kernels.frozen(nets.critic).q_gradient(obs),
            *(action, hp.action_steps, hp.action_lr, limit),
        )
        loss = self.kernels.denoising_objective(
            nets.actor, nets.schedule, obs, improved, noise.step, noise.forward
        )
        grad_norm = self.descend(loss, self.actor_optimizer)
        self.move_target(nets.target_critic, nets.critic)
        if (self.num_updates + 1) % hp.target_actor_interval == 0:
            self.move_target(nets.target_actor, nets.actor)
        return improved, {
            "actor_loss": loss.detach(),
            "actor_grad_norm": grad_norm,
            "action_change": (improved - action).square().mean().sqrt(),
        }


class DIPOTorchPolicy(OffPolicyTorchPolicy[QVPONetworks, DIPOHyperparameters]):
    """Acts with one diffusion sample; in evaluation the reverse steps add no noise."""

    hyperparameters_class = DIPOHyperparameters
    networks_class = QVPONetworks
    learner_class = DIPOLearner

    def _act(self, obs: Tensor, explore: bool, k: int, generator: Generator) -> tuple[Tensor, None]:
        nets, steps = self.acting_networks(), self.hp.diffusion_steps
        noise = draw_noise(steps, obs.shape[0], k, self.act_dim, generator, CPU)
        if not explore:
            noise[1:] = 0
        actions = sample_actions(nets.actor, nets.schedule, obs, noise, self.kernels.sampler)
        return actions[:, 0], None


class DIPOConfig(OffPolicyConfig):
    """Configuration of `DIPO`; `training(...)` takes every field of `DIPOHyperparameters`."""

    hyperparameters_class = DIPOHyperparameters
    algorithm_name = "DIPO"


class DIPO(OffPolicyAlgorithm):
    """DIPO on this package's runtime; see `OffPolicyAlgorithm`."""

    improves_actions = True

    config_class = DIPOConfig
    policy_class = DIPOTorchPolicy


register_trainable("DIPO", DIPO)
