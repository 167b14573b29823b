"""Targets, weights and losses: each against its loop, then what must hold for any input."""

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvpo_rllib.core import losses

KINDS = ("qadv", "qcut", "qrelu", "qexp", "softmax")
quick = settings(deadline=None, max_examples=60, derandomize=True)
qs = npst.arrays(
    np.float64,
    st.tuples(st.integers(1, 5), st.integers(1, 9)),
    elements=st.floats(-500, 500, allow_subnormal=False),
)


def q_weights(kind, chosen_q, value, q_cut=1.0, q_mean=0.0, q_std=1.0, temperature=1.0):
    """The package's function on numpy arrays."""
    scalars = {
        "q_mean": torch.as_tensor(np.float64(q_mean)),
        "q_std": torch.as_tensor(np.float64(q_std)),
        "temperature": torch.as_tensor(np.float64(temperature)),
    }
    return losses.q_weights(
        kind, torch.as_tensor(chosen_q), torch.as_tensor(value), q_cut=q_cut, **scalars
    ).numpy()


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def test_td_target(rng):
    reward, next_q = rng.normal(size=(2, 40)) * 30
    terminal = (rng.random(40) < 0.4).astype(float)
    expected = reference.td_target(reward, terminal, next_q, 0.97)
    result = losses.td_target(*(torch.tensor(v) for v in (reward, terminal, next_q)), 0.97)
    np.testing.assert_allclose(result, expected, atol=1e-10)


def test_critic_loss(rng):
    q, target = rng.normal(size=(2, 40)), rng.normal(size=40)
    result = losses.critic_loss(torch.tensor(q), torch.tensor(target))
    assert result.item() == pytest.approx(reference.critic_loss(*q, target), abs=1e-10)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_best_of(rng, k):
    q, actions = rng.normal(size=(6, 7)), rng.normal(size=(6, 7, 3))
    expected_q, expected = reference.best_of(q, actions, k)
    top_q, top = losses.best_of(torch.tensor(q), torch.tensor(actions), k)
    np.testing.assert_array_equal(top_q, expected_q)
    np.testing.assert_array_equal(top, expected)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_q_weights(rng, kind, k):
    chosen_q, value = rng.normal(size=(30, k)) * 20, rng.normal(size=30) * 20
    options = {"q_cut": 0.3, "q_mean": 1.7, "q_std": 0.9, "temperature": 8.0}
    result = q_weights(kind, chosen_q, value, **options)
    expected = reference.q_weights(kind, chosen_q, value, **options)
    if (kind, k) != ("softmax", 1):  # one sample has all the share
        assert len(np.unique(expected)) > 10  # both branches and neither everywhere
    np.testing.assert_allclose(result, expected, rtol=1e-10)


def test_q_weights_at_the_edges():
    """The values the paper gives to Q = 0 and A = 0, and the ends of qexp's range."""
    zero, value = np.array([[0.0, -0.0]]), np.array([0.0])
    assert q_weights("qadv", zero, value).tolist() == [[0, 0]]
    assert q_weights("qcut", zero, value, q_cut=0.5).tolist() == [[0, 0]]
    far = q_weights("qexp", np.array([[1e9, -1e9]]), value)
    np.testing.assert_allclose(far, [[np.exp(8), np.exp(-8)]])


def test_unknown_q_weights_are_refused():
    with pytest.raises(ValueError, match=r"'qmax'.*qadv, qcut, qrelu, qexp or softmax"):
        q_weights("qmax", np.zeros((1, 1)), np.zeros(1))


@pytest.mark.parametrize("k", [1, 3])
def test_entropy_weights(rng, k):
    weights = rng.random((12, k))
    expected = reference.entropy_weights(weights, 0.02, k)
    result = losses.entropy_weights(torch.tensor(weights), 0.02, k)
    np.testing.assert_allclose(result, expected, atol=1e-12)


def test_denoising_error_is_the_mean_over_action_dimensions(rng):
    predicted, noise = rng.normal(size=(2, 9, 4))
    expected = [sum((p - e) ** 2) / 4 for p, e in zip(predicted, noise, strict=True)]
    result = losses.denoising_error(torch.tensor(predicted), torch.tensor(noise))
    np.testing.assert_allclose(result, expected, atol=1e-12)


@pytest.mark.parametrize("num_uniform", [0, 10])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_policy_loss(rng, reduction, k, num_uniform):
    best, uniform = rng.random((2, 8 * k)), rng.random((2, 8 * num_uniform))
    expected = reference.policy_loss(best.T.tolist(), uniform.T.tolist(), reduction, 8 * k)
    tensors = [torch.tensor(v) for v in (*best, *uniform)]
    result = losses.policy_loss(*tensors, reduction, 8 * k)
    np.testing.assert_allclose([r.item() for r in result], expected, atol=1e-12)


def test_shared_mean_counts_the_entropy_term_once_per_uniform_action(rng):
    """`sum` is `mean` with the entropy term N_e/k-fold, up to one factor for both."""
    states, k, num_uniform = 8, 2, 10
    best, uniform = rng.random((2, states * k)), rng.random((2, states * num_uniform))
    tensors = [torch.tensor(v) for v in (*best, *uniform)]
    shared, separate = (losses.policy_loss(*tensors, r, states * k) for r in ("sum", "mean"))
    ratio = (shared[1] / shared[0]) / (separate[1] / separate[0])
    assert ratio.item() == pytest.approx(num_uniform / k)


@quick
@given(qs, st.floats(-1e3, 1e3))
def test_qadv_ignores_a_constant_added_to_a_state(q, constant):
    def weights(values):
        tensor = torch.tensor(values)
        chosen, _ = losses.best_of(tensor, tensor[..., None], min(2, q.shape[1]))
        return q_weights("qadv", chosen, tensor.mean(dim=1))

    shift = constant * np.linspace(-1, 1, q.shape[0])[:, None]  # another one for each state
    np.testing.assert_allclose(weights(q), weights(q + shift), atol=1e-9)


@quick
@given(qs, st.sampled_from(KINDS), st.floats(1e-3, 10), st.floats(-50, 50), st.floats(0.1, 50))
def test_weights_are_never_negative_and_finite(q, kind, q_cut, q_mean, q_std):
    weights = q_weights(kind, q, q.mean(axis=1), q_cut, q_mean, q_std)
    assert (weights >= 0).all()
    assert np.isfinite(weights).all()


@quick
@given(qs, st.sampled_from(KINDS))
def test_a_better_action_never_weighs_less_except_at_the_cut(q, kind):
    weights = q_weights(kind, np.sort(q, axis=1), q.mean(axis=1), q_cut=1e-9)
    if kind == "qcut":  # ε may exceed a tiny Q ≥ 0
        weights = np.maximum(weights, 1e-9)
    assert (np.diff(weights, axis=1) >= 0).all()


@quick
@given(st.data(), st.integers(1, 9), st.integers(1, 4))
def test_the_best_action_does_not_depend_on_the_order_of_the_samples(data, num_samples, k):
    k = min(k, num_samples)
    q = data.draw(st.lists(st.floats(-1e6, 1e6), min_size=num_samples, max_size=num_samples,
                           unique=True))  # fmt: skip
    order = data.draw(st.permutations(range(num_samples)))
    q = torch.tensor([q], dtype=torch.float64)
    actions = torch.arange(2.0 * num_samples).view(1, num_samples, 2)
    plain = losses.best_of(q, actions, k)
    permuted = losses.best_of(q[:, order], actions[:, order], k)
    assert torch.equal(plain[0], permuted[0])
    assert torch.equal(plain[1], permuted[1])
    assert plain[0][0, 0] == q.max()


@quick
@given(qs)
def test_the_best_of_one_is_that_one(q):
    q = torch.tensor(q[:, :1])
    actions = q[..., None].repeat(1, 1, 3)
    top_q, top = losses.best_of(q, actions)
    assert torch.equal(top_q, q)
    assert torch.equal(top, actions)
