"""Acting with a QVPO policy so that a row's action is the same bits whatever else is in the batch.

The native library computes every row by itself. Where it cannot be built, PyTorch's matrix products
may round a row differently when the matrix has another height, so observations then go through the
networks one by one.
"""

import os
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from qvpo_rllib.core.action_scale import ActionScale
from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.engine import CPU, acting_engine, kernels_of
from qvpo_rllib.core.networks import NoisePredictor, TwinQ, new_critic
from qvpo_rllib.core.normalization import RunningMoments
from qvpo_rllib.core.sampler import ActionSelector, draw_noise
from qvpo_rllib.serving.description import Description

# OpenMP's threads do not survive a fork, and a child that asks for them waits for ever.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


class NonFiniteActionError(ValueError):
    """The networks gave no finite action, as for observations far outside anything trained on."""

    def __init__(self, row: int) -> None:
        super().__init__(
            f"The networks give no finite action for observation {row}: its numbers are too large "
            "for this policy."
        )


class PolicyNetworks(nn.Module):
    """Actor and twin critics, with the parameter names of a checkpoint, and the noise schedule.

    `observations` has the moments of a policy that normalises what it observes, else None.
    """

    def __init__(self, description: Description) -> None:
        super().__init__()
        d = description
        self.actor = NoisePredictor(d.obs_dim, d.act_dim, d.hidden, d.diffusion_steps)
        self.critic = new_critic(d.obs_dim, d.act_dim, d)
        self.schedule = NoiseSchedule(d.noise_schedule, d.diffusion_steps)
        self.observations = RunningMoments(d.obs_dim) if d.normalize_observations else None

    def normalize(self, obs: Tensor) -> Tensor:
        """Returns observations [..., O] as the networks take them."""
        return obs if self.observations is None else self.observations.standardize(obs)


class ActingNetworks(Protocol):
    """What acting needs of networks: a bundle's have it, and those that were trained."""

    actor: NoisePredictor
    critic: TwinQ
    schedule: NoiseSchedule

    def normalize(self, obs: Tensor) -> Tensor: ...


class BestOfKPolicy:
    """The best of K diffusion samples by the critics, in the environment's own action box.

    It acts on the CPU. Letters as in `core`: B observations, O and A their and the actions'
    dimensions, T steps.

    Args:
        networks: on the CPU.
        scale: from the networks' [-1, 1] to the environment's box.
        k_eval: K of a call that gives none.
        engine: "auto", which is "native" where that can be built, or "eager".
    """

    def __init__(
        self,
        networks: ActingNetworks,
        scale: ActionScale,
        k_eval: int,
        engine: str = "auto",
    ) -> None:
        self.networks, self.scale, self.k_eval = networks, scale, k_eval
        self.obs_dim, self.act_dim = networks.critic.q1.part_dims
        kernels = kernels_of(acting_engine(engine), CPU).sampler
        self._selector = ActionSelector(networks.actor, networks.critic, networks.schedule, kernels)
        self.generator = Generator()
        self.generator.seed()

    def act(
        self,
        observations: NDArray[np.floating],
        k: int | None = None,
        generator: Generator | None = None,
    ) -> NDArray[np.floating]:
        """Returns the best of k actions for each observation.

        Args:
            observations: [B, O].
            k: actions drawn per observation; `k_eval` if None.
            generator: of the diffusion noise, on the CPU; one of the policy's own if None.

        Returns:
            [B, A] in the environment's box and its dtype.

        Raises:
            ValueError: wrong shape, or an observation that is not finite.
            NonFiniteActionError: there is no finite action for one of the observations.
        """
        obs = self.check(observations)
        k = self.k_eval if k is None else k
        if k < 1:
            raise ValueError(f"k={k} is not allowed: it must be 1 or more.")
        actions, finite = self.act_with_noise(obs, self.draw_noise(len(obs), k, generator))
        if not finite.all():
            raise NonFiniteActionError(int(np.flatnonzero(~finite)[0]))
        return self.scale.to_env(actions)

    def check(self, observations: NDArray[np.floating]) -> Tensor:
        """Returns [B, O] float32. Raises `ValueError` for a wrong shape or numbers not finite."""
        with np.errstate(over="ignore"):
            array = np.asarray(observations, dtype=np.float32)
        if array.ndim != 2 or array.shape[1] != self.obs_dim:
            raise ValueError(
                f"Observations have shape {list(array.shape)}; this policy needs "
                f"[batch, {self.obs_dim}]."
            )
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
            raise ValueError(
                f"Observation {row} has a number that is not finite in float32: give numbers "
                "between -3.4e38 and 3.4e38."
            )
        return torch.tensor(array)

    def draw_noise(self, num_rows: int, k: int, generator: Generator | None) -> Tensor:
        """Returns the noise of `act_with_noise`, [T, num_rows, k, A]: as RLlib's policy draws it.

        Args:
            generator: the policy's own one if None.
        """
        steps = self.networks.schedule.diffusion_steps
        return draw_noise(steps, num_rows, k, self.act_dim, generator or self.generator, CPU)

    def act_with_noise(
        self, obs: Tensor, noise: Tensor
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Returns the best actions for obs [B, O] and noise [T, B, K, A].

        A row of the result depends on the same row of `obs` and `noise` alone, to the last bit.

        Returns:
            actions [B, A] in [-1, 1], and whether an action and its Q are finite, [B].
        """
        if self._selector.kernels.native:
            return self._act(obs, noise)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the bits may not depend on the number of cores either
        try:
            actions = np.empty((len(obs), self.act_dim), np.float32)
            finite = np.empty(len(obs), np.bool_)
            for i in range(len(obs)):
                row = slice(i, i + 1)
                actions[row], finite[row] = self._act(obs[row], noise[:, row])
            return actions, finite
        finally:
            torch.set_num_threads(threads)

    def _act(self, obs: Tensor, noise: Tensor) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        actions, q = self._selector.act(self.networks.normalize(obs), noise)
        finite = torch.isfinite(actions).all(dim=1)
        if q is not None:  # None for K = 1, which ranks nothing
            finite &= torch.isfinite(q)
        return actions.numpy(), finite.numpy()

    def warm_up(self, *ks: int) -> None:
        """Does what the first call for each K would do: 0.1 s that no caller should wait for."""
        for k in ks:
            self.act(np.zeros((1, self.obs_dim), np.float32), k, Generator())


class ServedPolicy(BestOfKPolicy):
    """The policy of a bundle.

    Attributes:
        parts: what flattens the environment's Dict or Tuple observation; None if it is a vector.

    Args:
        engine: as for `BestOfKPolicy`.
    """

    def __init__(
        self, description: Description, networks: PolicyNetworks, engine: str = "auto"
    ) -> None:
        super().__init__(networks, description.action_scale, description.k_eval, engine)
        self.description = description
        self.parts = description.parts
