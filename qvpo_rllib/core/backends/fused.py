"""Both reverse chains of an update in one launch, and the ranking in another, by Triton on a GPU.

A program carries its rows' actions through all T steps in registers. A layer's activations go
through a scratch of its own in the L2 cache, so that both factors of the next product can stream
through shared memory in slices: a layer's whole weights and activations would not fit there.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.engine import FALLBACKS, first_line, matmul_precision
from qvpo_rllib.core.networks import NoisePredictor, SplitMLP, TwinQ
from qvpo_rllib.core.sampler import Chain, min_q, sample_actions

try:
    import triton
    import triton.language as tl
except ImportError:  # on a GPU PyTorch brings it, on a CPU nobody needs it
    triton = None

logger = logging.getLogger(__name__)

jit: Callable[[Any], Any] = triton.jit if triton else lambda function: function
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32}
MAX_WIDTH = 256  # of a hidden layer: a program's sums take half of its registers
HOPPER = 9  # major compute capability that the block's sizes are made for


class Block(NamedTuple):
    """How the work is cut: rows of a program, columns of a slice, warps, slices in flight.

    On an H200 (Ant, 64 samples of 256 states, 20 steps, bfloat16) this one takes 0.66 ms for both
    chains; 128 rows with 2 stages take 0.79, with 3 stages 1.64, and 4 warps with 3 stages 1.65.
    """

    rows: int = 64
    slice: int = 64
    warps: int = 8
    stages: int = 3


@jit
def _mish(x):  # type: ignore[no-untyped-def]
    e = tl.exp(tl.minimum(x, 20.0))
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


@jit
def _product(left, right, total, EMULATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """total + left · right; float32 operands are rounded to TF32."""
    if EMULATED:  # the interpreter multiplies bfloat16 as the integers that hold it
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc=total, input_precision="ieee")
    return tl.dot(left, right, acc=total, input_precision="tf32")


@jit
def _hidden_layers(  # type: ignore[no-untyped-def]
    first, weights, biases, scratch, H: tl.constexpr, LAYERS: tl.constexpr, ROWS: tl.constexpr,
    SLICE: tl.constexpr, DTYPE: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """The last hidden layer's activations [ROWS, H] float32.

    first: the first layer's sums [ROWS, H] float32; weights, biases: of the layers behind it,
    [LAYERS, H, H] and [LAYERS, H]; scratch: this program's own [ROWS, H] DTYPE.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, H)
    slices = tl.arange(0, SLICE)
    hidden = _mish(first)
    for layer in tl.static_range(LAYERS):
        tl.debug_barrier()  # the layer before has been read by all warps
        tl.store(scratch + rows[:, None] * H + columns[None, :], hidden.to(DTYPE))
        tl.debug_barrier()  # this one has been written by all
        total = tl.zeros([ROWS, H], tl.float32) + tl.load(biases + layer * H + columns)[None, :]
        weight = weights + layer * H * H
        for start in range(0, H, SLICE):
            k = start + slices
            left = tl.load(scratch + rows[:, None] * H + k[None, :])
            right = tl.load(weight + columns[None, :] * H + k[:, None])
            total = _product(left, right, total, EMULATED)
        hidden = _mish(total)
    return hidden


@jit
def _chains(  # type: ignore[no-untyped-def]
    noise_1, noise_2, obs, times, constants, action_weight, weights, biases, last_weight, last_bias,
    scratch, out_1, out_2, rows_1, rows_2, num_states, samples_1, samples_2, programs_1,
    STEPS: tl.constexpr, A: tl.constexpr, PADDED: tl.constexpr, H: tl.constexpr,
    LAYERS: tl.constexpr, ROWS: tl.constexpr, SLICE: tl.constexpr, DTYPE: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """Writes the actions of two chains, [R, A] each, in [-1, 1].

    noise: [T, R, A] each; obs, times: shares of the first layer, [2, B, H] and [2, T, H] float32,
    bias included; constants: [T, 5], in the order of the chain; the rest as `Packed` has it.
    """
    program = tl.program_id(0)
    chain = (program >= programs_1).to(tl.int32)
    noise, out, num_rows, num_samples = noise_1, out_1, rows_1, samples_1
    if chain > 0:
        noise, out, num_rows, num_samples = noise_2, out_2, rows_2, samples_2
    rows = (program - chain * programs_1) * ROWS + tl.arange(0, ROWS)
    states = tl.minimum(rows // num_samples, num_states - 1)
    a, h = tl.arange(0, PADDED), tl.arange(0, H)
    inside = (rows < num_rows)[:, None] & (a < A)[None, :]
    places = rows[:, None] * A + a[None, :]
    own_scratch = scratch + program.to(tl.int64) * ROWS * H
    x = tl.load(noise + places, mask=inside, other=0.0)
    for step in range(STEPS):
        first = tl.load(obs + (chain * num_states + states)[:, None] * H + h[None, :])
        first += tl.load(times + (chain * STEPS + step) * H + h)[None, :]
        weight = tl.load(action_weight + (chain * H + h)[None, :] * PADDED + a[:, None])
        first = _product(x.to(DTYPE), weight, first, EMULATED)
        hidden = _hidden_layers(
            first, weights + chain * LAYERS * H * H, biases + chain * LAYERS * H, own_scratch,
            H, LAYERS, ROWS, SLICE, DTYPE, EMULATED,
        )  # fmt: skip
        weight = tl.load(last_weight + (chain * PADDED + a)[None, :] * H + h[:, None])
        bias = tl.load(last_bias + chain * PADDED + a)
        total = tl.zeros([ROWS, PADDED], tl.float32) + bias[None, :]
        predicted = _product(hidden.to(DTYPE), weight, total, EMULATED)
        row = constants + step * 5
        x0 = tl.load(row) * x - tl.load(row + 1) * predicted
        x0 = tl.minimum(tl.maximum(x0, -1.0), 1.0)
        following = noise + tl.minimum(step + 1, STEPS - 1) * num_rows * A  # the last σ is zero
        added = tl.load(following + places, mask=inside, other=0.0)
        x = tl.load(row + 2) * x0 + tl.load(row + 3) * x + tl.load(row + 4) * added
    tl.store(out + places, tl.minimum(tl.maximum(x, -1.0), 1.0), mask=inside)


@jit
def _ranking(  # type: ignore[no-untyped-def]
    actions, obs, action_weight, weights, biases, last_weight, last_bias, scratch, out, num_rows,
    num_states, num_samples,
    A: tl.constexpr, PADDED: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr,
    ROWS: tl.constexpr, SLICE: tl.constexpr, DTYPE: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Writes the twins' minimum [R] for actions [R, A]; the rest as in `_chains`."""
    program = tl.program_id(0)
    rows = program * ROWS + tl.arange(0, ROWS)
    states = tl.minimum(rows // num_samples, num_states - 1)
    a, h = tl.arange(0, PADDED), tl.arange(0, H)
    inside = (rows < num_rows)[:, None] & (a < A)[None, :]
    x = tl.load(actions + rows[:, None] * A + a[None, :], mask=inside, other=0.0).to(DTYPE)
    own_scratch = scratch + program.to(tl.int64) * ROWS * H
    lowest = tl.full([ROWS], float("inf"), tl.float32)
    for twin in range(2):
        first = tl.load(obs + (twin * num_states + states)[:, None] * H + h[None, :])
        weight = tl.load(action_weight + (twin * H + h)[None, :] * PADDED + a[:, None])
        hidden = _hidden_layers(
            _product(x, weight, first, EMULATED), weights + twin * LAYERS * H * H,
            biases + twin * LAYERS * H, own_scratch, H, LAYERS, ROWS, SLICE, DTYPE, EMULATED,
        )  # fmt: skip
        weight = tl.load(last_weight + twin * PADDED * H + h)
        bias = tl.load(last_bias + twin * PADDED)
        lowest = tl.minimum(lowest, tl.sum(hidden * weight[None, :], axis=1) + bias)
    tl.store(out + rows, lowest, mask=rows < num_rows)


class Packed(NamedTuple):
    """What two networks have of each other's shape, one behind the other, as the kernels read it.

    H is the width, L the number of hidden layers behind the first; action dimensions are padded by
    zeros to P.
    """

    action_weight: Tensor  # [2, H, P]
    weights: Tensor  # [2 · L, H, H]
    biases: Tensor  # [2 · L, H] float32
    last_weight: Tensor  # [2, P, H]
    last_bias: Tensor  # [2, P] float32

    @classmethod
    def of(cls, mlps: list[SplitMLP], action_part: int, dtype: torch.dtype) -> Packed:
        """Returns the networks' weights in `dtype`, biases in float32; `last_weight` for one output
        is float32."""
        first = torch.stack([mlp.first_weights()[action_part] for mlp in mlps])
        inner = [layer for mlp in mlps for layer in mlp.linears()[1:-1]]
        last = [mlp.linears()[-1] for mlp in mlps]
        padded = _padded(first.shape[2])
        rows = padded - last[0].out_features
        return cls(
            F.pad(first, (0, padded - first.shape[2])).to(dtype),
            torch.stack([layer.weight for layer in inner]).to(dtype),
            torch.stack([layer.bias for layer in inner]),
            F.pad(torch.stack([layer.weight for layer in last]), (0, 0, 0, rows)).to(
                dtype if last[0].out_features > 1 else torch.float32
            ),
            F.pad(torch.stack([layer.bias for layer in last]), (0, rows)),
        )


class FusedSampler:
    """`sample_actions` and `min_q` by one launch each, for networks of one width.

    Args:
        schedule: of the chains.
        sampling, ranking: the products' precision, "bf16" or "tf32"; another word: not by this.
    """

    def __init__(
        self, schedule: NoiseSchedule, sampling: str, ranking: str, block: Block | None = None
    ) -> None:
        self.samples, self.ranks = sampling in DTYPES, ranking in DTYPES
        self._dtypes = DTYPES.get(sampling), DTYPES.get(ranking)
        self._constants = schedule.reverse_steps.flip(0).float().contiguous()
        self._block = block
        self._emulated = bool(triton.knobs.runtime.interpret)

    @torch.no_grad()
    def sample(self, first: Chain, second: Chain | None = None) -> list[Tensor]:
        """Returns N actions per state of each chain, [B, N, A] in [-1, 1]; both have B states."""
        dtype = self._dtypes[0]
        assert dtype is not None
        chains = [first, second or first]
        actors = [chain.actor for chain in chains]
        obs = torch.stack([c.actor.obs_part(c.obs) + c.actor.mlp.linears()[0].bias for c in chains])
        times = torch.stack([actor.time_part().flip(0) for actor in actors])
        packed = Packed.of([actor.mlp for actor in actors], 0, dtype)
        noises = [chain.noise.contiguous() for chain in chains]
        outs = [torch.empty_like(noise[0]) for noise in noises]
        steps, num_states, _, act_dim = noises[0].shape
        rows = [noise.shape[1] * noise.shape[2] for noise in noises]
        block = self._block_of(dtype)
        programs = [-(-count // block.rows) for count in rows]
        total = sum(programs) if second else programs[0]
        width = obs.shape[2]
        _chains[(total,)](
            *noises,
            obs,
            times,
            self._constants,
            *packed,
            torch.empty(total * block.rows, width, dtype=dtype, device=obs.device),
            *outs,
            *rows,
            num_states,
            noises[0].shape[2],
            noises[1].shape[2],
            programs[0],
            STEPS=steps,
            **self._constexprs(packed, act_dim, dtype),
        )
        return outs[: 2 if second else 1]

    @torch.no_grad()
    def min_q(self, critic: TwinQ, obs: Tensor, actions: Tensor) -> Tensor:
        """Returns the twins' minimum: [B, O], [B, N, A] → [B, N]."""
        dtype = self._dtypes[1]
        assert dtype is not None
        num_states, num_samples, act_dim = actions.shape
        twins = [critic.q1, critic.q2]
        packed = Packed.of(twins, 1, dtype)
        firsts = torch.stack([q.first(0, obs) + q.linears()[0].bias for q in twins])
        out = torch.empty_like(actions[..., 0])
        block, width = self._block_of(dtype), firsts.shape[2]
        programs = -(-out.numel() // block.rows)
        _ranking[(programs,)](
            actions.contiguous(),
            firsts,
            *packed,
            torch.empty(programs * block.rows, width, dtype=dtype, device=obs.device),
            out,
            out.numel(),
            num_states,
            num_samples,
            **self._constexprs(packed, act_dim, dtype),
        )
        return out

    def _block_of(self, dtype: torch.dtype) -> Block:
        own = Block() if dtype == torch.bfloat16 else Block(slice=32)  # twice as wide
        return self._block or own

    def _constexprs(self, packed: Packed, act_dim: int, dtype: torch.dtype) -> dict[str, Any]:
        block = self._block_of(dtype)
        return {
            "A": act_dim,
            "PADDED": packed.action_weight.shape[2],
            "H": packed.action_weight.shape[1],
            "LAYERS": packed.weights.shape[0] // 2,
            "ROWS": block.rows,
            "SLICE": block.slice,
            "DTYPE": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
            "EMULATED": self._emulated,
            "num_warps": block.warps,
            "num_stages": block.stages,
        }


def _padded(act_dim: int) -> int:
    """Returns the least power of two of 16 or more that holds the action dimensions."""
    return max(16, 1 << (act_dim - 1).bit_length())


def fits(hidden: tuple[int, ...]) -> bool:
    """Returns whether the kernels can do networks of these hidden widths."""
    width = hidden[0]
    power = width & (width - 1) == 0
    return len(hidden) > 1 and set(hidden) == {width} and power and 16 <= width <= MAX_WIDTH


def fused_sampler(
    actor: NoisePredictor, critic: TwinQ, schedule: NoiseSchedule, hp: Any, device: torch.device
) -> FusedSampler | None:
    """Returns the kernels if they are for this GPU and these sizes and give the right numbers here.

    If they fail or are wrong, a line says so.

    Args:
        hp: `QVPOHyperparameters`.
    """
    # The kernel ranks twins of one estimate each, without layer normalisation.
    ranking = hp.ranking_precision if hp.critic == "twin" and not hp.critic_layer_norm else "fp32"
    wanted = {hp.sampling_precision, ranking} & DTYPES.keys()
    if not wanted or triton is None or device.type != "cuda" or not fits(hp.hidden):
        return None
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        return None
    fused = FusedSampler(schedule, hp.sampling_precision, ranking)
    counts = hp.num_policy_samples, hp.k_target
    try:
        with matmul_precision("fp32", device):
            check(fused, actor, critic, schedule, hp.batch_size, counts)
    except Exception as error:  # of the compiler, the driver, or the numbers
        FALLBACKS["fused"] = first_line(error)
        logger.warning("engine: without the fused kernels, since %s", FALLBACKS["fused"])
        return None
    return fused


def check(
    fused: FusedSampler,
    actor: NoisePredictor,
    critic: TwinQ,
    schedule: NoiseSchedule,
    num_states: int,
    counts: tuple[int, int],
) -> None:
    """Raises `ArithmeticError` unless the kernels agree with the eager operations on this device.

    Biases are drawn, since they start at zero, where a wrong one shows nothing.

    Args:
        counts: actions per state of the two chains.
    """
    device, (_, _, obs_dim) = fused._constants.device, actor.mlp.part_dims
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    actors, drawn = [copy.deepcopy(actor), copy.deepcopy(actor)], copy.deepcopy(critic)
    with torch.no_grad():
        for network in (*actors, drawn):
            for name, parameter in network.named_parameters():
                parameter.add_(normal(*parameter.shape), alpha=0.3 if "bias" in name else 0.01)
    steps = schedule.diffusion_steps
    chains = [
        Chain(one, normal(num_states, obs_dim), normal(steps, num_states, n, actor.act_dim))
        for one, n in zip(actors, counts, strict=True)
    ]
    if fused.samples:
        for chain, samples in zip(chains, fused.sample(*chains), strict=True):
            exact = sample_actions(chain.actor, schedule, chain.obs, chain.noise)
            coarse = sample_actions(
                chain.actor, schedule, chain.obs, chain.noise, dtype=torch.bfloat16
            )
            _compare("sampling", samples, exact, (coarse - exact).abs().mean())
    if fused.ranks:
        actions = chains[0].noise[0].clamp(-1, 1)
        for _ in range(2):  # in both orders, lest one twin be the lower everywhere
            exact = min_q(drawn, chains[0].obs, actions)
            found = fused.min_q(drawn, chains[0].obs, actions)
            _compare("ranking", found, exact, exact.std() / 100)
            drawn.q1, drawn.q2 = drawn.q2, drawn.q1


def _compare(what: str, found: Tensor, exact: Tensor, allowed: Tensor) -> None:
    error = float((found - exact).abs().mean())
    if not error <= 2 * float(allowed) + 1e-6:  # a NaN is not
        raise ArithmeticError(
            f"{what} is wrong on this GPU: a mean error of {error:.2g}, where {float(allowed):.2g} "
            "comes from rounding"
        )
