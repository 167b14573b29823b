"""The two operations that take most of an update's time: a linear layer and Mish.

Both are exact (float32 in, float32 out); the gain lies in the choice of the implementation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# PyTorch multiplies float32 matrices by MKL, whose AVX-512 kernels run on Intel processors alone.
# On an AMD EPYC with AVX-512 oneDNN is twice as fast (205 against 98 GFLOP/s on one core for
# [1024, 256] × [256, 256]). Below these sizes it costs more to set oneDNN up than it gains.
ONEDNN_MIN_ROWS = 64
ONEDNN_MIN_FEATURES = 32
# For larger x mish(x) = x, in float64 too; up to here e² is far from an overflow.
MISH_LINEAR_FROM = 20.0

_library = torch.library.Library("qvpo", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # oneDNN takes a thousand times as long for operands that are not contiguous.
    out: Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight.contiguous(), bias, "none", [], ""
    )
    return out


def _onednn_works() -> bool:
    """Returns whether this build of PyTorch has oneDNN's linear layer, with the right numbers."""
    x, weight, bias = torch.ones(2, 8), torch.ones(4, 8), torch.ones(4)
    try:
        return bool((_onednn_linear(x, weight, bias) == 9).all())
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def _linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _keep_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    grad_x = linear(grad, weight.t()) if needs_x else None
    grad_weight = grad.t() @ x if needs_weight else None
    return grad_x, grad_weight, grad.sum(0) if needs_bias and ctx.has_bias else None


# `torch.compile` treats an operator of our own as one opaque call; inductor accepts oneDNN's own
# operator for constant weights alone.
_library.impl("linear", _onednn_linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("qvpo::linear", _linear_shape, lib=_library)
torch.library.register_autograd(
    "qvpo::linear", _linear_backward, setup_context=_keep_for_backward, lib=_library
)
ONEDNN_WORKS = _onednn_works()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x Wᵀ + b by the fastest exact product: [R, in], [out, in], [out] → [R, out].

    An x of more leading dimensions works too, by PyTorch's own product.
    """
    if (
        ONEDNN_WORKS
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.dim() == 2
        and x.shape[0] >= ONEDNN_MIN_ROWS
        and min(weight.shape) >= ONEDNN_MIN_FEATURES
    ):
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            out: Tensor = torch.ops.qvpo.linear(x, weight, bias)
            return out
        return _onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def mish(x: Tensor) -> Tensor:
    """Returns x·tanh(softplus(x)) by a single exponential; differentiable, any shape.

    The library's logarithm and hyperbolic tangent cost as much as a matrix product.
    """
    if torch.compiler.is_compiling():
        return _fused_mish(x)
    if x.device.type == "cuda":
        return F.mish(x)
    # With r = 1/(1 + eˣ), mish is 2x/(1 + r²) - x. PyTorch's sigmoid is three times as fast as its
    # exponential (which is MKL's, see above), and cannot overflow.
    r = torch.sigmoid(-x)
    return 2 * x / (1 + r * r) - x


def mish_(x: Tensor) -> Tensor:
    """Returns `mish` of a tensor, which it may overwrite; without gradients."""
    if torch.compiler.is_compiling():
        return _fused_mish(x)
    if x.device.type == "cuda":
        return F.mish(x, inplace=True)
    minus_x = x.neg_()
    denominator = minus_x.sigmoid().square_().add_(1)
    return minus_x.addcdiv_(minus_x, denominator, value=-2)


def _fused_mish(x: Tensor) -> Tensor:
    """Returns x·n/(n + 2) with n = e² + 2e, e = eˣ: compiled, one pass with one division."""
    e = torch.exp(x.clamp(max=MISH_LINEAR_FROM))
    n = e * (e + 2)
    return x * (n / (n + 2))
