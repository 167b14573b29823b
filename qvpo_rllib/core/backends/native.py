"""Sampling, ranking and Q's gradient on a CPU by `native.cpp`, a library built once per machine.

The numbers equal those of `sampler.py` up to rounding (products of bfloat16 are added up in
float32). A row's bits depend neither on the rows beside it nor on the number of threads.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.networks import NoisePredictor, SplitMLP, TwinQ

# A thread pays from this many multiplications on (about 50 microseconds of work).
PRODUCTS_PER_THREAD = 5_000_000
# Its `count` is the library's threads within `pytorch_on_one_thread`; PyTorch's count is a thread's
# own, too.
_library_threads = threading.local()


class _Source(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("padded_inputs", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("form", ctypes.c_int64),
    )


_WIDE, _NARROW, _TRANSPOSED = range(3)  # forms


class _Layer(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("units", ctypes.c_int64),
    )


class _Network(ctypes.Structure):
    _fields_ = (
        ("num_layers", ctypes.c_int64),
        ("observation", ctypes.c_void_p),
        ("action", ctypes.c_void_p),
        ("layers", ctypes.c_void_p),
        ("transposed", ctypes.c_void_p),
    )


class PackedMLP:
    """A copy of a `SplitMLP`'s weights, in the order in which the library reads them.

    Args:
        mlp: float32, on the CPU.
        obs_part, action_part: which parts of its input these are.
        narrow: keeps what meets the action and what is behind it in bfloat16.
        both_ways: keeps the transposed weights too, for a gradient.
    """

    def __init__(
        self,
        mlp: SplitMLP,
        obs_part: int,
        action_part: int,
        *,
        narrow: bool = False,
        both_ways: bool = False,
    ) -> None:
        parts = mlp.first_weights()
        first, *behind = mlp.linears()
        form = _NARROW if narrow else _WIDE
        # A hidden layer's padding is zero, Mish keeps it so, and the next layer has zeros for it.
        sources = [
            _source(parts[obs_part], _WIDE, bias=first.bias),
            _source(parts[action_part], form),
            *(_source(x.weight, form, padded(x.in_features), x.bias) for x in behind),
        ]
        norms = cast(list[nn.LayerNorm], list(mlp.norms))
        for norm, source in zip(norms, sources[1:], strict=False):
            source.scale, source.shift = norm.weight.data_ptr(), norm.bias.data_ptr()
        num_layers = len(sources)
        if both_ways:
            weights = parts[action_part], *(x.weight for x in behind)
            sources += [_source(weight, _TRANSPOSED) for weight in weights]
        library, array = load_library(), (_Source * len(sources))(*sources)
        self._layers = (_Layer * len(sources))()
        size = library.qvpo_pack(array, len(sources), None, None)
        self._memory = torch.empty(size)
        library.qvpo_pack(array, len(sources), self._memory.data_ptr(), self._layers)
        self.hidden = int(self._layers[0].outputs)
        self.products_per_row = sum(x.inputs * x.outputs for x in self._layers[1:num_layers])
        start, each = ctypes.addressof(self._layers), ctypes.sizeof(_Layer)
        back = start + num_layers * each if both_ways else None
        self.network = _Network(len(behind), start, start + each, start + 2 * each, back)


def _source(
    weight: Tensor, form: int, padded_inputs: int | None = None, bias: Tensor | None = None
) -> _Source:
    outputs, inputs = weight.shape
    return _Source(
        *(inputs, outputs, padded_inputs or inputs, weight.data_ptr(), weight.stride(0)),
        *(None if bias is None else bias.data_ptr(), None, None, form),
    )


class PackedActor:
    """`sampler.sample_actions` with the weights of the moment when it is made.

    Args:
        narrow: does the products behind the observation's and the step's part in bfloat16; see
            `multiplies_bfloat16` for where that is faster.
    """

    @torch.no_grad()
    def __init__(
        self, actor: NoisePredictor, schedule: NoiseSchedule, *, narrow: bool = False
    ) -> None:
        self._mlp, self._narrow = PackedMLP(actor.mlp, 2, 0, narrow=narrow), narrow
        time_part = actor.time_part().flip(0)  # in the order of the chain
        self._step_parts = torch.zeros(time_part.shape[0], self._mlp.hidden)
        self._step_parts[:, : time_part.shape[1]] = time_part
        self._constants = schedule.reverse_steps.flip(0).float().contiguous()

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Returns actions [B, N, A] for obs [B, O], noise [T, B, N, A]; float32."""
        steps, num_states, num_samples, act_dim = noise.shape
        obs, noise = obs.contiguous(), noise.contiguous()
        actions = torch.empty(num_states, num_samples, act_dim)
        load_library().qvpo_sample(
            ctypes.byref(self._mlp.network),
            steps,
            self._step_parts.data_ptr(),
            self._constants.data_ptr(),
            obs.data_ptr(),
            obs.shape[1],
            noise.data_ptr(),
            num_states,
            num_samples,
            act_dim,
            actions.data_ptr(),
            int(self._narrow),
            num_threads(steps * num_states * num_samples * self._mlp.products_per_row),
        )
        return actions


class PackedCritic:
    """`sampler.min_q` and `TwinQ.q_gradient` with the weights of the moment when it is made.

    Args:
        both_ways: what `q_gradient` needs.
    """

    def __init__(self, critic: TwinQ, *, both_ways: bool = False) -> None:
        self._critic = critic
        self._twins = [PackedMLP(q, 0, 1, both_ways=both_ways) for q in (critic.q1, critic.q2)]
        self._networks = (_Network * 2)(*(mlp.network for mlp in self._twins))
        self._outputs, self._num_kept = critic.outputs, critic.kept

    def min_q(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Returns Q [B, N] for obs [B, O], actions [B, N, A]; float32."""
        num_states, num_samples, act_dim = actions.shape
        obs, actions = obs.contiguous(), actions.contiguous()
        q = torch.empty(num_states, num_samples)
        load_library().qvpo_min_q(
            self._networks,
            self._outputs,
            self._num_kept,
            obs.data_ptr(),
            obs.shape[1],
            actions.data_ptr(),
            num_states,
            num_samples,
            act_dim,
            q.data_ptr(),
            num_threads(2 * num_states * num_samples * self._twins[0].products_per_row),
        )
        return q

    @torch.no_grad()
    def q_gradient(self, obs: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns what `TwinQ.q_gradient` does."""
        width = self._critic.q1.linears()[1].in_features
        firsts = torch.zeros(2, len(obs), padded(width))
        for first, q in zip(firsts, (self._critic.q1, self._critic.q2), strict=True):
            first[:, :width] = q.first(0, obs) + q.linears()[0].bias

        def gradient(action: Tensor) -> Tensor:
            action, found = action.contiguous(), torch.empty_like(action)
            load_library().qvpo_q_gradient(
                *(self._networks, self._outputs, self._num_kept),
                *(firsts.data_ptr(), action.data_ptr(), *action.shape, found.data_ptr()),
                num_threads(4 * len(action) * self._twins[0].products_per_row),
            )
            return found

        return gradient


def multiplies_bfloat16() -> bool:
    """Returns whether this processor multiplies bfloat16 faster than float32."""
    return bool(load_library().qvpo_multiplies_bfloat16())


def padded(width: int) -> int:
    lanes: int = load_library().qvpo_lanes()
    return -(-width // lanes) * lanes


def num_threads(products: int) -> int:
    available: int = getattr(_library_threads, "count", 0) or torch.get_num_threads()
    return max(1, min(available, products // PRODUCTS_PER_THREAD))


@contextmanager
def pytorch_on_one_thread() -> Iterator[None]:
    """Leaves PyTorch's own operations one thread within it, and the rest to the library.

    PyTorch's threads wait for work by spinning, on cores that the library's own threads need.
    """
    threads, before = torch.get_num_threads(), getattr(_library_threads, "count", 0)
    _library_threads.count = before or threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _library_threads.count = before


SOURCE = Path(__file__).with_name("native.cpp")
# A multiplication and an addition may become one operation, as in every library of matrix products.
# The rest of the arithmetic is strict: a NaN stays a NaN.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC", "-pthread")
COMPILERS = ("g++", "clang++", "c++")  # $CXX, if set, is taken instead

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "qvpo_pack": [_POINTER, _INT, _POINTER, _POINTER],
    "qvpo_sample": [
        *(_POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT, _POINTER),
        *(_INT, _INT, _INT, _POINTER, _INT, _INT),
    ],
    "qvpo_min_q": [
        *(_POINTER, _INT, _INT, _POINTER, _INT, _POINTER),
        *(_INT, _INT, _INT, _POINTER, _INT),
    ],
    "qvpo_q_gradient": [
        *(_POINTER, _INT, _INT, _POINTER, _POINTER, _INT, _INT, _POINTER, _INT),
    ],
    "qvpo_fit_forward": [_POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER, _INT],
    "qvpo_fit_backward": [_POINTER, _INT, _INT, *[_POINTER] * 3, _INT],
    "qvpo_quantile_loss": [_POINTER, _INT, _INT, _INT, _POINTER, _INT, _POINTER, _POINTER],
}


@functools.cache
def load_library() -> ctypes.CDLL:
    """Returns the library; builds it first if this machine does not have it yet.

    Raises:
        OSError: there is no compiler, it failed, or the result cannot be written.
    """
    library = ctypes.CDLL(str(_built()))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    for function in (library.qvpo_lanes, library.qvpo_multiplies_bfloat16, library.qvpo_pack):
        function.restype = _INT
    return library


def cache_dir() -> Path:
    """Returns where built libraries are kept: $XDG_CACHE_HOME/qvpo_rllib, or under ~/.cache.

    Raises:
        OSError: there is neither, as for a user without a home directory.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not base.is_absolute():
        raise OSError(f"no cache directory: {str(base)!r} is not absolute; set XDG_CACHE_HOME")
    return base / "qvpo_rllib"


def _built() -> Path:
    compiler = _compiler()
    included = sorted(SOURCE.parent.glob("*.hpp"))
    parts = [file.read_bytes() for file in (SOURCE, *included)]
    key = hashlib.sha256(b"\0".join([*parts, *_what_decides(compiler)])).hexdigest()
    directory = cache_dir()
    # A library's name ends with its digest. One that was cut short would kill who calls it.
    for library in directory.glob(f"native-{key[:16]}-*.so"):
        if library.stem.endswith(f"-{_digest(library)}"):
            return library
    directory.mkdir(parents=True, exist_ok=True)
    # Several processes may build at once: each moves a file of its own into place.
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        built = Path(scratch) / "native.so"
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"{shlex.join(command)} failed: {done.stderr.strip()[:300]}")
        with built.open("rb") as file:
            os.fsync(file.fileno())
        library = directory / f"native-{key[:16]}-{_digest(built)}.so"
        os.replace(built, library)
    return library


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _compiler() -> list[str]:
    """Returns the command that compiles: of $CXX, which may have arguments, or the first found."""
    try:
        commands = [shlex.split(os.environ.get("CXX", ""))]
    except ValueError as error:
        raise OSError(f"CXX={os.environ['CXX']!r} is no command: {error}") from error
    if not commands[0]:
        commands = [[name] for name in COMPILERS]
    for name, *arguments in commands:
        if path := shutil.which(name):
            return [path, *arguments]
    raise OSError(f"no C++ compiler: looked for {', '.join(name for name, *_ in commands)}")


def _what_decides(compiler: list[str]) -> list[bytes]:
    """Returns what a library depends on beside its source, since machines may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return [part.encode() for part in (*compiler, *FLAGS, platform.machine(), features)]
