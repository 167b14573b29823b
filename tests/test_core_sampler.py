"""Networks, sampling and ranking against naive ones, and what must hold whatever the weights."""

import copy

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qvpo_rllib.core import kernels, sampler
from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.networks import NoisePredictor, SplitMLP, TwinQ

OBS, ACT = 3, 2
CHAINS = [(kind, steps) for kind in ("cosine", "linear", "vp") for steps in (1, 2, 20, 100)]
quick = settings(deadline=None, max_examples=25, derandomize=True)
F64 = torch.float64


def build(steps, *, kind="cosine", hidden=(12, 12, 8), seed=0, scale=1.0):
    """Actor, critic (float64, every parameter random, biases too) and schedule."""
    actor, critic = NoisePredictor(OBS, ACT, hidden, steps), TwinQ(OBS, ACT, hidden)
    generator = torch.Generator().manual_seed(seed)
    for parameter in [*actor.parameters(), *critic.parameters()]:
        fan_in = parameter.shape[1] if parameter.dim() == 2 else 10
        torch.nn.init.normal_(parameter, std=scale / fan_in**0.5, generator=generator)
    return actor.double(), critic.double(), NoiseSchedule(kind, steps)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def sampled(steps, num_states, num_samples, *, seed=0, **options):
    """Everything `sample_actions` takes, and what it gives."""
    actor, critic, schedule = build(steps, seed=seed, **options)
    obs = draw(num_states, OBS, seed=seed + 1)
    noise = draw(steps, num_states, num_samples, ACT, seed=seed + 2)
    return (actor, critic, schedule, obs, noise), sampler.sample_actions(
        actor, schedule, obs, noise
    )


# --- Networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [(10,), (8, 8), (12, 5, 9)])
def test_noise_predictor_is_an_mlp_of_the_concatenation(hidden):
    actor, _, _ = build(20, hidden=hidden)
    noisy, obs, t = draw(15, ACT), draw(15, OBS, seed=1), torch.arange(15)
    with torch.no_grad():
        result = actor(noisy, t, actor.obs_part(obs))
    weights = reference.weights_of(actor)
    rows = zip(noisy.numpy(), t.tolist(), obs.numpy(), strict=True)
    expected = [reference.predicted_noise(weights, *row) for row in rows]
    np.testing.assert_allclose(result, expected, atol=1e-10)


@pytest.mark.parametrize("hidden", [(10,), (8, 8), (12, 5, 9)])
def test_twin_critics_are_two_mlps_of_the_concatenation(hidden):
    _, critic, _ = build(1, hidden=hidden)
    obs, actions = draw(6, 1, OBS), draw(6, 4, ACT, seed=1)
    with torch.no_grad():
        result = critic(obs, actions)
    assert result.shape == (2, 6, 4)
    weights = reference.weights_of(critic)
    for b in range(6):
        for n in range(4):
            expected = reference.twin_q(weights, obs[b, 0].numpy(), actions[b, n].numpy())
            np.testing.assert_allclose(result[:, b, n], expected, atol=1e-10)


def test_initial_weights_have_half_the_inverse_root_of_the_fan_in_and_biases_zero():
    torch.manual_seed(0)
    mlp = SplitMLP((300, 100), (400, 400), 2)
    for layer in mlp.layers:
        assert (layer.bias == 0).all()
        expected = 0.5 / layer.in_features**0.5
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert abs(layer.weight.mean().item()) < expected / 5
    assert mlp.layers[0].weight.abs().max() > 3.5 * 0.5 / 20  # not truncated


# --- Sampling --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "steps"), CHAINS)
def test_the_whole_chain_in_float64(kind, steps):
    (actor, _, _, obs, noise), actions = sampled(steps, 4 if steps > 2 else 60, 8, kind=kind)
    beta = reference.betas(kind, steps)
    expected = reference.sample_actions(
        reference.weights_of(actor), beta, obs.numpy(), noise.numpy()
    )
    assert actions.shape == (len(obs), 8, ACT)
    np.testing.assert_allclose(actions, expected, atol=1e-8)
    # Else the comparison would be one of clipped values alone.
    assert (np.abs(expected) < 1).sum() >= 3


@pytest.mark.parametrize("kind", ["cosine", "linear", "vp"])
def test_the_whole_chain_in_float32(kind):
    """The first step's factor 406 amplifies rounding where it does not clip: a few may differ."""
    (actor, _, schedule, obs, noise), exact = sampled(20, 50, 8, kind=kind)
    single = sampler.sample_actions(actor.float(), schedule, obs.float(), noise.float())
    assert single.dtype == torch.float32
    close = (single - exact).abs() < 1e-4
    assert close.double().mean() > 0.99


def test_min_q_and_its_twins():
    _, critic, _ = build(1)
    obs, actions = draw(5, OBS), draw(5, 7, ACT, seed=1)
    weights = reference.weights_of(critic)
    result = sampler.min_q(critic, obs, actions)
    expected = reference.min_q(weights, obs.numpy(), actions.numpy())
    np.testing.assert_allclose(result, expected, atol=1e-10)
    with torch.no_grad():
        first, second = critic(obs[:, None], actions)
    assert 0 < (first < second).sum() < first.numel()  # each twin is the lower somewhere
    assert not result.requires_grad


@pytest.mark.parametrize("num_samples", [2, 8])
def test_acting_takes_the_best_by_the_lower_twin(num_samples):
    (actor, critic, schedule, obs, noise), actions = sampled(5, 10, num_samples)
    action, q = sampler.ActionSelector(actor, critic, schedule).act(obs, noise)
    all_q = reference.min_q(reference.weights_of(critic), obs.numpy(), actions.numpy())
    expected_q, expected = reference.best_of(all_q, actions.numpy())
    np.testing.assert_allclose(action, expected[:, 0], atol=1e-10)
    np.testing.assert_allclose(q, expected_q[:, 0], atol=1e-10)
    assert (expected[:, 0] != actions[:, 0].numpy()).any()  # the first is not always the best


@pytest.mark.parametrize("steps", [1, 20])
def test_the_best_of_one_is_plain_sampling(steps):
    (actor, critic, schedule, obs, noise), actions = sampled(steps, 6, 1)
    action, q = sampler.ActionSelector(actor, critic, schedule).act(obs, noise)
    assert torch.equal(action, actions[:, 0])
    assert q is None


@pytest.mark.parametrize("rows", [1, 7, 16, 10**9])
def test_the_size_of_a_chunk_changes_nothing(monkeypatch, rows):
    (actor, critic, schedule, obs, noise), actions = sampled(20, 9, 4)
    q = sampler.min_q(critic, obs, actions)
    monkeypatch.setattr(sampler, "CPU_CHUNK_ROWS", rows)
    chunked = sampler.sample_actions(actor, schedule, obs, noise)
    np.testing.assert_allclose(chunked, actions, atol=1e-9)
    np.testing.assert_allclose(sampler.min_q(critic, obs, actions), q, atol=1e-12)


def test_arguments_are_left_as_they_were():
    actor, critic, schedule = build(5)
    obs, noise = draw(4, OBS), draw(5, 4, 3, ACT, seed=1)
    before = copy.deepcopy((obs, noise, actor.state_dict(), critic.state_dict()))
    action, _ = sampler.ActionSelector(actor, critic, schedule).act(obs, noise)
    assert torch.equal(obs, before[0])
    assert torch.equal(noise, before[1])
    for module, state in ((actor, before[2]), (critic, before[3])):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert not action.requires_grad


def test_noise_of_another_number_of_steps_is_refused():
    actor, _, schedule = build(5)
    with pytest.raises(ValueError, match="noise has 4 steps, the schedule 5"):
        sampler.sample_actions(actor, schedule, draw(2, OBS), draw(4, 2, 3, ACT))


def test_drawn_noise_is_standard_normal_and_comes_from_the_generator():
    def noise(seed):
        generator = torch.Generator().manual_seed(seed)
        return sampler.draw_noise(20, 50, 10, ACT, generator, torch.device("cpu"))

    drawn = noise(1)
    assert drawn.shape == (20, 50, 10, ACT)
    assert abs(drawn.mean().item()) < 0.05
    assert drawn.std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(drawn, noise(1))
    assert not torch.equal(drawn, noise(2))


@quick
@given(st.permutations(range(7)), st.integers(0, 1000))
def test_permuting_the_states_permutes_the_actions(order, seed):
    (actor, _, schedule, obs, noise), actions = sampled(20, 7, 3, seed=seed)
    permuted = sampler.sample_actions(actor, schedule, obs[order], noise[:, order])
    np.testing.assert_allclose(permuted, actions[order], atol=1e-9)


@quick
@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    spread=st.sampled_from([0.0, 1.0, 1e4]),
    chain=st.sampled_from([chain for chain in CHAINS if chain[1] < 100]),
)
def test_actions_are_in_the_box_whatever_the_weights(seed, scale, spread, chain):
    kind, steps = chain
    actor, _, schedule = build(steps, kind=kind, seed=seed, scale=scale)
    obs, noise = spread * draw(4, OBS, seed=seed), spread * draw(steps, 4, 3, ACT, seed=seed)
    for module, cast in (
        (actor, torch.Tensor.double),
        (copy.deepcopy(actor).float(), torch.Tensor.float),
    ):
        actions = sampler.sample_actions(module, schedule, cast(obs), cast(noise))
        assert ((actions >= -1) & (actions <= 1)).all()


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    st.lists(
        st.one_of(st.floats(-1e4, 1e4, allow_subnormal=False), st.floats(-50, 50)),
        min_size=1,
        max_size=30,
    )
)
def test_mish_and_mish_in_place(values):
    """Absolute accuracy: near -15 the exact value is far below float32's rounding of x itself."""
    for dtype, atol, rtol in ((torch.float32, 2e-6, 1e-6), (F64, 1e-14, 1e-14)):
        x = torch.tensor(values, dtype=dtype)[:, None]
        expected = F.mish(x.double())
        for result in (kernels.mish_(x.clone()), kernels.mish(x)):
            assert torch.isfinite(result).all()
            torch.testing.assert_close(result.double(), expected, atol=atol, rtol=rtol)
