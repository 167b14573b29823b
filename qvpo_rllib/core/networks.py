"""The noise predictor and the twin critics.

Letters used throughout `core`: B states in a batch, N actions per state, A action dimensions,
O observation dimensions, H width of a hidden layer, T diffusion steps. All tensors are float32.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from qvpo_rllib.core import losses
from qvpo_rllib.core.kernels import linear, mish

TIME_DIM = 32  # size of the sinusoidal embedding of t
TIME_HIDDEN = 256  # width of the layer behind it


class SplitMLP(nn.Module):
    """An MLP with Mish whose input is a concatenation of parts (obs, action, …).

    The first layer is linear in its parts, so the product of a part that many rows share (the
    observation of N action samples) is computed once and added: `first(i, part)`, `tail(sum)`.

    Args:
        layer_norm: normalise a hidden layer's sums over its units, with a scale and a shift for
            each, before Mish (Ba et al. 2016; in critics as RLPD does, Ball et al. 2023).
    """

    def __init__(
        self,
        part_dims: Sequence[int],
        hidden: Sequence[int],
        out_dim: int,
        *,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.part_dims = tuple(part_dims)
        dims = [sum(part_dims), *hidden, out_dim]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(dims))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in hidden if layer_norm)
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
        hidden = mish(self.normalized(0, pre + self.linears()[0].bias))
        *inner, last = self.linears()[1:]
        for index, layer in enumerate(inner, start=1):
            hidden = mish(self.normalized(index, linear(hidden, layer.weight, layer.bias)))
        return linear(hidden, last.weight, last.bias)

    def normalized(self, index: int, sums: Tensor) -> Tensor:
        """Returns hidden layer `index`'s sums [..., H], normalised if the network does that."""
        if not self.norms:
            return sums
        normalized: Tensor = self.norms[index](sums)
        return normalized

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


# Of critics and obs [B, O] a function of action [B, A], such as `TwinQ.of_action`.
OfAction = Callable[["TwinQ", Tensor], Callable[[Tensor], Tensor]]


class TwinQ(nn.Module):
    """Two critics Q(s, a) that share nothing but their shape.

    Args:
        outputs: numbers that each gives for an action.
        layer_norm: see `SplitMLP`.
    """

    kept = 1  # of both twins' outputs so many count, from the lowest on: Q is their mean

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: Sequence[int],
        *,
        outputs: int = 1,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.outputs = outputs
        self.q1 = SplitMLP((obs_dim, act_dim), hidden, outputs, layer_norm=layer_norm)
        self.q2 = SplitMLP((obs_dim, act_dim), hidden, outputs, layer_norm=layer_norm)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Returns both estimates [2, ...] for obs [..., O] and action [..., A] in [-1, 1].

        Leading dimensions broadcast: for obs [B, 1, O] and action [B, N, A] the observation's share
        of the first layer is computed once per state.
        """
        return self.stacked(self.q1(obs, action), self.q2(obs, action))

    def of_action(self, obs: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns `forward` as a function of the action alone; obs's share is computed once."""
        firsts = [(q, q.first(0, obs)) for q in (self.q1, self.q2)]
        return lambda action: self.stacked(
            *(q.tail(first + q.first(1, action)) for q, first in firsts)
        )

    def q_gradient(self, obs: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns the gradient of Q for the action, [B, A], as a function of action [B, A]."""
        estimates = self.of_action(obs)

        @torch.enable_grad()
        def gradient(action: Tensor) -> Tensor:
            leaf = action.detach().requires_grad_()
            return torch.autograd.grad(self.value(estimates(leaf)).sum(), leaf)[0]

        return gradient

    def stacked(self, *outputs: Tensor) -> Tensor:
        """Returns what `forward` does for the twins' outputs, [..., 1] each."""
        return torch.stack(outputs).squeeze(-1)

    def value(self, estimates: Tensor) -> Tensor:
        """Returns Q, the lower of the twins' estimates: [2, ...] → [...]."""
        return estimates.amin(dim=0)

    def loss(self, estimates: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of estimates [2, B] for the targets [B]."""
        return losses.critic_loss(estimates, target)

    def target(
        self, next_obs: Tensor, actions: Tensor, rank: Callable[[], Tensor], estimates_of: OfAction
    ) -> tuple[Tensor, Tensor]:
        """Returns the next states' value for the TD target, and the action that has it.

        Args:
            next_obs, actions: [B, O] and K_t actions of each state [B, K_t, A].
            rank: returns the actions' Q, [B, K_t].
            estimates_of: does what `of_action` does.

        Returns:
            The best action's Q, [B], and that action, [B, A].
        """
        q, action = losses.best_of(rank(), actions)
        return q[:, 0], action[:, 0]


class QuantileTwinQ(TwinQ):
    """Two critics of n quantiles of the return each: truncated quantile critics, TQC.

    Kuznetsov et al., ICML 2020. A twin's i-th output is the return's quantile of level (i - ½)/n.
    The 2n outputs are pooled and sorted, and the 2d highest are dropped, which keeps Q from being
    overestimated. Q is the mean of the rest.

    Args:
        num_quantiles: n.
        dropped: d, below n.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: Sequence[int],
        num_quantiles: int,
        dropped: int,
        *,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(obs_dim, act_dim, hidden, outputs=num_quantiles, layer_norm=layer_norm)
        self.kept = 2 * (num_quantiles - dropped)

    def stacked(self, *outputs: Tensor) -> Tensor:
        """Returns both twins' quantiles [2, ..., n] for outputs [..., n]."""
        return torch.stack(outputs)

    def value(self, estimates: Tensor) -> Tensor:
        """Returns Q, the mean of the kept quantiles: [2, ..., n] → [...]."""
        return losses.lowest_of(torch.cat([*estimates], dim=-1), self.kept).mean(dim=-1)

    def loss(self, estimates: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of estimates [2, B, n] for the targets' quantiles [2(n - d), B]."""
        return losses.quantile_loss(estimates, target)

    @torch.no_grad()
    def target(
        self, next_obs: Tensor, actions: Tensor, rank: Callable[[], Tensor], estimates_of: OfAction
    ) -> tuple[Tensor, Tensor]:
        """As `TwinQ.target`, but with the best action's kept quantiles, [2(n - d), B]."""
        single = actions.shape[1] == 1
        action = (actions if single else losses.best_of(rank(), actions)[1])[:, 0]
        estimates = estimates_of(self, next_obs)(action)
        return losses.lowest_of(torch.cat([*estimates], dim=-1), self.kept).t(), action


def new_critic(obs_dim: int, act_dim: int, options: Any) -> TwinQ:
    """Returns new critics of the kind that `options.critic` names.

    Args:
        options: `QVPOHyperparameters`, or a bundle's description, which has the same names.
    """
    sizes, layer_norm = (obs_dim, act_dim, options.hidden), options.critic_layer_norm
    if options.critic == "twin":
        return TwinQ(*sizes, layer_norm=layer_norm)
    if options.critic == "quantile":
        return QuantileTwinQ(
            *sizes, options.num_quantiles, options.dropped_quantiles, layer_norm=layer_norm
        )
    raise ValueError(f"critic={options.critic!r} does not exist: use twin or quantile.")
