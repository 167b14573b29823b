"""The fused kernels: their numbers by Triton's interpreter, and their code as compiled for Hopper.

Neither shows that they run on a GPU, nor how fast: `.ci/gpu` does, on one. A missing barrier cannot
be seen here either.
"""

import copy
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch

from qvpo_rllib.core import fused
from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.hyperparameters import QVPOHyperparameters
from qvpo_rllib.core.networks import NoisePredictor, TwinQ
from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks
from qvpo_rllib.core.sampler import min_q, sample_actions

triton = pytest.importorskip("triton", reason="Triton is not installed here", exc_type=ImportError)
gpu = pytest.mark.gpu

OBS, ACT, STEPS, STATES, HIDDEN = 5, 3, 3, 7, (32, 32, 32)
COUNTS = 5, 2  # actions per state of the two chains: 35 and 14 rows, in blocks of 16
BLOCK = fused.Block(rows=16, slice=16)
SOURCE = Path(fused.__file__).read_text()


def interpreted(monkeypatch, tmp_path, change=lambda source: source):
    """The module once more, for Triton's interpreter, with `change` made to its source."""
    path = tmp_path / "interpreted_fused.py"
    path.write_text(change(SOURCE))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.spec_from_file_location("interpreted_fused", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "interpreted_fused", module)
    spec.loader.exec_module(module)

    def poisoned(*args, **kwargs):
        return torch.full(*(args if isinstance(args[0], tuple) else (args,)), float("nan"), **kwargs)

    monkeypatch.setattr(module.torch, "empty", poisoned)
    monkeypatch.setattr(module.torch, "empty_like", lambda t: torch.full_like(t, float("nan")))
    return module


def randomised(network, seed):
    """Biases start at zero, where a wrong one would show nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.5 if "bias" in name else 0.1)
    return network


def problem():
    torch.manual_seed(0)
    actors = [randomised(NoisePredictor(OBS, ACT, HIDDEN, STEPS), seed) for seed in (1, 2)]
    critic = randomised(TwinQ(OBS, ACT, HIDDEN), 3)
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    chains = [
        (actor, normal(STATES, OBS), normal(STEPS, STATES, count, ACT))
        for actor, count in zip(actors, COUNTS, strict=True)
    ]
    return chains, critic, NoiseSchedule("cosine", STEPS)


def errors(module, sampling, ranking):
    """The largest error of both chains, of one alone, and of the ranking, against float64."""
    chains, critic, schedule = problem()
    subject = module.FusedSampler(schedule, sampling, ranking, BLOCK)
    found = subject.sample(*(module.Chain(*chain) for chain in chains))
    found += subject.sample(module.Chain(*chains[0]))
    exact = [
        sample_actions(copy.deepcopy(actor).double(), schedule.double(), obs.double(),
                       noise.double())
        for actor, obs, noise in (*chains, chains[0])
    ]  # fmt: skip
    worst = [float((a - b).abs().max()) for a, b in zip(found, exact, strict=True)]
    _, obs, noise = chains[0]
    q = subject.min_q(critic, obs, noise[0])
    expected = min_q(copy.deepcopy(critic).double(), obs.double(), noise[0].double())
    return [*worst, float(((q - expected) / expected.std()).abs().max())]


@pytest.mark.parametrize(("precision", "limit"), [("tf32", 1e-4), ("bf16", 0.1)])
def test_the_kernels_numbers_are_those_of_float64(monkeypatch, tmp_path, precision, limit):
    """The interpreter multiplies float32 exactly where a GPU would round it to TF32."""
    found = errors(interpreted(monkeypatch, tmp_path), precision, precision)
    assert max(found) < limit  # a NaN is not
    assert precision == "tf32" or min(found) > 1e-5  # it does round


MUTATIONS = {
    "rows of another state": ("rows // samples_1", None),
    "state": ("states = tl.minimum(rows // num_samples, num_states - 1)",
              "states = tl.minimum(rows // (num_samples + 1), num_states - 1)"),
    "a chain's obs": ("obs + (chain * num_states + states)", "obs + (states)"),
    "a chain's weights": ("weights + chain * LAYERS * H * H", "weights"),
    "a chain's biases": ("biases + chain * LAYERS * H,", "biases,"),
    "a layer's bias": ("biases + layer * H + columns", "biases + columns"),
    "a layer's weight": ("weight = weights + layer * H * H", "weight = weights"),
    "the step's time": ("(chain * STEPS + step) * H", "(chain * STEPS) * H"),
    "the step's noise": ("tl.minimum(step + 1, STEPS - 1)", "step"),
    "the last bias": ("predicted = _product(hidden.to(DTYPE), weight, total, EMULATED)",
                      "predicted = _product(hidden.to(DTYPE), weight, total * 0, EMULATED)"),
    "a twin's bias": ("last_bias + twin * PADDED", "last_bias"),
    "the higher twin": ("lowest = tl.minimum(lowest, ", "lowest = tl.minimum(1e9, "),
    "an unwritten row": ("mask=rows < num_rows)", "mask=rows < num_rows - 1)"),
    "the first clip": ("x0 = tl.minimum(tl.maximum(x0, -1.0), 1.0)", "x0 = x0"),
}  # fmt: skip
del MUTATIONS["rows of another state"]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_in_a_kernel_is_seen(monkeypatch, tmp_path, name):
    old, new = MUTATIONS[name]
    assert SOURCE.count(old) >= 1
    module = interpreted(monkeypatch, tmp_path, lambda source: source.replace(old, new))
    assert not max(errors(module, "tf32", "tf32")) < 1e-3


def test_a_wrong_kernel_fails_the_check_at_start(monkeypatch, tmp_path):
    chains, critic, schedule = problem()

    def checked(module):
        subject = module.FusedSampler(schedule, "bf16", "tf32", BLOCK)
        module.check(subject, chains[0][0], critic, schedule, STATES, COUNTS)

    checked(interpreted(monkeypatch, tmp_path))
    wrong = MUTATIONS["a chain's biases"]
    module = interpreted(monkeypatch, tmp_path, lambda source: source.replace(*wrong))
    with pytest.raises(ArithmeticError, match="sampling is wrong on this GPU"):
        checked(module)


@pytest.mark.parametrize(
    ("hidden", "fit"),
    [((256, 256, 256), True), ((64, 64), True), ((64,), False), ((64, 48), False),
     ((96, 96), False), ((512, 512), False)],
)  # fmt: skip
def test_the_kernels_are_for_networks_of_one_width(hidden, fit):
    assert fused.fits(hidden) is fit


# --- Compiled for an H100 ----------------------------------------------------------------------

SHARED_MEMORY, STACK = 232_448, 512  # bytes: the chip's limit; what may spill
POINTERS = {"_chains": 13, "_ranking": 9}  # a kernel's first arguments; integers follow


@pytest.mark.parametrize(
    ("kernel", "precision"), [("_chains", "bf16"), ("_chains", "tf32"), ("_ranking", "tf32")]
)
def test_the_code_for_hopper_fits_and_uses_the_tensor_cores(tmp_path, kernel, precision):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function = getattr(fused, kernel)
    low, block = ("bf16", 64) if precision == "bf16" else ("fp32", 32)
    constants = {"STEPS": 20, "A": 8, "PADDED": 16, "H": 256, "LAYERS": 2, "ROWS": 128,
                 "SLICE": block, "DTYPE": getattr(triton.language, "bfloat16" if low == "bf16"
                                                  else "float32"), "EMULATED": False}  # fmt: skip
    constants = {n: v for n, v in constants.items() if n in function.arg_names}
    in_low = {"action_weight", "weights", "scratch"} | (
        {"last_weight"} if kernel == "_chains" else set()
    )
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith(("rows_", "num_", "samples_", "programs_")):
            signature[name] = "i32"
        else:
            signature[name] = f"*{low if name in in_low else 'fp32'}"
            attributes[(index,)] = [["tt.divisibility", 16]]
    shape = fused.Block()
    compiled = compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": shape.warps, "num_stages": shape.stages},
    )
    assert 0 < compiled.metadata.shared <= SHARED_MEMORY
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    used = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    assert int(re.search(r"STACK:(\d+)", used.stdout)[1]) <= STACK, used.stdout
    code = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True)
    assert code.stdout.count("HGMMA") > 0


# --- On a GPU ----------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_auto_takes_the_kernels_on_hopper_and_trains_with_them(precision):
    if torch.cuda.get_device_capability()[0] != fused.HOPPER:
        pytest.skip("not a Hopper GPU")
    from test_core_engine import replay

    hp = QVPOHyperparameters(
        k_target=2, sampling_precision=precision, ranking_precision="tf32", batch_size=64
    )
    learner = QVPOLearner(QVPONetworks(11, 3, hp), hp, seed=0, device="cuda")
    assert learner.fused is not None
    learner.train(replay("cuda"), 20)
    assert all(torch.isfinite(p).all() for p in learner.networks.parameters())
