"""Acting with a policy so that a row's action is the same bits whatever else is in the batch.

The native library computes every row by itself. Where it cannot be built, PyTorch's matrix products
may round a row differently when the matrix has another height. So observations then go through the
networks in blocks of one fixed height for each K, the last one padded, and a row's result must not
depend on its place in the block either: that is measured on this machine, for every K, before the
first block counts. Where it does not hold, higher blocks are tried, and in the end a block is a
single observation.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.engine import acting_engine, kernels_of
from qvpo_rllib.core.networks import NoisePredictor, TwinQ
from qvpo_rllib.core.sampler import ActionSelector, draw_noise
from qvpo_rllib.serving.description import Description

CPU = torch.device("cpu")
# Rows (observations × K) of a block: fewer waste time on the overhead of each operation, more on
# padding when a single observation comes.
BLOCK_ROWS = 16
PROBES = 2  # random blocks that are turned through all positions


class NonFiniteActionError(ValueError):
    """The networks gave no finite action, as for observations far outside anything trained on."""

    def __init__(self, row: int) -> None:
        super().__init__(
            f"The networks give no finite action for observation {row}: its numbers are too large "
            "for this policy."
        )


class PolicyNetworks(nn.Module):
    """Actor and twin critics, with the parameter names of a checkpoint."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        d = description
        self.actor = NoisePredictor(d.obs_dim, d.act_dim, d.hidden, d.diffusion_steps)
        self.critic = TwinQ(d.obs_dim, d.act_dim, d.hidden)


class ServedPolicy:
    """The best of K diffusion samples by the critics, in the environment's own action box.

    Letters as in `core`: B observations, O and A their and the actions' dimensions, T steps.

    Args:
        engine: "auto", which is "native" where that can be built, or "eager".
    """

    def __init__(
        self, description: Description, networks: PolicyNetworks, engine: str = "auto"
    ) -> None:
        self.description = description
        self.networks = networks
        schedule = NoiseSchedule(description.noise_schedule, description.diffusion_steps)
        kernels = kernels_of(acting_engine(engine, CPU), CPU).sampler
        self._selector = ActionSelector(networks.actor, networks.critic, schedule, kernels)
        self.scale = description.action_scale
        self.generator = Generator()
        self.generator.seed()
        self._block_states: dict[int, int] = {}

    def act(
        self,
        observations: NDArray[np.floating],
        k: int | None = None,
        generator: Generator | None = None,
    ) -> NDArray[np.floating]:
        """The best of k actions for each observation.

        Args:
            observations: [B, O].
            k: actions drawn per observation; the description's `k_eval` if None.
            generator: of the diffusion noise, on the CPU; one of the policy's own if None.

        Returns:
            [B, A] in the environment's box and its dtype.

        Raises:
            ValueError: wrong shape, or an observation that is not finite.
            NonFiniteActionError: there is no finite action for one of the observations.
        """
        obs = self.check(observations)
        k = self.description.k_eval if k is None else k
        if k < 1:
            raise ValueError(f"k={k} is not allowed: it must be 1 or more.")
        noise = self.draw_noise(obs.shape[0], k, generator or self.generator)
        actions, finite = self.select(obs, noise)
        if not finite.all():
            raise NonFiniteActionError(int(np.flatnonzero(~finite)[0]))
        return self.scale.to_env(actions)

    def check(self, observations: NDArray[np.floating]) -> Tensor:
        """[B, O] float32 of finite numbers, or `ValueError`."""
        with np.errstate(over="ignore"):
            array = np.asarray(observations, dtype=np.float32)
        if array.ndim != 2 or array.shape[1] != self.description.obs_dim:
            raise ValueError(
                f"Observations have shape {list(array.shape)}; this policy needs "
                f"[batch, {self.description.obs_dim}]."
            )
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
            raise ValueError(
                f"Observation {row} has a number that is not finite in float32: give numbers "
                "between -3.4e38 and 3.4e38."
            )
        return torch.tensor(array)

    def draw_noise(self, num_rows: int, k: int, generator: Generator) -> Tensor:
        """What `select` consumes, [T, num_rows, k, A]: as RLlib's policy draws it."""
        d = self.description
        return draw_noise(d.diffusion_steps, num_rows, k, d.act_dim, generator, CPU)

    def select(self, obs: Tensor, noise: Tensor) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The best actions for obs [B, O] and noise [T, B, K, A].

        A row of the result depends on the same row of `obs` and `noise` alone, to the last bit.

        Returns:
            actions [B, A] in [-1, 1], and whether an action and its Q are finite, [B].
        """
        if self._selector.kernels.native:
            actions, q = self._block(obs, noise)
            return _with_finite(actions, q)
        threads = torch.get_num_threads()
        # The bits may not depend on the number of cores either; blocks are too small to share.
        torch.set_num_threads(1)
        try:
            actions, q = self._in_blocks(obs, noise, self._block_states_for(noise.shape[2]))
        finally:
            torch.set_num_threads(threads)
        return _with_finite(actions, q)

    def warm_up(self, *ks: int) -> None:
        """Does what the first call for each K would do: 0.1 s that no caller should wait for."""
        for k in ks:
            self.act(np.zeros((1, self.description.obs_dim), np.float32), k, Generator())

    def _block_states_for(self, k: int) -> int:
        """Observations per block for this K; probes the machine on first use (some 0.1 s)."""
        if k not in self._block_states:
            states = max(1, BLOCK_ROWS // k)
            candidates = (states, 2 * states, 4 * states) if states > 1 else ()
            free = (states for states in candidates if self._position_is_free(states, k))
            self._block_states[k] = next(free, 1)
        return self._block_states[k]

    def _position_is_free(self, states: int, k: int) -> bool:
        """Whether every row of a block gives the same bits at every position."""
        generator = Generator().manual_seed(k)
        for _ in range(PROBES):
            obs = torch.randn(states, self.description.obs_dim, generator=generator)
            noise = self.draw_noise(states, k, generator)
            actions, q = self._block(obs, noise)
            for shift in range(1, states):
                rolled = self._block(obs.roll(shift, 0), noise.roll(shift, 1))
                if not (
                    torch.equal(rolled[0].roll(-shift, 0), actions)
                    and torch.equal(rolled[1].roll(-shift, 0), q)
                ):
                    return False
        return True

    def _in_blocks(self, obs: Tensor, noise: Tensor, states: int) -> tuple[Tensor, Tensor]:
        steps, num_rows, k, act_dim = noise.shape
        actions, q = torch.empty(num_rows, act_dim), torch.empty(num_rows)
        for start in range(0, num_rows, states):
            rows = slice(start, min(start + states, num_rows))
            count = rows.stop - start
            block_obs = torch.zeros(states, obs.shape[1])
            block_noise = torch.zeros(steps, states, k, act_dim)
            block_obs[:count] = obs[rows]
            block_noise[:, :count] = noise[:, rows]
            block_actions, block_q = self._block(block_obs, block_noise)
            actions[rows], q[rows] = block_actions[:count], block_q[:count]
        return actions, q

    def _block(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`ActionSelector.act`, with a Q of 0 where K = 1 ranks nothing."""
        actions, q = self._selector.act(obs, noise)
        return actions, torch.zeros(obs.shape[0]) if q is None else q


def _with_finite(actions: Tensor, q: Tensor) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """actions [B, A], and whether a row of them and its Q are finite, [B]."""
    finite = torch.isfinite(actions).all(dim=1) & torch.isfinite(q)
    return actions.numpy(), finite.numpy()
