"""What the fused kernels compute by Triton's interpreter, right and with mistakes: as JSON.

A process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

import copy
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch

from qvpo_rllib.core.backends import fused
from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.networks import NoisePredictor, TwinQ
from qvpo_rllib.core.sampler import min_q, sample_actions

OBS, ACT, STEPS, STATES, HIDDEN = 5, 3, 2, 5, (32, 32, 32)
COUNTS = 5, 3  # actions per state of the two chains: 25 and 15 rows, in blocks of 16
BLOCK = fused.Block(rows=16, slice=16)
SOURCE = Path(fused.__file__).read_text()
MUTATIONS = {
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

OF_THE_RANKING = {"a twin's bias", "the higher twin", "an unwritten row"}
CHECKED = {"a chain's biases", "the higher twin"}


def with_mistake(directory, name):
    """The module once more, with a mistake in its source; None: without one."""
    path = Path(directory) / "fused_again.py"
    source = SOURCE
    if name is not None:
        old, new = MUTATIONS[name]
        assert old in source, name
        source = source.replace(old, new)
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("fused_again", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fused_again"] = module
    spec.loader.exec_module(module)
    return module


def poisoned(*shape, **kwargs):
    shape = shape[0] if isinstance(shape[0], tuple) else shape
    return torch.full(shape, float("nan"), **kwargs)


torch.empty = poisoned  # outputs and scratch: what a kernel reads or leaves unwritten is seen
torch.empty_like = lambda other: torch.full_like(other, float("nan"))


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


def of_the_chains(module, precision, *, alone=False):
    """The largest error of each of two chains at once (of the first alone too), against float64."""
    chains, _, schedule = problem()
    subject = module.FusedSampler(schedule, precision, "fp32", BLOCK)
    found = subject.sample(*(module.Chain(*chain) for chain in chains))
    found += subject.sample(module.Chain(*chains[0])) if alone else []
    exact = [
        sample_actions(
            copy.deepcopy(actor).double(), schedule.double(), obs.double(), noise.double()
        )
        for actor, obs, noise in (*chains, *chains[: int(alone)])
    ]
    return [float((a - b).abs().max()) for a, b in zip(found, exact, strict=True)]


def of_the_ranking(module, precision):
    """The largest error of the ranking, for either order of the twins: each may be the lower."""
    chains, critic, schedule = problem()
    subject = module.FusedSampler(schedule, "fp32", precision, BLOCK)
    worst, (_, obs, noise) = [], chains[0]
    for twins in ((critic.q1, critic.q2), (critic.q2, critic.q1)):
        critic.q1, critic.q2 = twins
        q = subject.min_q(critic, obs, noise[0])
        exact = min_q(copy.deepcopy(critic).double(), obs.double(), noise[0].double())
        worst.append(float(((q - exact) / exact.std()).abs().max()))
    return worst


def checks(module):
    """Whether the check at start accepts the kernels, or what it says."""
    chains, critic, schedule = problem()
    subject = module.FusedSampler(schedule, "bf16", "tf32", BLOCK)
    try:
        module.check(subject, chains[0][0], critic, schedule, STATES, COUNTS)
    except ArithmeticError as error:
        return str(error)
    return "right"


with tempfile.TemporaryDirectory() as directory:
    right = with_mistake(directory, None)
    report = {
        "errors": {
            name: of_the_chains(right, name, alone=True) + of_the_ranking(right, name)
            for name in fused.DTYPES
        },
        "check": checks(right),
        "wrong": {},
        "check of wrong": {},
    }
    for name in MUTATIONS:
        wrong = with_mistake(directory, name)
        errors = of_the_ranking if name in OF_THE_RANKING else of_the_chains
        report["wrong"][name] = errors(wrong, "tf32")
        if name in CHECKED:
            report["check of wrong"][name] = checks(wrong)
print(json.dumps(report))
