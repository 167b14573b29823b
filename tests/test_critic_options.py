"""Truncated quantile critics and layer normalisation: what they do, and where they must act."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import reference
import torch
from test_core_learner import ACT, OBS, batch, hyperparameters, learner, networks

from qvpo_rllib.core import losses, sampler
from qvpo_rllib.core.backends import fused
from qvpo_rllib.core.networks import QuantileTwinQ, SplitMLP, TwinQ
from qvpo_rllib.core.qvpo import QVPONetworks
from qvpo_rllib.core.replay import Transitions

QUANTILE = {"critic": "quantile", "num_quantiles": 6, "dropped_quantiles": 2}


def quantile_critic(dropped=2, seed=0):
    torch.manual_seed(seed)
    return QuantileTwinQ(OBS, ACT, (16,), 6, dropped)


# --- The formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5])
def test_the_quantile_loss_is_the_references(count):
    rng = np.random.default_rng(count)
    quantiles, target = 2 * rng.normal(size=(2, 7, count)), 2 * rng.normal(size=(8, 7))
    result = losses.quantile_loss(torch.tensor(quantiles), torch.tensor(target))
    expected = sum(reference.quantile_loss(z, target.T) for z in quantiles)
    assert result.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [0.1, 30.0])  # the two branches of Huber's loss
def test_quantile_regression_finds_the_quantiles_of_a_bandits_return(scale):
    """One state, one action, a return of an exponential distribution, which is lopsided.

    Huber's loss blends quantiles with expectiles where errors are below 1, hence the wide one; of
    the narrow one the quantiles' order alone is certain.
    """
    hp = hyperparameters(
        **QUANTILE | {"num_quantiles": 5}, critic_lr=0.02 * scale, tau=1.0, grad_clip=None
    )
    subject = learner(hp, nets=QVPONetworks(OBS, ACT, hp))
    generator = torch.Generator().manual_seed(0)
    rows = 512
    here, ending = torch.zeros(rows, OBS), torch.ones(rows)
    for step in range(1200):
        if step == 800:
            subject.configure(dataclasses.replace(hp, critic_lr=0.002 * scale))
        reward = scale * torch.empty(rows).exponential_(1.0, generator=generator)
        drawn = Transitions(here, torch.zeros(rows, ACT), reward, here, ending)
        subject.fit_critics(drawn, torch.zeros(6, rows))
    with torch.no_grad():
        found = subject.networks.critic(torch.zeros(1, OBS), torch.zeros(1, ACT))[:, 0] / scale
    assert (found.diff(dim=1) > 0).all()
    if scale > 1:
        levels = (np.arange(5) + 0.5) / 5
        np.testing.assert_allclose(found, [-np.log(1 - levels)] * 2, atol=0.15)


def test_dropping_the_highest_quantiles_lowers_q():
    obs, action = torch.randn(20, OBS), torch.randn(20, ACT).tanh()
    whole = quantile_critic(dropped=0)
    values = []
    for dropped in range(6):
        critic = quantile_critic(dropped)
        critic.load_state_dict(whole.state_dict())
        estimates = critic(obs, action)
        values.append(critic.value(estimates))
        target, _ = critic.target(obs, action[:, None], pytest.fail, TwinQ.of_action)
        torch.testing.assert_close(target.mean(dim=0), values[-1])  # Q is the target's mean
    torch.testing.assert_close(values[0], estimates.mean(dim=(0, 2)))
    for fewer_dropped, more_dropped in itertools.pairwise(values):
        assert (more_dropped < fewer_dropped).all()
    torch.testing.assert_close(values[5], torch.cat([*estimates], 1).sort().values[:, :2].mean(1))


def test_the_target_is_the_distribution_of_the_best_action_not_of_another():
    critic = quantile_critic()
    obs, actions = torch.randn(9, OBS), torch.randn(9, 4, ACT).tanh()
    q = sampler.min_q(critic, obs, actions)
    assert q.argmax(dim=1).unique().numel() > 1
    target, best = critic.target(obs, actions, lambda: q, TwinQ.of_action)
    assert target.shape == (8, 9)
    assert torch.equal(best, actions[torch.arange(9), q.argmax(dim=1)])
    torch.testing.assert_close(target.mean(dim=0), q.amax(dim=1))


def test_a_layers_sums_are_normalised_whatever_their_scale():
    torch.manual_seed(0)
    plain, normal = (SplitMLP((OBS, ACT), (16, 16), 1, layer_norm=on) for on in (False, True))
    obs, action = torch.randn(9, OBS), torch.randn(9, ACT)
    for mlp, invariant in ((plain, False), (normal, True)):
        before = mlp(obs, action)
        with torch.no_grad():
            for layer in mlp.linears()[:-1]:
                layer.weight.mul_(50)
                layer.bias.mul_(50)
        # Up to the 1e-5 beside the variance.
        assert torch.allclose(before, mlp(obs, action), rtol=1e-3, atol=1e-4) is invariant


@pytest.mark.parametrize("options", [QUANTILE, {"critic_layer_norm": True}], ids=str)
def test_a_policy_ranks_by_these_critics(options):
    nets = networks(hyperparameters(**options))
    obs, noise = batch(0).obs, torch.randn(4, 4, 6, ACT, dtype=torch.float64)
    action, q = sampler.ActionSelector(nets.actor, nets.critic, nets.schedule).act(obs, noise)
    weights = reference.weights_of(nets.critic)
    candidates = sampler.sample_actions(nets.actor, nets.schedule, obs, noise)
    if options is QUANTILE:
        expected = reference.truncated_q(weights, obs.numpy(), candidates.numpy(), 2)
    else:
        expected = reference.min_q(weights, obs.numpy(), candidates.numpy())
    np.testing.assert_allclose(q, expected.max(axis=1), atol=1e-10)
    best = candidates[torch.arange(4), torch.tensor(expected.argmax(axis=1))]
    assert torch.equal(action, best)


# --- Where they act ------------------------------------------------------------------------------


def test_the_rivals_have_twins_and_know_none_of_these_options():
    from qvpo_rllib.algorithms import ALGORITHMS

    for name, entry in ALGORITHMS.items():
        if name != "qvpo":
            with pytest.raises(ValueError, match="no option 'critic'"):
                entry.hyperparameters.resolve(given={"critic": "quantile"})
    hp = ALGORITHMS["dipo"].hyperparameters(hidden=(4,), diffusion_steps=2)
    assert type(QVPONetworks(OBS, ACT, hp).critic) is TwinQ


class ReachedError(Exception):
    pass


@pytest.mark.parametrize(
    ("options", "considered"),
    [({}, True), (QUANTILE, False), ({"critic_layer_norm": True}, False)],
    ids=str,
)
def test_the_fused_ranking_is_for_plain_twins(monkeypatch, options, considered):
    """The kernels' `min_q` reads one output and no norms: it would be wrong without an error."""

    def capability(device):
        raise ReachedError

    monkeypatch.setattr(fused, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    hp = hyperparameters(**options, ranking_precision="tf32", hidden=(16, 16))
    nets = networks(hp)
    arguments = nets.actor, nets.critic, nets.schedule, hp, torch.device("cuda")
    if considered:
        with pytest.raises(ReachedError):
            fused.fused_sampler(*arguments)
    else:
        assert fused.fused_sampler(*arguments) is None


def test_a_metric_tells_the_spread_of_the_return():
    hp = hyperparameters(**QUANTILE)
    subject = learner(hp)
    ended = batch(0, torch.float32)._replace(terminal=torch.ones(4))
    assert subject.update(ended)["td_target_std"] == 0  # the reward is all there is
    going_on = ended._replace(terminal=torch.zeros(4))
    one = copy.deepcopy(subject)
    spread = one.update(going_on)["td_target_std"]
    half = copy.deepcopy(subject)
    half.configure(dataclasses.replace(hp, gamma=hp.gamma / 2))
    assert spread > 0
    noise = subject.draw_update_noise(4)
    wide, narrow = (
        each.update(going_on, noise=noise)["td_target_std"]
        for each in (copy.deepcopy(subject), half)
    )
    assert narrow.item() == pytest.approx(wide.item() / 2, rel=1e-5)
    assert "td_target_std" not in learner(hyperparameters()).update(going_on)
