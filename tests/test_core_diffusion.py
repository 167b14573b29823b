"""Noise schedules, forward process and reverse steps against the plain formulas."""

import numpy as np
import pytest
import reference
import torch

from qvpo_rllib.core import diffusion
from qvpo_rllib.core.diffusion import BETAS, NoiseSchedule
from qvpo_rllib.core.networks import sinusoidal_embedding

KINDS = ("cosine", "linear", "vp")
STEPS = (1, 2, 20, 100)

every_chain = pytest.mark.parametrize(
    ("kind", "steps"), [(kind, steps) for kind in KINDS for steps in STEPS]
)


def test_every_schedule_is_covered():
    assert set(BETAS) == set(KINDS)


@every_chain
def test_betas(kind, steps):
    betas = BETAS[kind](steps)
    assert betas.dtype == torch.float64
    np.testing.assert_allclose(betas, reference.betas(kind, steps), rtol=1e-10, atol=1e-15)
    assert betas.min() > 0
    assert betas.max() < 1


@every_chain
def test_constants_are_rounded_once(kind, steps):
    schedule = NoiseSchedule(kind, steps)
    expected = reference.constants(kind, steps)
    named = {name for name, _ in schedule.named_buffers()}
    assert named == {*expected, "reverse_steps"}  # the latter: test_reverse_step
    for name, value in expected.items():
        buffer = getattr(schedule, name)
        assert buffer.dtype == torch.float32
        np.testing.assert_allclose(buffer, value, rtol=1.2e-7, atol=1e-30, err_msg=name)


@pytest.mark.parametrize("steps", [2, 20, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_vlo_coefficient_of_the_last_reverse_step_is_finite_and_positive(kind, steps):
    coefficient = NoiseSchedule(kind, steps).vlo_coefficient
    assert torch.isfinite(coefficient).all()
    assert (coefficient > 0).all()


def test_first_reverse_step_of_the_default_chain_multiplies_by_406():
    schedule = NoiseSchedule("cosine", 20)
    assert 1 / schedule.alphas_cumprod[-1].sqrt().item() == pytest.approx(406, abs=0.5)
    assert schedule.reverse_steps[-1][0] == pytest.approx(406, abs=0.5)


@every_chain
def test_q_sample(kind, steps):
    rng = np.random.default_rng(steps)
    x0, noise = rng.uniform(-1, 1, (50, 3)), rng.normal(size=(50, 3))
    t = rng.integers(steps, size=50)
    expected = reference.q_sample(reference.betas(kind, steps), x0, t, noise)
    schedule = NoiseSchedule(kind, steps)
    tensors = [torch.tensor(v) for v in (x0, noise)]
    result = schedule.q_sample(tensors[0], torch.tensor(t), tensors[1])
    # The constants of the forward process are float32: that rounding is all that may differ.
    np.testing.assert_allclose(result, expected, rtol=0, atol=3e-7)
    single = schedule.q_sample(tensors[0].float(), torch.tensor(t), tensors[1].float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_q_sample_ends_in_the_documented_signal_to_noise_ratio(kind):
    """Mean and variance of Eq. 2, estimated from draws."""
    schedule = NoiseSchedule(kind, 20)
    draws, t = 40_000, 12
    noise = torch.randn(draws, 1, generator=torch.Generator().manual_seed(0))
    x_t = schedule.q_sample(torch.full((draws, 1), 0.7), torch.full((draws,), t), noise)
    bar = reference.alphas_cumprod(reference.betas(kind, 20))[t]
    assert x_t.mean().item() == pytest.approx(0.7 * bar**0.5, abs=0.03)
    assert x_t.var().item() == pytest.approx(1 - bar, rel=0.05)


@every_chain
def test_reverse_step(kind, steps):
    """predict_x0, q_posterior and p_sample at every t, in float64."""
    rng = np.random.default_rng(steps)
    beta, schedule = reference.betas(kind, steps), NoiseSchedule(kind, steps)
    x_t, eps, noise = rng.normal(size=(3, 4, 5, 2))
    tensors = [torch.tensor(v) for v in (x_t, eps, noise)]
    for t in range(steps):
        x0 = reference.predict_x0(beta, x_t, t, eps)
        result = diffusion.predict_x0(*tensors[:2], schedule.reverse_steps[t])
        np.testing.assert_allclose(result, x0, atol=1e-10)

        mean, sigma = reference.q_posterior(beta, x0, x_t, t)
        result_mean, result_sigma = diffusion.q_posterior(
            torch.tensor(x0), tensors[0], schedule.reverse_steps[t]
        )
        np.testing.assert_allclose(result_mean, mean, atol=1e-10)
        assert result_sigma == pytest.approx(sigma, abs=1e-10)

        step = schedule.p_sample(*tensors[:1], t, tensors[1], tensors[2])
        np.testing.assert_allclose(step, mean + sigma * noise, atol=1e-10)
        quiet = schedule.p_sample(*tensors[:1], t, tensors[1], None)
        np.testing.assert_allclose(quiet, mean, atol=1e-10)


def test_predicted_x0_is_clipped_on_both_sides_and_untouched_between():
    schedule = NoiseSchedule("linear", 20)
    x_t = torch.tensor([-50.0, 50.0, 0.1], dtype=torch.float64)
    x0 = diffusion.predict_x0(x_t, torch.zeros(3, dtype=torch.float64), schedule.reverse_steps[3])
    assert x0[:2].tolist() == [-1.0, 1.0]
    assert 0.1 < x0[2] < 0.11


@every_chain
def test_the_true_noise_takes_a_noisy_action_back(kind, steps):
    """q_sample, then predict_x0 with the very noise that was added, is the identity."""
    schedule = NoiseSchedule(kind, steps).double()
    x0 = torch.tensor([[0.3, -0.8], [0.99, 0.0]], dtype=torch.float64)
    noise = torch.randn(2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t in range(steps):
        x_t = schedule.q_sample(x0, torch.full((2,), t), noise)
        back = diffusion.predict_x0(x_t, noise, schedule.reverse_steps[t])
        # Float32 constants of the forward process, amplified by 1 / sqrt(ᾱ_t).
        amplified = 1e-7 * schedule.reverse_steps[t][0]
        np.testing.assert_allclose(back, x0, atol=4 * amplified)


@pytest.mark.parametrize("steps", STEPS)
def test_time_embedding(steps):
    table = sinusoidal_embedding(torch.arange(steps), 32)
    expected = np.array([reference.sinusoid(t) for t in range(steps)])
    assert table.shape == (steps, 32)
    np.testing.assert_allclose(table, expected, atol=2e-5)
