"""On a GPU: every engine gives the update of the eager one, and nothing falls back."""

import copy

import pytest
import torch
from test_core_engine import (
    ACT,
    BASE,
    OBS,
    QUANTILES,
    assert_same_networks,
    learner,
    replay,
    transitions,
)

from qvpo_rllib.core import engine
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.replay import ReplayBuffer, Transitions

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def nothing_falls_back():
    """A test that ran on the eager operations would show nothing."""
    engine.FALLBACKS.clear()
    yield
    assert not engine.FALLBACKS


def trained(device, updates, **options):
    result = learner(device, **options)
    result.train(replay(device), updates)
    return result


BEYOND_THE_PAPER = [
    QUANTILES,
    QUANTILES | {"target_refinement": "gradient", "gradient_steps": 2, "gradient_lr": 0.1},
    {"target_refinement": "guidance"},
    QUANTILES | {"q_weights": "softmax", "entropy_weight": "auto", "entropy_in_target": "auto"},
]


@pytest.mark.parametrize("options", [{}, {"policy_interval": 3}, *BEYOND_THE_PAPER])
def test_a_cuda_graph_gives_the_updates_of_the_eager_engine(options):
    """Same seeds: the graph goes on in the generators' streams as eager updates do."""
    graph = trained("cuda", 30, engine="cuda_graph", **options)
    eager = trained("cuda", 30, engine="eager", **options)
    assert graph.engine == "cuda_graph"
    assert {size for size, _ in graph._graphs.graphs} == {1, engine.UPDATES_PER_GRAPH}
    assert_same_networks(graph.networks, eager.networks, atol=1e-3)
    mine, other = graph.pop_metrics(), eager.pop_metrics()
    for name, value in mine.items():
        assert value == pytest.approx(other[name], rel=2e-2, abs=1e-4), name


@pytest.mark.parametrize("options", [{}, *BEYOND_THE_PAPER])
@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_updates_on_a_gpu_equal_those_on_the_cpu(name, options):
    on_cpu, on_gpu = learner(**options), learner("cuda", engine=name, **options)
    for seed in range(3):
        batches = transitions(80, seed=seed), transitions(80, seed=10 + seed)
        noise = on_cpu.draw_update_noise(80)
        on_cpu.update(*batches, noise)
        moved = [type(t)(*(column.cuda() for column in t)) for t in (*batches, noise)]
        on_gpu.update(*moved)
    assert_same_networks(on_cpu.networks, on_gpu.networks, atol=1e-4)


def test_rates_and_entropy_weight_change_without_a_new_capture():
    source = replay("cuda")
    mine = learner("cuda", engine="cuda_graph")
    mine.train(source, 12)
    graphs = dict(mine._graphs.graphs)
    before = copy.deepcopy(mine.networks)
    mine.configure(QVPOHyperparameters(**{**BASE, "engine": "cuda_graph", "actor_lr": 1e-30,
                                      "critic_lr": 1e-30, "entropy_weight": 0.0}))  # fmt: skip
    mine.pop_metrics()
    mine.train(source, 12)
    assert mine._graphs.graphs == graphs
    assert_same_networks(before.actor, mine.networks.actor, atol=0)
    assert_same_networks(before.critic, mine.networks.critic, atol=0)
    assert mine.pop_metrics()["entropy_loss"] == 0


def test_a_graph_sees_what_is_added_to_the_replay():
    source = ReplayBuffer(1000, OBS, ACT, seed=1, device="cuda")
    source.add(Transitions(*(torch.zeros_like(c) for c in transitions(100, seed=0))))
    mine = learner("cuda", engine="cuda_graph")
    mine.train(source, 12)
    mine.pop_metrics()
    new = transitions(900, seed=0)
    source.add(new._replace(reward=torch.full_like(new.reward, 1e3)))
    mine.train(source, 50)
    assert mine.pop_metrics()["td_target_mean"] > 500


def test_training_goes_on_after_a_state_was_loaded():
    mine = trained("cuda", 20, engine="cuda_graph")
    other = learner("cuda", engine="cuda_graph")
    other.load_state_dict(mine.state_dict())
    first, second = replay("cuda"), replay("cuda")
    mine.train(first, 20)
    other.train(second, 20)
    assert_same_networks(mine.networks, other.networks, atol=1e-3)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_sampling_precisions_in_a_graph(precision):
    mine = trained("cuda", 20, engine="cuda_graph", sampling_precision=precision)
    assert all(torch.isfinite(p).all() for p in mine.networks.parameters())
    assert torch.get_float32_matmul_precision() == "highest"


def test_exact_updates_are_exact_whatever_the_process_has_set():
    exact = trained("cuda", 5, engine="eager")
    torch.set_float32_matmul_precision("high")
    try:
        other = trained("cuda", 5, engine="eager")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_same_networks(exact.networks, other.networks, atol=0)
