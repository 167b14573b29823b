"""The noise predictor and the twin critics.

Letters used throughout `core`: B states in a batch, N actions per state, A action dimensions,
O observation dimensions, H width of a hidden layer, T diffusion steps. All tensors are float32.
"""

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from qvpo_rllib.core.kernels import linear, mish

TIME_DIM = 32  # size of the sinusoidal embedding of t
TIME_HIDDEN = 256  # width of the layer behind it


class SplitMLP(nn.Module):
    """An MLP with Mish whose input is a concatenation of parts (obs, action, …).

    The first layer is linear in its parts, so the product of a part that many rows share (the
    observation of N action samples) is computed once and added: `first(i, part)`, `tail(sum)`.
    """

    def __init__(self, part_dims: Sequence[int], hidden: Sequence[int], out_dim: int) -> None:
        super().__init__()
        self.part_dims = tuple(part_dims)
        dims = [sum(part_dims), *hidden, out_dim]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(dims))
        self.apply(init_weights)

    def linears(self) -> list[nn.Linear]:
        """Returns the layers, with their type."""
        return cast(list[nn.Linear], list(self.layers))

    def first_weights(self) -> tuple[Tensor, ...]:
        """Returns the first layer's weight [H, sum of parts], cut into its parts [H, part]."""
        return torch.split(self.linears()[0].weight, list(self.part_dims), dim=1)

    def first(self, index: int, part: Tensor) -> Tensor:
        """Returns part `index`'s share of the first layer, without bias: [..., part] → [..., H]."""
        return linear(part, self.first_weights()[index])

    def tail(self, pre: Tensor) -> Tensor:
        """Returns the output [..., out] for the sum of the shares [..., H], still without bias."""
        hidden = mish(pre + self.linears()[0].bias)
        *inner, last = self.linears()[1:]
        for layer in inner:
            hidden = mish(linear(hidden, layer.weight, layer.bias))
        return linear(hidden, last.weight, last.bias)

    def forward(self, *parts: Tensor) -> Tensor:
        """Returns the output [..., out] for parts [..., part], broadcast against one another."""
        pre = self.first(0, parts[0])
        for index, part in enumerate(parts[1:], start=1):
            pre = pre + self.first(index, part)
        return self.tail(pre)


def init_weights(module: nn.Module) -> None:
    """Draws normal weights of standard deviation 1 / (2·sqrt(fan-in)); sets biases to zero."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=1 / (2 * math.sqrt(module.in_features)))
        nn.init.zeros_(module.bias)


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Returns sines, then cosines of t at frequencies 10000^(-i / (dim/2 - 1)): [T] → [T, dim]."""
    half = dim // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / (half - 1)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class NoisePredictor(nn.Module):
    """ε_θ(a_t, s, t), which predicts the noise in a noisy action from the state and the step."""

    time_table: Tensor  # [T, TIME_DIM]
    steps: Tensor  # [T], 0 … T-1

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int], steps: int) -> None:
        super().__init__()
        self.act_dim = act_dim
        self.time_mlp = nn.Sequential(
            nn.Linear(TIME_DIM, TIME_HIDDEN), nn.Mish(), nn.Linear(TIME_HIDDEN, TIME_DIM)
        )
        self.time_mlp.apply(init_weights)
        self.mlp = SplitMLP((act_dim, TIME_DIM, obs_dim), hidden, act_dim)
        table = sinusoidal_embedding(torch.arange(steps), TIME_DIM)
        self.register_buffer("time_table", table, persistent=False)
        self.register_buffer("steps", torch.arange(steps), persistent=False)

    def time_part(self) -> Tensor:
        """Returns every step's share of the first layer, [T, H]."""
        return self.mlp.first(1, self.time_mlp(self.time_table))

    def obs_part(self, obs: Tensor) -> Tensor:
        """Returns the observation's share of the first layer, [B, O] → [B, H]."""
        return self.mlp.first(2, obs)

    def forward(self, noisy_action: Tensor, t: Tensor, obs_part: Tensor) -> Tensor:
        """Returns the noise [..., A] in noisy_action [..., A]: t [...] int64, obs_part [..., H]."""
        # The gradient of a product costs less than that of an index, which may also wait for a GPU.
        one_hot = (t[..., None] == self.steps).to(obs_part.dtype)
        pre = self.mlp.first(0, noisy_action) + one_hot @ self.time_part() + obs_part
        return self.mlp.tail(pre)


class TwinQ(nn.Module):
    """Two critics Q(s, a) that share nothing but their shape."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.q1 = SplitMLP((obs_dim, act_dim), hidden, 1)
        self.q2 = SplitMLP((obs_dim, act_dim), hidden, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Returns both estimates [2, ...] for obs [..., O] and action [..., A] in [-1, 1].

        Leading dimensions broadcast: for obs [B, 1, O] and action [B, N, A] the observation's share
        of the first layer is computed once per state.
        """
        return torch.stack([self.q1(obs, action), self.q2(obs, action)]).squeeze(-1)
