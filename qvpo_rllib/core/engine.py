"""How an update is executed; the mathematics is the same.

eager        PyTorch's operations, one by one
native       sampling, ranking and fits by the library of backends.native (CPU), the rest eagerly
compiled     losses and gradients by torch.compile; sampling and ranking natively on a CPU,
             compiled on a GPU
cuda_graph   whole updates captured and replayed (GPU)
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Generator, Tensor

from qvpo_rllib.core import losses, sampler
from qvpo_rllib.core.backends import fit
from qvpo_rllib.core.backends.native import PackedCritic, load_library
from qvpo_rllib.core.kernels import mish
from qvpo_rllib.core.networks import OfAction, TwinQ

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
P = ParamSpec("P")
R = TypeVar("R")

# `torch.compile` may meet this many batch sizes of one function in a process: the chunks of an
# update, acting and evaluating in any number of environments, a test session of many learners.
RECOMPILE_LIMIT = 64
# Updates done eagerly before the first capture: they create the optimisers' state, and the compiled
# kernels and cuBLAS allocate what they need.
UPDATES_BEFORE_CAPTURE = 3
# Updates in the larger of the two graphs.
UPDATES_PER_GRAPH = 8
# What runs more slowly in this process than its engine says, and why.
FALLBACKS: dict[str, str] = {}


class Kernels(NamedTuple):
    """The functions that take an update's time, as an engine executes them."""

    sampler: sampler.SamplerKernels
    critic_objective: Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    actor_objective: Callable[..., tuple[Tensor, Tensor, Tensor]]
    denoising_objective: Callable[..., Tensor] = losses.denoising_objective
    critic_estimates: OfAction = TwinQ.of_action  # without gradient
    # What ranks and has Q's gradient, until the critic's weights change.
    frozen: Callable[[TwinQ], TwinQ | PackedCritic] = lambda critic: critic


EAGER = Kernels(sampler.EAGER, losses.critic_objective, losses.actor_objective)


def resolve_engine(engine: str, device: torch.device) -> str:
    """Returns the engine that `engine` comes to on this machine.

    `auto` is `cuda_graph` on a GPU and `native` on a CPU, where compiled fits are no faster. An
    engine whose compiler does not work here falls back and logs it: `compiled` to `native`, and
    `native` to `eager`.

    Raises:
        ValueError: `cuda_graph` without a CUDA device.
    """
    if engine == "cuda_graph" and device.type != "cuda":
        raise ValueError(
            f"engine='cuda_graph' needs a CUDA device; the learner is on {str(device)!r}. Use "
            "engine='auto', 'compiled', 'native' or 'eager', or give it a GPU (num_gpus=1)."
        )
    if engine == "auto":
        engine = "cuda_graph" if device.type == "cuda" else "native"
    if device.type == "cpu":
        if engine != "eager" and not _native_works():
            return "eager"
        if engine == "compiled" and not _compiling_works("cpu", "native"):
            return "native"
    elif engine == "native" or (
        engine == "compiled" and not _compiling_works(device.type, "eager")
    ):
        return "eager"
    return engine


def kernels_of(engine: str, device: torch.device) -> Kernels:
    """Returns a resolved engine's functions; a CUDA graph captures the compiled ones if it can."""
    if engine == "native":
        return _by_the_library(
            Kernels(
                EAGER.sampler,
                fit.critic_objective,
                fit.actor_objective,
                fit.denoising_objective,
            )
        )
    if engine == "compiled" or (engine == "cuda_graph" and _compiling_works(device.type, "eager")):
        kernels = _compiled()
        return kernels if device.type != "cpu" else _by_the_library(kernels)
    return EAGER


def _by_the_library(kernels: Kernels) -> Kernels:
    """Returns `kernels` with all but the objectives by the native library."""
    return kernels._replace(
        sampler=kernels.sampler._replace(native=True),
        critic_estimates=fit.critic_estimates,
        frozen=functools.partial(PackedCritic, both_ways=True),
    )


def acting_engine(engine: str) -> str:
    """Returns the resolved engine of acting, which is done on the CPU: by the native library."""
    return resolve_engine("eager" if engine == "eager" else "native", CPU)


def describe(engine: str) -> str:
    """Returns a line on a resolved engine, with what to expect of it."""
    if engine in ("eager", "native"):
        return engine
    return (
        f"{engine}; the first update compiles, which takes half a minute to a minute once and some "
        f"seconds from then on (kept in {compile_cache_dir()})"
    )


def compile_cache_dir() -> str:
    """Returns where compiled kernels are kept: $TORCHINDUCTOR_CACHE_DIR, if set."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


@contextmanager
def matmul_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Makes float32 products on a GPU TF32 within it if `precision` is "tf32", else exact.

    Whatever the process has set comes back afterwards. On a CPU nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    before = "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
    # PyTorch's older switch moves its newer ones too; those alone would leave a mixture of the two,
    # in which the compiler raises.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class CudaGraphs:
    """Runs steps that are fixed in shape and memory by replaying captured graphs of them.

    Args:
        generators: every generator that a step draws from; replays advance their streams.
    """

    def __init__(self, generators: list[Generator]) -> None:
        self.generators = generators
        self.done_eagerly = 0
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}  # by size and first step
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def run(
        self, step: Callable[[int], None], num_steps: int, first: int = 0, cycle: int = 1
    ) -> None:
        """Does `num_steps` steps.

        Args:
            step: does the update of a number, from `first` on, and leaves nothing on the host; the
                same in every call. All that it reads and writes must stay where it is in memory for
                as long as this object is used.
            cycle: steps whose numbers differ by it do the same.
        """
        number, end = first, first + num_steps
        while number < end and self.done_eagerly < max(UPDATES_BEFORE_CAPTURE, cycle):
            self._run_on_side_stream(functools.partial(step, number))
            number += 1
        while number < end:
            size = UPDATES_PER_GRAPH if end - number >= UPDATES_PER_GRAPH else 1
            key = size, number % cycle
            if key not in self.graphs:
                steps = [functools.partial(step, number + i) for i in range(size)]
                self.graphs[key] = self._capture(steps)
            self.graphs[key].replay()
            number += size

    def close(self) -> None:
        """Frees the graphs, once the device has done with them."""
        if self.graphs:
            torch.cuda.synchronize()
        self.graphs.clear()

    def _run_on_side_stream(self, step: Callable[[], None]) -> None:
        if self._stream is None:
            # A stream and a pool of its own: when a graph dies, PyTorch drops cuBLAS's workspaces
            # of its stream, and each new stream would get others.
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)
        self.done_eagerly += 1

    def _capture(self, steps: list[functools.partial[None]]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            for generator in self.generators:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                for step in steps:
                    step()
        except Exception as error:
            # PyTorch 2.11 leaves the generators in a state that draws nothing any more.
            raise RuntimeError(
                f"engine='cuda_graph': an update could not be captured ({first_line(error)}). "
                "Start again with engine='compiled', which needs no capture."
            ) from error
        return graph


class SecondStream:
    """Lets a part of a captured update run beside the rest; without `on`, all of it in turn."""

    def __init__(self, *, on: bool) -> None:
        self._stream = torch.cuda.Stream() if on else None  # type: ignore[no-untyped-call]

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Starts what is within it beside what follows, after all that came before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Lets what follows wait for the part. Until then its tensors must be kept."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


@functools.cache
def _compiled() -> Kernels:
    # The compiler is imported here since it doubles the time that importing torch takes.
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    # Without this the backward pass is compiled, and may fail, in the middle of an update. Older
    # versions of PyTorch have no such switch.
    if hasattr(functorch, "force_non_lazy_backward_lowering"):
        functorch.force_non_lazy_backward_lowering = True
    return Kernels(
        sampler.SamplerKernels(_compile(sampler.denoise), _compile(sampler.lowest_q)),
        _compile(EAGER.critic_objective),
        _compile(EAGER.actor_objective),
    )


def _compile(function: Callable[P, R]) -> Callable[P, R]:
    """Returns `function` compiled for every shape that it meets, or as it is once that has failed.

    A failure does no harm: compiling comes before running.
    """
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    # A learner's shapes are few and fixed; for varying ones the code would be slower.
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    failed = False

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal failed
        if not failed:
            try:
                return compiled(*args, **kwargs)
            except (InductorError, BackendCompilerFailed) as error:
                failed = True
                FALLBACKS[function.__name__] = first_line(error)
                logger.warning(
                    "engine: %s runs eagerly, since compiling it failed: %s Deleting %s may help: "
                    "a compiler that was interrupted leaves broken files there.",
                    function.__name__,
                    FALLBACKS[function.__name__],
                    compile_cache_dir(),
                )
        return function(*args, **kwargs)

    return call


@functools.cache
def _native_works() -> bool:
    """Returns whether the native library can be loaded or built; if not, logs that once."""
    try:
        load_library()
    except OSError as error:
        FALLBACKS["native"] = first_line(error)
        logger.warning(
            "engine: eager, since the native library cannot be built here (%s). A C++ compiler "
            "(Debian: apt-get install g++) makes updates and acting faster.",
            FALLBACKS["native"],
        )
        return False
    return True


@functools.cache
def _compiling_works(device_type: str, instead: str) -> bool:
    """Returns whether a small function compiles; if not, logs that once."""
    try:
        x = torch.zeros(64, device=device_type)
        torch.compile(mish)(x)
    except Exception as error:  # whatever is missing: compiler, headers, a writable cache
        FALLBACKS["compiled"] = first_line(error)
        logger.warning(
            "engine: %s, since torch.compile does not work here (%s). A C++ compiler and Python's "
            "headers (Debian: apt-get install g++ python3-dev) make updates faster.",
            instead,
            FALLBACKS["compiled"],
        )
        return False
    return True


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text, at most 200 characters."""
    return str(error).strip().partition("\n")[0][:200]
