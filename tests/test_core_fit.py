"""The native forward and backward pass of a fit: the eager gradients, up to rounding."""

import math

import pytest
import torch
from test_core_native import networks

from qvpo_rllib.core import losses
from qvpo_rllib.core.backends import fit, native
from qvpo_rllib.core.backends.native import PackedCritic

STATES, CHOSEN, UNIFORM = 37, 2, 3


def critic_inputs(nets, generator):
    obs_dim, act_dim = nets.critic.q1.part_dims
    quantiles = () if nets.critic.kept == 1 else (nets.critic.kept,)
    shapes = ((STATES, obs_dim), (STATES, act_dim), (*quantiles, STATES))
    return nets.critic, [torch.randn(shape, generator=generator) for shape in shapes]


def actor_inputs(nets, generator):
    rows, act_dim = STATES * (CHOSEN + UNIFORM), nets.act_dim
    shapes = (
        *((STATES, nets.critic.q1.part_dims[0]), (STATES, CHOSEN, act_dim), (STATES, CHOSEN)),
        *((STATES, UNIFORM, act_dim), (STATES,)),
    )
    steps = torch.randint(nets.schedule.diffusion_steps, (rows,), generator=generator)
    noise = torch.randn(rows, act_dim, generator=generator)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return nets.actor, [nets.schedule, *tensors, steps, noise, "sum", False, CHOSEN]


def denoising_inputs(nets, generator):
    actor, (schedule, obs, chosen, _, _, _, steps, noise, *_) = actor_inputs(nets, generator)
    return actor, [schedule, obs, chosen[:, 0], steps[:STATES], noise[:STATES]]


INPUTS = {
    "critic_objective": critic_inputs,
    "actor_objective": actor_inputs,
    "denoising_objective": denoising_inputs,
}

SHAPES = [
    {},
    {"obs_dim": 1, "act_dim": 1, "hidden": (5,), "diffusion_steps": 1},
    {"obs_dim": 17, "act_dim": 6, "hidden": (256, 256), "diffusion_steps": 5},
    {"obs_dim": 348, "act_dim": 17, "hidden": (64, 72, 64), "diffusion_steps": 20},
    {"critic": "quantile", "num_quantiles": 7},
    {"critic": "quantile", "num_quantiles": 7, "critic_layer_norm": True},
]


def results(objective, module, inputs):
    """Every output, then the gradient of the first one with respect to every parameter."""
    found = objective(module, *inputs)
    outputs = found if isinstance(found, tuple) else (found,)
    return [o.detach() for o in outputs], torch.autograd.grad(outputs[0], [*module.parameters()])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.get("hidden", "")))
@pytest.mark.parametrize("name", INPUTS)
def test_values_and_gradients_equal_the_eager_ones(name, shape):
    nets = networks(**shape)
    module, inputs = INPUTS[name](nets, torch.Generator().manual_seed(0))
    outputs, gradients = results(getattr(fit, name), module, inputs)
    expected, expected_gradients = results(getattr(losses, name), module, inputs)
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
    for (parameter, _), mine, other in zip(
        module.named_parameters(), gradients, expected_gradients, strict=True
    ):
        scale = float(other.abs().max())
        assert scale > 0
        torch.testing.assert_close(mine, other, atol=1e-5 * scale, rtol=0, msg=parameter)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.get("hidden", "")))
@pytest.mark.parametrize("norm", [False, True])
def test_the_gradient_of_q_for_an_action_is_the_eager_one(shape, norm):
    nets = networks(**{**shape, "critic_layer_norm": norm})
    critic, (obs, action, _) = critic_inputs(nets, torch.Generator().manual_seed(0))
    expected = critic.q_gradient(obs)(action)
    scale = float(expected.abs().max())
    assert scale > 0
    gradient = PackedCritic(critic, both_ways=True).q_gradient(obs)(action)
    torch.testing.assert_close(gradient, expected, atol=1e-5 * scale, rtol=0)
    with torch.no_grad():
        estimates = fit.critic_estimates(critic, obs)(action)
        torch.testing.assert_close(estimates, critic(obs, action), atol=1e-5, rtol=1e-5)


def test_the_gradient_of_q_is_the_same_bits_on_any_number_of_threads(monkeypatch):
    nets = networks(hidden=(256, 256), critic="quantile", critic_layer_norm=True)
    obs, action = torch.randn(300, 11), torch.rand(300, 3)
    found = []
    for count in (1, 2, 3):
        monkeypatch.setattr(native, "num_threads", lambda products, count=count: count)
        found.append(PackedCritic(nets.critic, both_ways=True).q_gradient(obs)(action))
    assert all(torch.equal(gradient, found[0]) for gradient in found[1:])


def test_one_nan_makes_the_gradient_of_q_nan_and_no_other_rows():
    nets = networks(critic="quantile")
    obs, action = torch.randn(5, 11), torch.rand(5, 3)
    obs[2, 0] = math.nan
    gradient = PackedCritic(nets.critic, both_ways=True).q_gradient(obs)(action)
    assert gradient.isnan().all(dim=1).tolist() == [False, False, True, False, False]
    assert gradient[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize(("num", "kept", "states"), [(25, 46, 9), (5, 8, 3), (1, 1, 2), (3, 21, 5)])
def test_the_quantile_loss_is_the_eager_one(num, kept, states):
    generator = torch.Generator().manual_seed(num)
    quantiles = 2 * torch.randn(2, states, num, generator=generator)
    target = 2 * torch.randn(kept, states, generator=generator)
    for value in (0.0, 1e6, math.inf, math.nan):
        target[-1, -1] = value
        found = []
        for loss in (fit.quantile_loss, losses.quantile_loss):
            z = quantiles.clone().requires_grad_()
            found.append((loss(z, target), *torch.autograd.grad(loss(z, target), z)))
        torch.testing.assert_close(*found, atol=1e-7, rtol=1e-5, equal_nan=True)


def test_a_fit_is_the_same_bits_on_any_number_of_threads(monkeypatch):
    nets = networks(hidden=(256, 256))
    module, inputs = actor_inputs(nets, torch.Generator().manual_seed(0))
    found = []
    for count in (1, 2, 3):
        monkeypatch.setattr(fit, "num_threads", lambda products, count=count: count)
        found.append(results(fit.actor_objective, module, inputs))
    for outputs, gradients in found[1:]:
        assert all(map(torch.equal, outputs, found[0][0]))
        assert all(map(torch.equal, gradients, found[0][1]))


def test_the_slope_of_mish_over_the_whole_range_of_float32():
    """A network of one unit: the gradient of `start` is the slope there."""
    values = torch.cat([torch.linspace(-100, 100, 2001), torch.tensor([-3e38, -1e4, 0.0, 3e38])])
    start = values[:, None].clone().requires_grad_()
    zero, one, bias = torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1)
    out = fit._FittedMLP.apply(torch.zeros(len(values), 1), start, 0, zero, bias, one, bias)
    (slope,) = torch.autograd.grad(out.sum(), start)
    exact = values.double().requires_grad_()
    (expected,) = torch.autograd.grad(torch.nn.functional.mish(exact).sum(), exact)
    torch.testing.assert_close(slope[:, 0].double(), expected, atol=2e-6, rtol=2e-6)
