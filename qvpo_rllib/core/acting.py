"""Acting with the best of K samples, call after call with the same weights."""

import torch
from torch import Tensor

from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.native import PackedActor, PackedCritic
from qvpo_rllib.core.networks import NoisePredictor, TwinQ
from qvpo_rllib.core.sampler import SamplerKernels, highest, min_q, select_actions


class ActionSelector:
    """`select_actions` of given networks; what depends on the weights alone is kept between calls.

    Call `weights_changed` after an optimiser's step. Weights that are loaded or otherwise written
    in place are noticed.
    """

    def __init__(
        self,
        actor: NoisePredictor,
        critic: TwinQ,
        schedule: NoiseSchedule,
        kernels: SamplerKernels,
    ) -> None:
        self.actor, self.critic, self.schedule = actor, critic, schedule
        self.kernels = kernels
        self._parameters = [*actor.parameters(), *critic.parameters()]
        self._packed: tuple[PackedActor, PackedCritic] | None = None
        self._packed_version = 0

    def weights_changed(self) -> None:
        """The weights are others now: PyTorch's fused optimisers leave no trace on a tensor."""
        self._packed = None

    @torch.no_grad()
    def select(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """obs [B, O], noise [T, B, K, A] → actions [B, A], Q [B] or None; see `select_actions`."""
        if not self.kernels.native:
            return select_actions(self.actor, self.critic, self.schedule, obs, noise, self.kernels)
        actor, critic = self._packed_weights()
        actions = actor.sample(obs, noise)
        return highest(actions, lambda: critic.min_q(obs, actions))

    @torch.no_grad()
    def q_of(self, obs: Tensor, actions: Tensor) -> Tensor:
        """The lower of the critics' estimates: obs [B, O], actions [B, A] → [B]."""
        return min_q(self.critic, obs, actions[:, None], self.kernels)[:, 0]

    def _packed_weights(self) -> tuple[PackedActor, PackedCritic]:
        version = sum(parameter._version for parameter in self._parameters)
        if self._packed is None or version != self._packed_version:
            self._packed = PackedActor(self.actor, self.schedule), PackedCritic(self.critic)
            self._packed_version = version
        return self._packed
