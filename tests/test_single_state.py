"""The toys' policy update is QVPO's own: the same numbers in, the same parameters out."""

import pytest
import torch

from qvpo_rllib.core.errors import NonFiniteError
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.qvpo import ImprovementNoise, QVPOLearner, QVPONetworks
from qvpo_rllib.core.replay import Transitions
from qvpo_rllib.core.sampler import min_q, sample_actions
from qvpo_rllib.paper.single_state import SingleStatePolicy, toy_hyperparameters

SMALL = {
    "hidden": (16, 16),
    "diffusion_steps": 4,
    "num_policy_samples": 8,
    "num_uniform_samples": 3,
    "entropy_weight": 0.3,
    "batch_size": 6,
    "actor_lr": 1e-2,
    "engine": "eager",
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_chosen_samples": 4, "entropy_reduction": "mean"},
        {"q_weights": "qcut", "vlo_coefficient": True},
        {"q_weights": "qexp", "grad_clip": 0.01, "noise_schedule": "vp"},
    ],
    ids=str,
)
def test_improve_is_the_policy_half_of_the_learners_update(options):
    hp = QVPOHyperparameters(**{**SMALL, **options}, k_target=1, update_order="policy_then_critic")
    torch.manual_seed(0)
    learner = QVPOLearner(QVPONetworks(1, 2, hp), hp, seed=0, device="cpu")
    toy = SingleStatePolicy(2, hp, seed=5)
    toy.actor.load_state_dict(learner.networks.actor.state_dict())

    obs = torch.zeros(hp.batch_size, 1)
    batch = Transitions(obs, torch.rand(6, 2), torch.rand(6), obs, torch.ones(6))
    for _ in range(3):
        noise = learner.draw_update_noise(hp.batch_size)
        samples = sample_actions(toy.actor, toy.schedule, obs, noise.policy)
        q = min_q(learner.networks.critic, obs, samples)
        metrics = learner.update(batch, noise=noise)
        loss = toy.improve(samples, q, ImprovementNoise(noise.uniform, noise.step, noise.forward))
        assert loss == pytest.approx(float(metrics["actor_loss"]), rel=1e-5)
    for ours, theirs in zip(
        toy.actor.parameters(), learner.networks.actor.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_measurement_leaves_the_training_as_it_was():
    hp = QVPOHyperparameters(**SMALL)
    policies = [SingleStatePolicy(2, hp, seed=1) for _ in range(2)]
    policies[1].sample(3, 5, torch.Generator().manual_seed(9))
    first, second = (policy.sample(6, 8) for policy in policies)
    assert torch.equal(first, second)
    assert not torch.equal(first, SingleStatePolicy(2, hp, seed=2).sample(6, 8))


def test_a_nan_stops_the_training():
    policy = SingleStatePolicy(1, QVPOHyperparameters(**SMALL), seed=0)
    with pytest.raises(NonFiniteError, match="loss"):
        policy.improve(torch.zeros(6, 8, 1), torch.full((6, 8), torch.nan))


@pytest.mark.parametrize("name", ["gamma", "critic_lr", "k_behavior"])
def test_an_option_without_effect_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} has no effect"):
        toy_hyperparameters(SMALL, {name: 0.5})


def test_a_weight_that_moves_by_itself_is_refused():
    with pytest.raises(ValueError, match=r"entropy_weight='auto' is not allowed.*number"):
        toy_hyperparameters(SMALL, {"entropy_weight": "auto"})


def test_settings_win_over_the_experiments_own_values():
    assert toy_hyperparameters(SMALL, {"entropy_weight": 0.7}).entropy_weight == 0.7
    assert toy_hyperparameters(SMALL, {}).hidden == (16, 16)
