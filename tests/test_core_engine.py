"""Every engine must give the same update, and a straightforward implementation too."""

import copy
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

from qvpo_rllib.bench.straightforward import Straightforward
from qvpo_rllib.core import engine, kernels
from qvpo_rllib.core.backends.acting_copy import ActingCopy
from qvpo_rllib.core.engine import kernels_of
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks
from qvpo_rllib.core.replay import ReplayBuffer, Transitions
from qvpo_rllib.core.sampler import ActionSelector, sample_actions

OBS, ACT = 11, 3
CPU = torch.device("cpu")

# Rates that move every parameter far; sizes for which oneDNN and several chunks are used.
BASE = {
    "hidden": (64, 48),
    "diffusion_steps": 6,
    "k_target": 2,
    "num_policy_samples": 32,
    "num_uniform_samples": 3,
    "entropy_weight": 0.5,
    "actor_lr": 3e-3,
    "critic_lr": 3e-3,
    "tau": 0.2,
    "batch_size": 80,
    "warmup_steps": 0,
    "replay_capacity": 1000,
    "engine": "eager",
}


QUANTILES = {"critic": "quantile", "critic_layer_norm": True}


def transitions(count, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(count, *shape, generator=generator).to(device)

    return Transitions(
        normal(OBS), normal(ACT).tanh(), normal(), normal(OBS), (normal() > 1).float()
    )


def learner(device="cpu", **options):
    hp = QVPOHyperparameters(**{**BASE, **options})
    torch.manual_seed(0)
    return QVPOLearner(QVPONetworks(OBS, ACT, hp), hp, seed=0, device=device)


def replay(device="cpu"):
    result = ReplayBuffer(1000, OBS, ACT, seed=1, device=device)
    result.add(transitions(500, seed=2))
    return result


def assert_same_networks(a, b, atol=2e-6):
    for (name, mine), other in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), other.cpu(), atol=atol, rtol=0, msg=name)


def assert_same_updates(one, other, atol=2e-6):
    """Three updates on the same batches with the same noise."""
    before = copy.deepcopy(one.networks)
    for seed in range(3):
        batches = transitions(80, seed=seed), transitions(80, seed=10 + seed)
        noise = one.draw_update_noise(80)
        results = one.update(*batches, noise), other.update(*batches, noise)
        for name, value in results[0].items():
            torch.testing.assert_close(value, results[1][name], atol=1e-4, rtol=1e-4, msg=name)
    assert_same_networks(one.networks, other.networks, atol)
    moved = [
        float((p - q).detach().abs().max())
        for p, q in zip(before.parameters(), one.networks.parameters(), strict=True)
    ]
    assert min(moved) > 20 * atol


# --- The straightforward implementation --------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"k_target": 1}, {"num_uniform_samples": 0}, {"grad_clip": None}]
)
def test_eager_updates_equal_the_straightforward_implementation(options):
    mine = learner(**options)
    plain = Straightforward(mine.networks, mine.hp)
    for seed in range(3):
        batches = transitions(80, seed=seed), transitions(80, seed=10 + seed)
        noise = mine.draw_update_noise(80)
        losses, expected = mine.update(*batches, noise), plain.update(*batches, noise)
        for name in expected:
            torch.testing.assert_close(losses[name], expected[name], atol=1e-5, rtol=1e-5)
    theirs = copy.deepcopy(mine.networks)
    plain.load_parameters(theirs)
    assert_same_networks(mine.networks, theirs)


# --- Compiled ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiles():
    """The machine that runs the tests is to have a compiler, as `.ci/run` sees to."""
    assert engine.resolve_engine("compiled", CPU) == "compiled"


# Compiling takes half a minute for each.
COMPILED = [
    {
        "k_target": 1,
        "num_chosen_samples": 2,
        "vlo_coefficient": True,
        "update_order": "policy_then_critic",
        "q_weights": "qexp",
        "entropy_reduction": "mean",
        "target_refinement": "gradient",
    },
    QUANTILES | {"q_weights": "softmax", "entropy_weight": "auto", "entropy_in_target": "auto"},
    {"target_refinement": "guidance"},
]


@pytest.mark.parametrize(
    "options", [{}, *(pytest.param(options, marks=pytest.mark.slow) for options in COMPILED)]
)
def test_compiled_updates_equal_eager_ones(compiles, options):
    compiled = learner(**options, engine="compiled")
    assert compiled.engine == "compiled"
    assert_same_updates(learner(**options), compiled)


def test_auto_is_eager_where_no_compiler_is_found_and_says_so_in_one_line(tmp_path):
    program = (
        "import torch; from qvpo_rllib.core.engine import resolve_engine;"
        "cpu = torch.device('cpu');"
        "print(resolve_engine('auto', cpu), resolve_engine('compiled', cpu))"
    )
    missing = {"CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | missing,
        check=True,
    )
    assert run.stdout.split() == ["eager", "eager"]
    said = [line for line in run.stderr.splitlines() if line.startswith("engine:")]
    assert len(said) == 1
    assert "/nonexistent/g++" in said[0]
    assert "apt-get install g++" in said[0]


def test_where_no_compiler_is_found_samples_are_not_drawn_in_slow_bfloat16(monkeypatch):
    monkeypatch.setattr(engine, "_native_works", lambda: False)
    mine, expected = learner(engine="auto", sampling_precision="bf16"), learner()
    assert mine.engine == "eager"
    for one in (mine, expected):
        one.train(replay(), 2)
    assert_same_networks(mine.networks, expected.networks, atol=0)


def test_compiled_is_native_where_only_torch_compile_fails_and_says_so(monkeypatch, caplog):
    def broken(function, **options):
        raise RuntimeError("Python.h: no such file")

    monkeypatch.setattr(torch, "compile", broken)
    engine._compiling_works.cache_clear()
    try:
        resolved = [engine.resolve_engine(name, CPU) for name in ("auto", "compiled", "native")]
    finally:
        engine._compiling_works.cache_clear()
    assert resolved == ["native"] * 3
    (said,) = caplog.messages
    assert "\n" not in said
    assert "Python.h" in said


def test_a_function_that_fails_to_compile_runs_eagerly_from_then_on(monkeypatch, caplog):
    from torch._inductor.exc import InductorError

    def compiler(function, **options):
        def broken(*args):
            raise InductorError(ImportError("x.main.so: file too short"), None)

        return broken

    monkeypatch.setattr(torch, "compile", compiler)
    double = engine._compile(lambda x: 2 * x)
    assert [double(1), double(2)] == [2, 4]
    (said,) = caplog.messages
    assert "\n" not in said
    assert "file too short" in said
    assert engine.compile_cache_dir() in said


# --- Precision ---------------------------------------------------------------------------------


def test_bf16_sampling_draws_nearly_the_same_actions_and_leaves_everything_else_in_fp32():
    exact, rounded = learner(), learner(sampling_precision="bf16")
    nets = exact.networks
    obs = torch.randn(80, OBS, generator=torch.Generator().manual_seed(3))
    noise = exact.draw_update_noise(80).policy
    samples = sample_actions(nets.actor, nets.schedule, obs, noise)
    coarse = sample_actions(nets.actor, nets.schedule, obs, noise, dtype=torch.bfloat16)
    assert coarse.dtype == torch.float32
    assert 0 < float((samples - coarse).abs().mean()) < 0.01
    rounded.train(replay(), 2)
    assert {p.dtype for p in rounded.networks.parameters()} == {torch.float32}
    exact.train(replay(), 2)
    assert_same_networks(exact.networks, rounded.networks, atol=2e-2)
    with pytest.raises(AssertionError):
        assert_same_networks(exact.networks, rounded.networks, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [{"engine": "cuda_graph"}, {"sampling_precision": "tf32"}, {"ranking_precision": "tf32"}],
    ids=str,
)
def test_what_needs_a_gpu_is_refused_on_a_cpu(options):
    with pytest.raises(ValueError, match=f"{next(iter(options.values()))}.*GPU"):
        learner(**options)


# --- The two kernels ---------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 63, 64, 200])
@pytest.mark.parametrize(("features", "out"), [(5, 64), (64, 64), (40, 3), (33, 95)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_its_gradients(rows, features, out, bias):
    generator = torch.Generator().manual_seed(rows + out)
    # A slice of a wider weight, as the first layer's parts are.
    shapes = ((rows, features), (out, features + 4), (out,))
    x, wide, b = (torch.randn(s, generator=generator, requires_grad=True) for s in shapes)
    exact = [t.detach().double().requires_grad_() for t in (x, wide, b)]

    result = kernels.linear(x, wide[:, 4:], b if bias else None)
    expected = F.linear(exact[0], exact[1][:, 4:], exact[2] if bias else None)
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=1e-5)
    result.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in zip((x, wide, b), exact, strict=True):
        if other.grad is None:
            assert mine.grad is None
        else:
            torch.testing.assert_close(mine.grad.double(), other.grad, atol=1e-2, rtol=1e-4)


def test_this_build_has_onednn():
    """Else the tests above compare PyTorch with itself."""
    assert kernels.ONEDNN_WORKS


def test_gradient_of_mish():
    x = torch.linspace(-30, 30, 601, dtype=torch.float64, requires_grad=True)
    mine = torch.autograd.grad(kernels.mish(x).sum(), x)[0]
    library = torch.autograd.grad(F.mish(x).sum(), x)[0]
    torch.testing.assert_close(mine, library, atol=1e-12, rtol=1e-10)


# --- Training from the replay ------------------------------------------------------------------


@pytest.mark.parametrize("order", ["critic_then_policy", "policy_then_critic"])
def test_train_is_sampling_and_updating_and_its_metrics_are_means(order):
    one, other = learner(update_order=order), learner(update_order=order)
    first, second = replay(), replay()
    one.train(first, 2)
    one.train(first, 1)
    seen = []
    for _ in range(3):
        batches = [second.sample(80)]
        if order == "critic_then_policy":
            batches.append(second.sample(80))
        seen.append(other.update(*batches))
        other.num_updates += 1
    assert_same_networks(one.networks, other.networks, atol=0)
    assert one.num_updates == other.num_updates == 3
    metrics = one.pop_metrics()
    assert metrics.keys() == seen[0].keys()
    for name, value in metrics.items():
        mean = sum(float(metric[name]) for metric in seen) / 3
        assert value == pytest.approx(mean, rel=1e-5, abs=1e-7)
    assert one.pop_metrics() == {}


def test_graphs_run_every_step_once(monkeypatch):
    """The bookkeeping of `CudaGraphs`, with functions in place of graphs."""
    done = []

    class Graph:
        def __init__(self, size):
            self.size = size

        def replay(self):
            done.extend([self.size] * self.size)

    def eagerly(self, step):
        done.append(0)
        self.done_eagerly += 1

    monkeypatch.setattr(engine.CudaGraphs, "_run_on_side_stream", eagerly)
    monkeypatch.setattr(engine.CudaGraphs, "_capture", lambda self, steps: Graph(len(steps)))
    graphs = engine.CudaGraphs([])
    counts = [1, 1, 4, 0, 8, 19, 1, 100]
    for count in counts:
        before = len(done)
        graphs.run(lambda number: None, count)
        assert len(done) - before == count
    assert done[:3] == [0, 0, 0]
    assert 0 not in done[3:]
    assert sorted(graphs.graphs) == [(1, 0), (engine.UPDATES_PER_GRAPH, 0)]


def test_a_failed_capture_says_what_to_do(monkeypatch):
    class Graph:
        def register_generator_state(self, generator):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    with pytest.raises(RuntimeError, match=r"not permitted.*engine='compiled'"):
        engine.CudaGraphs([torch.Generator()])._capture([lambda: None])


def test_nothing_keeps_the_replay_alive_that_was_trained_on():
    mine, source = learner(), replay()
    mine.train(source, 1)
    known = weakref.ref(source)
    del source
    assert known() is None


def test_loading_a_state_leaves_the_learner_alone_that_it_came_from():
    mine, other, third = learner(), learner(), learner()
    mine.train(replay(), 2)
    kept = copy.deepcopy(mine.state_dict())
    other.load_state_dict(mine.state_dict())
    third.load_state_dict(kept)
    mine.train(replay(), 2)
    for loaded in (other, third):
        loaded.train(replay(), 2)
    assert_same_networks(other.networks, third.networks, atol=0)


def test_a_copy_to_act_with_follows_the_networks_that_learn():
    mine = learner(normalize_observations=True)
    acting = copy.deepcopy(mine.networks)
    follower = ActingCopy(mine.networks, acting, ("actor.", "critic.", "observations."))
    obs = torch.randn(5, OBS, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(6, 5, 4, ACT, generator=torch.Generator().manual_seed(1))
    native = kernels_of("native", CPU).sampler
    selectors = [
        ActionSelector(nets.actor, nets.critic, nets.schedule, native)
        for nets in (mine.networks, acting)
    ]
    for _ in range(3):
        mine.train(replay(), 1)
        follower.refresh(mine.num_updates)
        selectors[0].weights_changed()
        first, second = (selector.act(obs, noise)[0] for selector in selectors)
        assert torch.equal(first, second)
    with torch.no_grad():
        mine.networks.actor.mlp.linears()[0].weight.mul_(0.5)  # as loading weights does
    follower.refresh(mine.num_updates)
    assert torch.equal(mine.networks.actor.mlp.linears()[0].weight,
                       acting.actor.mlp.linears()[0].weight)  # fmt: skip
    assert not torch.equal(selectors[1].act(obs, noise)[0], second)
    mine.observe(obs)
    follower.refresh(mine.num_updates)
    assert torch.equal(acting.normalize(obs), mine.networks.normalize(obs))
    assert acting.observations.number == 5
