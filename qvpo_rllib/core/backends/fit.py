"""The forward and backward pass of the networks that an update fits, by the native library.

PyTorch's calls take longer than the arithmetic of a few hundred rows. Here a whole network is one
call each way. The numbers are those of `networks.py` up to rounding, and do not depend on the
number of threads.
"""

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from qvpo_rllib.core import losses
from qvpo_rllib.core.backends.native import load_library, num_threads, padded
from qvpo_rllib.core.networks import NoisePredictor, QuantileTwinQ, SplitMLP, TwinQ


class _FittedLayer(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("weight_gradient", ctypes.c_void_p),
        ("bias_gradient", ctypes.c_void_p),
        ("activation", ctypes.c_void_p),
        ("slope", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("scale_gradient", ctypes.c_void_p),
        ("shift_gradient", ctypes.c_void_p),
        ("normalized", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
    )


class _FittedMLP(torch.autograd.Function):
    """A `SplitMLP` of x [R, in]; `start` [R, H], if given, is added to its first layer's sums.

    The parameters get gradients, and `start`. They are each layer's weight and bias, then scale and
    shift of the `num_norms` hidden layers that are normalised: all or none.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, start: Tensor | None, num_norms: int, *parameters: Tensor
    ) -> Tensor:
        rows, num_layers = x.shape[0], len(parameters) // 2 - num_norms
        x = x.contiguous()
        # The memory that the structures point to is kept for the backward pass.
        parameters = tuple(parameter.contiguous() for parameter in parameters)
        addresses = [parameter.data_ptr() for parameter in parameters]
        layers = (_FittedLayer * num_layers)()
        for index, layer in enumerate(layers):
            layer.outputs, layer.inputs = parameters[2 * index].shape
            layer.weight, layer.bias = addresses[2 * index :][:2]
            if index < num_norms:
                layer.scale, layer.shift = addresses[2 * (num_layers + index) :][:2]
        hidden = layers[:-1]
        # Of each hidden layer Mish, its slope and the normalised sums; the deviations behind them.
        widths = [rows * padded(layer.outputs) for layer in hidden]
        kept = torch.empty(3 * sum(widths) + rows * num_norms)
        at, itemsize = kept.data_ptr(), kept.itemsize
        for layer, width in zip(hidden, widths, strict=True):
            step = width * itemsize
            layer.activation, layer.slope, layer.normalized = at, at + step, at + 2 * step
            at += 3 * step
        for layer in layers[:num_norms]:
            layer.factor, at = at, at + rows * itemsize
        if start is not None:
            start = _padded_columns(start)
        out = torch.empty(rows, layers[-1].outputs)
        threads = num_threads(rows * sum(layer.inputs * layer.outputs for layer in layers))
        load_library().qvpo_fit_forward(
            *(layers, num_layers, rows, x.data_ptr()),
            *(None if start is None else start.data_ptr(), out.data_ptr(), threads),
        )
        ctx.held = x, parameters, kept, num_norms, layers, threads, start is not None
        return out

    @staticmethod
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, parameters, _kept, num_norms, layers, threads, has_start = ctx.held
        out_gradient = out_gradient.contiguous()
        gradients = [torch.empty_like(parameter) for parameter in parameters]
        addresses = [gradient.data_ptr() for gradient in gradients]
        start_gradient = torch.empty(x.shape[0], padded(layers[0].outputs))
        for index, layer in enumerate(layers):
            layer.weight_gradient, layer.bias_gradient = addresses[2 * index :][:2]
            if index < num_norms:
                scale_and_shift = addresses[2 * (len(layers) + index) :][:2]
                layer.scale_gradient, layer.shift_gradient = scale_and_shift
        load_library().qvpo_fit_backward(
            *(layers, len(layers), x.shape[0], x.data_ptr(), out_gradient.data_ptr()),
            *(start_gradient.data_ptr(), threads),
        )
        of_start = start_gradient[:, : layers[0].outputs] if has_start else None
        return None, of_start, None, *gradients


def _padded_columns(values: Tensor) -> Tensor:
    """Returns [R, H] with zeros behind each row, up to the width that the library takes."""
    missing = padded(values.shape[1]) - values.shape[1]
    return (functional.pad(values, (0, missing)) if missing else values).contiguous()


def _run(x: Tensor, start: Tensor | None, first_weight: Tensor, mlp: SplitMLP) -> Tensor:
    """Returns `mlp` of x, whose parameters get gradients, and x none."""
    first, *behind = mlp.linears()
    parameters = [first_weight, first.bias]
    for layer in behind:
        parameters += [layer.weight, layer.bias]
    norms = cast(list[nn.LayerNorm], list(mlp.norms))
    for norm in norms:
        parameters += [norm.weight, norm.bias]
    out: Tensor = _FittedMLP.apply(x, start, len(norms), *parameters)  # type: ignore[no-untyped-call]
    return out


class _QuantileLoss(torch.autograd.Function):
    """`losses.quantile_loss`; the targets get no gradient."""

    @staticmethod
    def forward(ctx: Any, quantiles: Tensor, target: Tensor) -> Tensor:
        quantiles, target = quantiles.contiguous(), target.t().contiguous()
        twins, rows, num = quantiles.shape
        of_rows, gradient = torch.empty(twins, rows), torch.empty_like(quantiles)
        load_library().qvpo_quantile_loss(
            *(quantiles.data_ptr(), twins, rows, num, target.data_ptr(), target.shape[1]),
            *(of_rows.data_ptr(), gradient.data_ptr()),
        )
        ctx.gradient = gradient.div_(rows)
        return of_rows.mean(dim=1).sum()

    @staticmethod
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient * out_gradient, None


def quantile_loss(quantiles: Tensor, target: Tensor) -> Tensor:
    """Returns what `losses.quantile_loss` does."""
    loss: Tensor = _QuantileLoss.apply(quantiles, target)  # type: ignore[no-untyped-call]
    return loss


class FittedTwinQ(NamedTuple):
    """`TwinQ.forward` for obs [B, O] and action [B, A], and its loss."""

    critic: TwinQ

    def __call__(self, obs: Tensor, action: Tensor) -> Tensor:
        twins = (self.critic.q1, self.critic.q2)
        x = torch.cat([obs, action], dim=1)
        q = [_run(x, None, mlp.linears()[0].weight, mlp) for mlp in twins]
        return self.critic.stacked(*q)

    def loss(self, estimates: Tensor, target: Tensor) -> Tensor:
        if isinstance(self.critic, QuantileTwinQ):
            return quantile_loss(estimates, target)
        return self.critic.loss(estimates, target)


class FittedNoisePredictor(NamedTuple):
    """`NoisePredictor.forward` for noisy_action [R, A], t [R] and obs_part [R, H]."""

    actor: NoisePredictor

    def obs_part(self, obs: Tensor) -> Tensor:
        return self.actor.obs_part(obs)

    def __call__(self, noisy_action: Tensor, t: Tensor, obs_part: Tensor) -> Tensor:
        actor = self.actor
        # A step's share of the first layer is a column of its weight that meets a one.
        one_hot = (t[:, None] == actor.steps).to(noisy_action.dtype)
        x = torch.cat([noisy_action, one_hot], dim=1)
        weight = torch.cat([actor.mlp.first_weights()[0], actor.time_part().t()], dim=1)
        return _run(x, obs_part, weight, actor.mlp)


@torch.no_grad()
def critic_estimates(critic: TwinQ, obs: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns what `TwinQ.of_action` does, without gradient."""
    estimates = FittedTwinQ(critic)
    return lambda action: estimates(obs, action)


def critic_objective(critic: TwinQ, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what `losses.critic_objective` does."""
    return losses.critic_objective(FittedTwinQ(critic), *inputs)


def actor_objective(actor: NoisePredictor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `losses.actor_objective` does."""
    return losses.actor_objective(FittedNoisePredictor(actor), *inputs)


def denoising_objective(actor: NoisePredictor, *inputs: Any) -> Tensor:
    """Returns what `losses.denoising_objective` does."""
    return losses.denoising_objective(FittedNoisePredictor(actor), *inputs)
