"""The native library: the numbers of the eager sampler, the same bits for a row everywhere."""

import math
import os
import subprocess
import sys

import pytest
import torch
from test_core_engine import (
    ACT,
    CPU,
    OBS,
    assert_same_networks,
    assert_same_updates,
    learner,
    replay,
    transitions,
)

from qvpo_rllib.core import engine, sampler
from qvpo_rllib.core.backends import native
from qvpo_rllib.core.backends import native as native_build
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks
from qvpo_rllib.core.sampler import (
    ActionSelector,
    draw_noise,
    min_q,
    sample_actions,
)

# Critics that the library ranks by: 50 and 37 units leave it padding to get right.
CRITICS = [
    {},
    {"critic": "quantile"},
    {"critic_layer_norm": True},
    {"critic": "quantile", "num_quantiles": 9, "critic_layer_norm": True},
]
NATIVE = sampler.EAGER._replace(native=True)
SIZES = [(1, 1), (1, 4), (7, 4), (64, 4), (3, 32), (5, 1), (33, 3), (2, 100)]


@pytest.fixture(scope="module", autouse=True)
def builds():
    """The machine that runs the tests is to have a compiler, as `.ci/run` sees to."""
    assert engine.resolve_engine("native", CPU) == "native"


def networks(obs_dim=OBS, act_dim=ACT, seed=0, **options):
    options = {"hidden": (50, 37), "diffusion_steps": 6, "engine": "eager", **options}
    torch.manual_seed(seed)
    nets = QVPONetworks(obs_dim, act_dim, QVPOHyperparameters(**options))
    for parameter in nets.parameters():  # biases begin at zero
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return nets


def inputs(nets, num_states, num_samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    steps = nets.schedule.diffusion_steps
    obs_dim = nets.critic.q1.part_dims[0]
    obs = torch.randn(num_states, obs_dim, generator=generator)
    return obs, draw_noise(steps, num_states, num_samples, nets.act_dim, generator, CPU)


@pytest.mark.parametrize(("num_states", "num_samples"), SIZES)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"obs_dim": 348, "act_dim": 17, "hidden": (64, 64, 64)},
        {"obs_dim": 1, "act_dim": 1, "hidden": (5,), "diffusion_steps": 1},
        {"hidden": (256, 256), "diffusion_steps": 20, "noise_schedule": "vp"},
        *CRITICS[1:],
        {"critic": "quantile", "num_quantiles": 1, "dropped_quantiles": 0, "hidden": (5,)},
        {"critic": "quantile", "num_quantiles": 40, "dropped_quantiles": 39},
    ],
    ids=lambda shape: str(shape.get("hidden", "")),
)
def test_samples_and_values_equal_the_eager_ones(num_states, num_samples, shape):
    nets = networks(**shape)
    obs, noise = inputs(nets, num_states, num_samples)
    with torch.no_grad():
        actions = sample_actions(nets.actor, nets.schedule, obs, noise, NATIVE)
        expected = sample_actions(nets.actor, nets.schedule, obs, noise)
        torch.testing.assert_close(actions, expected, atol=1e-4, rtol=0)
        q = min_q(nets.critic, obs, actions, NATIVE)
        torch.testing.assert_close(q, min_q(nets.critic, obs, actions), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [{}, {"act_dim": 4}, {"hidden": (256, 256)}], ids=str)
def test_bfloat16_samples_are_as_near_as_the_eager_ones_of_bfloat16(shape):
    nets = networks(**shape)
    obs, noise = inputs(nets, 40, 5)
    exact = sample_actions(nets.actor, nets.schedule, obs, noise)
    eager = sample_actions(nets.actor, nets.schedule, obs, noise, dtype=torch.bfloat16)
    packed = native.PackedActor(nets.actor, nets.schedule, narrow=True)
    mine = packed.sample(obs, noise)
    # It adds up in float32, so that it loses less.
    assert 0 < float((mine - exact).abs().mean()) < float((eager - exact).abs().mean())
    assert torch.equal(packed.sample(obs[7:9], noise[:, 7:9]), mine[7:9])


def test_bfloat16_products_are_those_of_rounded_numbers():
    """A network of one linear layer behind Mish, against float64."""
    nets = networks(obs_dim=2, act_dim=3, hidden=(33,), diffusion_steps=1)
    generator = torch.Generator().manual_seed(2)
    obs, noise = (
        torch.randn(50, 2, generator=generator),
        torch.randn(1, 50, 1, 3, generator=generator),
    )

    def rounded(x):
        return x.detach().bfloat16().double()

    actor, (first, last) = nets.actor, nets.actor.mlp.linears()
    start = (actor.obs_part(obs) + actor.time_part() + first.bias).detach().double()
    sums = start + rounded(noise[0, :, 0]) @ rounded(actor.mlp.first_weights()[0]).t()
    hidden = rounded(sums * torch.tanh(torch.nn.functional.softplus(sums)))
    predicted = hidden @ rounded(last.weight).t() + last.bias.detach()
    row = nets.schedule.reverse_steps[0].double()
    x0 = (row[0] * noise[0, :, 0] - row[1] * predicted).clamp(-1, 1)
    expected = (row[2] * x0 + row[3] * noise[0, :, 0]).clamp(-1, 1)
    actions = native.PackedActor(actor, nets.schedule, narrow=True).sample(obs, noise)[:, 0]
    # Of 33 hidden numbers a few are rounded to the other neighbour, half of the last place away.
    torch.testing.assert_close(actions.double(), expected, atol=1e-2, rtol=0)
    assert float((actions - expected).abs().median()) < 1e-4


def test_bfloat16_is_taken_only_where_it_is_faster(monkeypatch):
    nets = networks()
    obs, noise = inputs(nets, 4, 3)
    coarse, exact = (
        native.PackedActor(nets.actor, nets.schedule, narrow=narrow).sample(obs, noise)
        for narrow in (True, False)
    )
    for faster, expected in ((True, coarse), (False, exact)):
        monkeypatch.setattr(sampler, "multiplies_bfloat16", lambda faster=faster: faster)
        actions = sample_actions(nets.actor, nets.schedule, obs, noise, NATIVE, torch.bfloat16)
        assert torch.equal(actions, expected)


@pytest.mark.parametrize(
    "options",
    [
        *CRITICS,
        {"critic_layer_norm": True, "hidden": (50, 37)},
        {"k_target": 1, "q_weights": "qexp"},
        {"q_weights": "softmax", "entropy_weight": "auto"},
        {"target_refinement": "gradient"},
        {"entropy_in_target": "auto"},
        {"target_refinement": "guidance", "num_chosen_samples": 2},
    ],
)
def test_updates_equal_eager_ones(options):
    mine = learner(**options, engine="native")
    assert mine.engine == "native"
    assert_same_updates(learner(**options), mine)


@pytest.mark.parametrize("options", CRITICS)
def test_a_row_is_the_same_bits_in_every_batch_and_on_any_number_of_threads(options):
    nets = networks(hidden=(256, 256), **options)
    actor, critic = native.PackedActor(nets.actor, nets.schedule), native.PackedCritic(nets.critic)
    obs, noise = inputs(nets, 300, 5)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            actions = actor.sample(obs, noise)
            results.append((actions, critic.min_q(obs, actions)))
        torch.set_num_threads(1)
        for start, end in ((0, 1), (17, 40), (299, 300)):
            part = actor.sample(obs[start:end], noise[:, start:end])
            assert torch.equal(part, results[0][0][start:end])
            assert torch.equal(critic.min_q(obs[start:end], part), results[0][1][start:end])
    finally:
        torch.set_num_threads(threads)
    # Else three threads are never used, and the test shows nothing.
    assert 6 * 300 * 5 * actor._mlp.products_per_row > 3 * native.PRODUCTS_PER_THREAD
    for actions, q in results[1:]:
        assert torch.equal(actions, results[0][0])
        assert torch.equal(q, results[0][1])


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("refinement", ["none", "gradient"])
def test_an_update_is_the_same_bits_on_any_number_of_threads(three_threads, refinement):
    options = {"hidden": (256, 256), "num_policy_samples": 64, "engine": "native"}
    options["target_refinement"] = refinement
    one, other = learner(**options), learner(**options)
    assert native.num_threads(80 * 64 * 256 * 256) == 3  # else three threads are never used
    one.train(replay(), 3)
    torch.set_num_threads(1)
    other.train(replay(), 3)
    assert_same_networks(one.networks, other.networks, atol=0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (1, 3)),
        ({"target_refinement": "gradient"}, (1, 3)),
        ({"target_refinement": "guidance"}, (3, 3)),
        ({"critic_layer_norm": True}, (1, 3)),
        ({"entropy_in_target": 0.1}, (3, 3)),
    ],
)
def test_pytorch_has_one_thread_where_the_library_does_the_work(three_threads, options, expected):
    mine, seen = learner(**options, engine="native"), []

    def update_from(source):
        seen.append((torch.get_num_threads(), native.num_threads(10**9)))
        return mine.update(mine.draw(source))

    mine.update_from = update_from
    mine.train(replay(), 1)
    assert seen == [expected]
    assert (torch.get_num_threads(), native.num_threads(10**9)) == (3, 3)


def test_acting_gives_pytorch_its_threads_back(three_threads):
    nets = networks()
    selector(nets).act(*inputs(nets, 1, 2))
    assert (torch.get_num_threads(), native.num_threads(10**9)) == (3, 3)
    with pytest.raises(AttributeError):
        selector(nets).act(None, inputs(nets, 1, 2)[1])
    assert (torch.get_num_threads(), native.num_threads(10**9)) == (3, 3)


def test_mish_over_the_whole_range_of_float32():
    """A network of one unit: Q(a) = mish(a)."""
    nets = networks(obs_dim=1, act_dim=1, hidden=(1,))
    for q in (nets.critic.q1, nets.critic.q2):
        for layer in q.linears():
            layer.weight.data.fill_(1.0)
            layer.bias.data.zero_()
        q.linears()[0].weight.data[0, 0] = 0.0
    values = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-3e38, -1e4, 0.0, 3e38])])
    q = native.PackedCritic(nets.critic).min_q(torch.zeros(len(values), 1), values.view(-1, 1, 1))
    x = values.double()
    expected = x * torch.tanh(torch.nn.functional.softplus(x))
    torch.testing.assert_close(q.flatten().double(), expected, atol=1e-30, rtol=5e-6)


@pytest.mark.parametrize("options", CRITICS)
def test_what_is_not_a_number_stays_none(options):
    nets = networks(**options)
    obs, noise = inputs(nets, 4, 3)
    obs[2, 0] = math.nan
    actions = sample_actions(nets.actor, nets.schedule, obs, noise, NATIVE)
    coarse = native.PackedActor(nets.actor, nets.schedule, narrow=True).sample(obs, noise)
    for found in (actions, coarse):
        assert torch.isnan(found[2]).all()
        assert torch.isfinite(found[[0, 1, 3]]).all()
    fine = actions.nan_to_num()
    assert torch.isnan(min_q(nets.critic, obs, fine, NATIVE)[2]).all()
    # A single broken twin is enough, and a single broken quantile of it.
    nets.critic.q2.linears()[-1].bias.data[-1] = math.nan
    for _ in range(2):
        for kernels in (NATIVE, sampler.EAGER):
            assert torch.isnan(min_q(nets.critic, obs, fine, kernels)).all()
        nets.critic.q1, nets.critic.q2 = nets.critic.q2, nets.critic.q1


# --- Acting ------------------------------------------------------------------------------------


def selector(nets):
    return ActionSelector(nets.actor, nets.critic, nets.schedule, NATIVE)


@pytest.mark.parametrize(("num_states", "num_samples"), SIZES)
def test_the_selected_action_is_the_eager_one(num_states, num_samples):
    nets = networks()
    obs, noise = inputs(nets, num_states, num_samples)
    action, q = selector(nets).act(obs, noise)
    expected, expected_q = ActionSelector(nets.actor, nets.critic, nets.schedule).act(obs, noise)
    torch.testing.assert_close(action, expected, atol=2e-5, rtol=0)
    if num_samples == 1:
        assert q is None
    else:
        torch.testing.assert_close(q, expected_q, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_weights_that_are_loaded_are_noticed(part):
    nets, other = networks(), networks(seed=1)
    obs, noise = inputs(nets, 6, 8)
    mine = selector(nets)
    before, _ = mine.act(obs, noise)
    getattr(nets, part).load_state_dict(getattr(other, part).state_dict())
    after, _ = mine.act(obs, noise)
    assert not torch.equal(before, after)
    assert torch.equal(after, selector(nets).act(obs, noise)[0])


def test_weights_an_optimiser_moved_are_taken_when_told():
    hp = QVPOHyperparameters(
        engine="eager", hidden=(32,), k_target=1, diffusion_steps=4, batch_size=64,
        actor_lr=0.1, critic_lr=0.1,
    )  # fmt: skip
    mine = QVPOLearner(QVPONetworks(OBS, ACT, hp), hp, seed=0, device="cpu")
    nets = mine.networks
    obs, noise = inputs(nets, 6, 8)
    acting = selector(nets)
    before, _ = acting.act(obs, noise)
    mine.update(transitions(64, seed=0))
    acting.weights_changed()
    after, _ = acting.act(obs, noise)
    assert not torch.equal(before, after)
    assert torch.equal(after, selector(nets).act(obs, noise)[0])


# --- Building ----------------------------------------------------------------------------------

ACT_ONCE = (
    "from qvpo_rllib.core.backends.native import load_library, cache_dir;"
    "print(load_library().qvpo_lanes(), len(list(cache_dir().iterdir())))"
)


def test_processes_that_build_at_once_all_get_the_library(tmp_path):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", ACT_ONCE],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        )
        for _ in range(2)
    ]
    lanes = {int(run.communicate()[0].split()[0]) for run in runs}
    assert lanes == {native_build.load_library().qvpo_lanes()}
    assert [f.suffix for f in (tmp_path / "qvpo_rllib").iterdir()] == [".so"]


@pytest.fixture(scope="module")
def small_source(tmp_path_factory):
    """Builds at once; what it does is of no interest here."""
    file = tmp_path_factory.mktemp("source") / "small.cpp"
    file.write_text('extern "C" long qvpo_lanes() { return 8; }')
    return file


@pytest.mark.parametrize("num_bytes", [0, 1000])
def test_a_library_that_was_cut_short_is_built_again(
    tmp_path, monkeypatch, small_source, num_bytes
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "SOURCE", small_source)
    library = native_build._built()
    whole = library.read_bytes()
    os.truncate(library, num_bytes)  # a full disk, or a copy that was broken off
    assert native_build._built().read_bytes() == whole
    assert list(library.parent.iterdir()) == [library]


def test_a_compiler_may_have_arguments(tmp_path, monkeypatch, small_source):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "SOURCE", small_source)
    plain = native_build._built()
    monkeypatch.setenv("CXX", "env LC_ALL=C g++ -fno-exceptions")
    assert native_build._built().is_file()
    assert native_build._built() != plain  # arguments decide what is built


@pytest.mark.parametrize(
    "reason", ["no compiler", "it fails", "nowhere to write", "no home", "no command"]
)
def test_what_keeps_it_from_being_built_is_an_oserror_with_the_reason(
    tmp_path, monkeypatch, reason
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if reason == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
        expected = "no-such-compiler"
    elif reason == "it fails":
        monkeypatch.setenv("CXX", "false")
        expected = "false.*failed"
    elif reason == "no command":
        monkeypatch.setenv("CXX", "'g++")
        expected = "'g\\+\\+.* is no command"
    elif reason == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        expected = "set XDG_CACHE_HOME"
    else:
        (tmp_path / "qvpo_rllib").write_text("a file is in the way")
        expected = "exists"
    with pytest.raises(OSError, match=expected):
        native_build._built()
