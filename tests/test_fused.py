"""The fused kernels: their numbers by Triton's interpreter, and their code as compiled for Hopper.

Neither shows that they run on a GPU, nor how fast: `.ci/gpu` does, on one. A missing barrier cannot
be seen here either.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qvpo_rllib.core.backends import fused
from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks

triton = pytest.importorskip("triton", reason="Triton is not installed here", exc_type=ImportError)
gpu = pytest.mark.gpu


@pytest.fixture(scope="module")
def interpreted():
    """What `fused_by_interpreter.py` reports: the largest errors against float64 of two chains,
    of one alone and of the ranking. Buffers are full of NaN, sizes odd, biases drawn."""
    program = Path(__file__).with_name("fused_by_interpreter.py")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize(("precision", "limit"), [("tf32", 1e-4), ("bf16", 0.1)])
def test_the_kernels_numbers_are_those_of_float64(interpreted, precision, limit):
    """The interpreter multiplies float32 exactly where a GPU would round it to TF32."""
    found = interpreted["errors"][precision]
    assert all(error < limit for error in found)  # a NaN is not
    assert precision == "tf32" or min(found) > 1e-5  # it does round


def test_every_mistake_in_a_kernel_is_seen(interpreted):
    assert len(interpreted["wrong"]) > 10
    unseen = [n for n, e in interpreted["wrong"].items() if all(error < 1e-3 for error in e)]
    assert not unseen


def test_the_check_at_start_takes_the_right_kernels_alone(interpreted):
    assert interpreted["check"] == "right"
    assert not [n for n, said in interpreted["check of wrong"].items() if said == "right"]


@pytest.mark.parametrize(
    ("hidden", "fit"),
    [((256, 256, 256), True), ((64, 64), True), ((64,), False), ((64, 48), False),
     ((96, 96), False), ((512, 512), False)],
)  # fmt: skip
def test_the_kernels_are_for_networks_of_one_width(hidden, fit):
    assert fused.fits(hidden) is fit


# --- Compiled for an H100 ----------------------------------------------------------------------

SHARED_MEMORY, STACK = 232_448, 512  # bytes: the chip's limit; what may spill


@pytest.mark.parametrize(
    ("kernel", "precision"),
    [("_chains", "bf16"), ("_chains", "tf32"), ("_ranking", "tf32")],
)
def test_the_code_for_hopper_fits_and_uses_the_tensor_cores(tmp_path, kernel, precision):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function = getattr(fused, kernel)
    low = "bf16" if precision == "bf16" else "fp32"
    subject = fused.FusedSampler(NoiseSchedule("cosine", 20), precision, precision)
    shape = subject._block_of(fused.DTYPES[precision])
    constants = {"STEPS": 20, "A": 8, "PADDED": 16, "H": 256, "LAYERS": 2, "ROWS": shape.rows,
                 "SLICE": shape.slice, "DTYPE": getattr(triton.language, "bfloat16" if low == "bf16"
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
