"""Drawing actions from the diffusion policy, ranking them by the critics, and acting by the best.

None of it has gradients. An update spends nine tenths of its time here, so this module saves what
it can without changing a number: it computes the observation's share of a first layer once per
state and the step's share once per step, its Mish needs a single exponential and works in place,
and it takes states in chunks whose activations stay in cache.

`denoise` and `lowest_q` do the work on one chunk. They are plain functions of tensors: an engine
may pass compiled ones, or let `backends.native` do everything (see `engine.py`).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from qvpo_rllib.core.backends.native import (
    PackedActor,
    PackedCritic,
    multiplies_bfloat16,
    pytorch_on_one_thread,
)
from qvpo_rllib.core.diffusion import NoiseSchedule, reverse_step
from qvpo_rllib.core.kernels import linear, mish_
from qvpo_rllib.core.losses import best_of, lowest_of
from qvpo_rllib.core.networks import NoisePredictor, SplitMLP, TwinQ

# Rows (states × samples) of a chunk on a CPU: 2048 rows of 256 floats are two megabytes, which two
# cores share. Larger chunks leave the cache, smaller ones cost more calls.
CPU_CHUNK_ROWS = 2048
# Reverse steps in one call of `denoise`, which a compiler unrolls. The result is the same for any.
STEPS_PER_CALL = 5


class Trunk(NamedTuple):
    """The parameters of a `SplitMLP` that act on the action, shaped as those of `nn.Linear`."""

    action_weight: Tensor  # the action's part of the first layer
    weights: list[Tensor]  # the layers behind it
    biases: list[Tensor]
    norms: Sequence[tuple[Tensor, Tensor]] = ()  # layer normalisation's scales and shifts [H]

    @classmethod
    def of(cls, mlp: SplitMLP, action_part: int, dtype: torch.dtype | None = None) -> "Trunk":
        """Returns the trunk of `mlp`, cast to `dtype` if one is given."""
        layers = mlp.linears()[1:]
        trunk = cls(
            mlp.first_weights()[action_part].contiguous(),
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            [(norm.weight, norm.bias) for norm in cast(Iterable[nn.LayerNorm], mlp.norms)],
        )
        if dtype is None:
            return trunk
        return cls(
            trunk.action_weight.to(dtype),
            [w.to(dtype) for w in trunk.weights],
            [b.to(dtype) for b in trunk.biases],
            [(scale.to(dtype), shift.to(dtype)) for scale, shift in trunk.norms],
        )


def draw_noise(
    diffusion_steps: int,
    num_states: int,
    num_samples: int,
    act_dim: int,
    generator: Generator,
    device: torch.device,
) -> Tensor:
    """Returns the standard normal noise for one call of `sample_actions`, [T, B, N, A]."""
    shape = (diffusion_steps, num_states, num_samples, act_dim)
    return torch.randn(shape, generator=generator, device=device)


def run_trunk(actions: Tensor, first: Tensor, trunk: Trunk) -> Tensor:
    """Returns the network's output for S·N rows of S states, [S·N, out].

    Args:
        actions: [S·N, A], state by state.
        first: [S, H], the sum of the first layer's other parts, bias included.
    """
    pre = linear(actions.to(first.dtype), trunk.action_weight)
    sums = pre.view(first.shape[0], -1, first.shape[1]).add_(first[:, None])
    hidden = mish_(_normalized(sums, trunk, 0)).view(pre.shape)
    for index, weight in enumerate(trunk.weights[:-1]):
        sums = linear(hidden, weight, trunk.biases[index])
        hidden = mish_(_normalized(sums, trunk, index + 1))
    return linear(hidden, trunk.weights[-1], trunk.biases[-1])


def _normalized(sums: Tensor, trunk: Trunk, layer: int) -> Tensor:
    """Returns what `SplitMLP.normalized` does."""
    return F.layer_norm(sums, sums.shape[-1:], *trunk.norms[layer]) if trunk.norms else sums


def denoise(
    x: Tensor, firsts: list[Tensor], noises: list[Tensor], constants: list[Tensor], trunk: Trunk
) -> Tensor:
    """Returns x after as many reverse steps as the lists have entries, for one chunk of S states.

    Args:
        x: [S·N, A], state by state.
        firsts: per step [S, H], see `run_trunk`.
        noises: per step [S·N, A].
        constants: per step [5], a row of `NoiseSchedule.reverse_steps`.
    """
    for first, noise, row in zip(firsts, noises, constants, strict=True):
        x = reverse_step(x, run_trunk(x, first, trunk).to(x.dtype), noise, row.unbind())
    return x


def lowest_q(actions: Tensor, firsts: list[Tensor], trunks: list[Trunk], kept: int = 1) -> Tensor:
    """Returns the twins' minimum for one chunk: actions [S·N, A], firsts twice [S, H] → [S·N].

    Of quantile critics, whose `kept` is above 1, it is the mean of the lowest outputs.
    """
    q1, q2 = (run_trunk(actions, first, trunk) for first, trunk in zip(firsts, trunks, strict=True))
    if kept == 1:
        return torch.minimum(q1, q2).squeeze(-1)
    return lowest_of(torch.cat([q1, q2], dim=1), kept).mean(dim=1)


class SamplerKernels(NamedTuple):
    """The functions that work on a chunk; with `native`, the library does both on a CPU."""

    denoise: Callable[[Tensor, list[Tensor], list[Tensor], list[Tensor], Trunk], Tensor] = denoise
    lowest_q: Callable[[Tensor, list[Tensor], list[Trunk], int], Tensor] = lowest_q
    native: bool = False


EAGER = SamplerKernels()


class Chain(NamedTuple):
    """A reverse chain, as `sample_actions` takes it."""

    actor: NoisePredictor
    obs: Tensor  # [B, O]
    noise: Tensor  # [T, B, N, A]


@torch.no_grad()
def sample_actions(
    actor: NoisePredictor,
    schedule: NoiseSchedule,
    obs: Tensor,
    noise: Tensor,
    kernels: SamplerKernels = EAGER,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns N actions per state from π_θ(a | s), drawn by the reverse process.

    Args:
        obs: [B, O].
        noise: [T, B, N, A] standard normal; the first slice is x_T, and the i-th reverse step adds
            slice i. The last reverse step adds none.
        dtype: of the network's products and activations; the parameters' own if None. The native
            library takes bfloat16 where the processor is faster with it, and float32 elsewhere.

    Returns:
        [B, N, A] in [-1, 1].

    Raises:
        ValueError: the noise is for another number of steps.
    """
    steps, num_states, num_samples, act_dim = noise.shape
    if steps != schedule.diffusion_steps:
        raise ValueError(f"noise has {steps} steps, the schedule {schedule.diffusion_steps}.")
    if kernels.native and dtype in (None, torch.bfloat16):
        narrow = dtype is torch.bfloat16 and multiplies_bfloat16()
        return PackedActor(actor, schedule, narrow=narrow).sample(obs, noise)
    obs_part = actor.obs_part(obs) + actor.mlp.linears()[0].bias  # [B, H]
    firsts = actor.time_part().flip(0)[:, None] + obs_part  # [T, B, H], in the order of the chain
    if dtype is not None:
        firsts = firsts.to(dtype)
    trunk = Trunk.of(actor.mlp, 0, dtype)
    constants = schedule.reverse_steps.to(noise.dtype).flip(0).unbind()
    # Each step's noise; the last one's standard deviation is zero, so its noise may be any.
    noises = torch.cat([noise[1:], noise[:1]])
    per_call = next(n for n in range(min(steps, STEPS_PER_CALL), 0, -1) if steps % n == 0)
    actions = torch.empty_like(noise[0])
    for states in _chunks(num_states, num_samples, obs.device):
        x = noise[0, states].reshape(-1, act_dim)
        chunk_firsts = firsts[:, states].unbind()
        chunk_noises = noises[:, states].flatten(1, 2).unbind()
        for start in range(0, steps, per_call):
            now = slice(start, start + per_call)
            x = kernels.denoise(
                x, list(chunk_firsts[now]), list(chunk_noises[now]), list(constants[now]), trunk
            )
        actions[states] = x.view(-1, num_samples, act_dim)
    return actions.clamp_(-1, 1)


@torch.no_grad()
def min_q(
    critic: TwinQ | PackedCritic, obs: Tensor, actions: Tensor, kernels: SamplerKernels = EAGER
) -> Tensor:
    """Returns the twins' minimum for N actions per state: [B, O], [B, N, A] → [B, N].

    Of quantile critics it is their Q, the mean of the kept quantiles.
    """
    if isinstance(critic, PackedCritic):
        return critic.min_q(obs, actions)
    if kernels.native:
        return PackedCritic(critic).min_q(obs, actions)
    num_states, num_samples, act_dim = actions.shape
    twins = (critic.q1, critic.q2)
    firsts = [q.first(0, obs) + q.linears()[0].bias for q in twins]
    trunks = [Trunk.of(q, 1) for q in twins]
    lowest = torch.empty_like(actions[..., 0])
    for states in _chunks(num_states, num_samples, obs.device):
        flat = actions[states].reshape(-1, act_dim)
        q = kernels.lowest_q(flat, [first[states] for first in firsts], trunks, critic.kept)
        lowest[states] = q.view(-1, num_samples)
    return lowest


def _chunks(num_states: int, num_samples: int, device: torch.device) -> list[slice]:
    size = num_states
    if device.type == "cpu":
        size = max(1, CPU_CHUNK_ROWS // num_samples)
    return [slice(start, start + size) for start in range(0, num_states, size)]


class ActionSelector:
    """Acts by the K-efficient policy π_θ^K (section 4.4): the best of K actions by the critics.

    It keeps what depends on the weights alone from one call to the next. Call `weights_changed`
    after an optimiser's step; the selector notices by itself when weights are loaded or otherwise
    written in place.
    """

    def __init__(
        self,
        actor: NoisePredictor,
        critic: TwinQ,
        schedule: NoiseSchedule,
        kernels: SamplerKernels = EAGER,
    ) -> None:
        self.actor, self.critic, self.schedule = actor, critic, schedule
        self.kernels = kernels
        self._parameters = [*actor.parameters(), *critic.parameters()]
        self._packed_actor: PackedActor | None = None
        self._packed_critic: PackedCritic | None = None
        self._packed_version = 0

    def weights_changed(self) -> None:
        """Drops what was kept: PyTorch's fused optimisers do not raise a tensor's version."""
        self._packed_actor = self._packed_critic = None

    def __getstate__(self) -> dict[str, object]:
        """Leaves out what was kept, pointers into this process's memory; it is made again."""
        return self.__dict__ | {"_packed_actor": None, "_packed_critic": None}

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns, of K actions per state, the one of the highest minimum of the twins, and that Q.

        Args:
            obs: [B, O].
            noise: [T, B, K, A], see `sample_actions`.

        Returns:
            The actions [B, A] in [-1, 1] and their Q [B]; Q is None for K = 1, which ranks nothing.
        """
        if self.kernels.native:
            with pytorch_on_one_thread():
                return self._act_natively(obs, noise)
        actions = sample_actions(self.actor, self.schedule, obs, noise, self.kernels)
        if actions.shape[1] == 1:
            return actions[:, 0], None
        return _best(min_q(self.critic, obs, actions, self.kernels), actions)

    @torch.no_grad()
    def q_of(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Returns the twins' minimum: obs [B, O], actions [B, A] → [B]."""
        return min_q(self.critic, obs, actions[:, None], self.kernels)[:, 0]

    def _act_natively(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        self._drop_if_written()
        if self._packed_actor is None:
            self._packed_actor = PackedActor(self.actor, self.schedule)
        actions = self._packed_actor.sample(obs, noise)
        if actions.shape[1] == 1:
            return actions[:, 0], None
        if self._packed_critic is None:
            self._packed_critic = PackedCritic(self.critic)
        return _best(self._packed_critic.min_q(obs, actions), actions)

    def _drop_if_written(self) -> None:
        version = sum(parameter._version for parameter in self._parameters)
        if version != self._packed_version:
            self.weights_changed()
            self._packed_version = version


def _best(q: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the actions of the highest q, and that: [B, K], [B, K, A] → [B, A], [B]."""
    top_q, top = best_of(q, actions)
    return top[:, 0], top_q[:, 0]
