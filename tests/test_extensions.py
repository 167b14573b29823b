"""What goes beyond the paper: each against its slow reference, then what must always hold."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvpo_rllib.core import losses
from qvpo_rllib.core.extensions import learnt
from qvpo_rllib.core.extensions.learnt import LearntScale
from qvpo_rllib.core.hyperparameters import QVPOHyperparameters
from qvpo_rllib.core.options import option_table
from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks
from qvpo_rllib.core.replay import ReplayBuffer, Transitions
from qvpo_rllib.paper.single_state import SingleStatePolicy

CPU = torch.device("cpu")
quick = settings(deadline=None, max_examples=60, derandomize=True)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def soft_weights(q, temperature):
    """Weights of mean 1 for Q [B, N], in numpy."""
    zero = torch.zeros(())
    return losses.q_weights(
        *("softmax", torch.as_tensor(q), zero),
        q_cut=1.0, q_mean=zero, q_std=zero, temperature=torch.as_tensor(temperature),
    ).numpy()  # fmt: skip


# --- Soft weights ------------------------------------------------------------------------------


def test_the_kl_of_soft_weights(rng):
    weights = soft_weights(rng.normal(size=(7, 5)) * 10, 4.0)
    found = losses.soft_weight_kl(torch.tensor(weights))
    assert float(found) == pytest.approx(reference.soft_weight_kl(weights), rel=1e-12)
    equal, single = torch.ones(2, 8), torch.tensor([[8.0, *[0.0] * 7]])
    assert float(losses.soft_weight_kl(equal)) == 0
    assert float(losses.soft_weight_kl(single)) == pytest.approx(math.log(8))


@quick
@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(0.05, 20), st.floats(0, 1))
def test_no_other_weights_within_the_same_kl_have_a_higher_mean_q(seed, num, temperature, share):
    """The weights are the solution of REPS's problem, not any that prefer a high Q."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(1, num)) * 3
    best = soft_weights(q, temperature)[0] / num
    other = (1 - share) * best + share * rng.dirichlet(np.ones(num))
    kl = [reference.soft_weight_kl(num * w[None]) for w in (best, other)]
    if kl[1] <= kl[0]:
        assert other @ q[0] <= best @ q[0] + 1e-9


@quick
@given(st.integers(0, 10**6), st.floats(-1e4, 1e4), st.floats(1e-2, 1e2))
def test_soft_weights_know_neither_zero_nor_unit_of_q(seed, constant, factor):
    q = np.random.default_rng(seed).normal(size=(3, 6))
    expected = soft_weights(q, 0.7)
    np.testing.assert_allclose(soft_weights(factor * q + constant, factor * 0.7), expected, 1e-5)
    np.testing.assert_allclose(expected.mean(axis=1), 1)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_learnt_temperature_brings_the_kl_to_its_target(rng, scale):
    q, temperature = scale * rng.normal(size=(64, 64)), LearntScale(1.0, CPU)
    before = losses.soft_weight_kl(torch.tensor(soft_weights(q, 1.0)))
    assert abs(float(before) - 0.8) > 0.2
    q = torch.tensor(q)
    for _ in range(7000):
        shares = torch.softmax(q / temperature.value, dim=1)
        temperature.descend(0.8 - losses.soft_weight_kl(64 * shares).float())
    found = losses.soft_weight_kl(torch.tensor(soft_weights(q, float(temperature.value))))
    assert float(found) == pytest.approx(0.8, abs=0.03)


def test_a_learnt_scale_is_adam_on_a_logarithm_and_stays_in_place(rng):
    subject, expected = LearntScale(0.3, CPU), reference.LearntScale(0.3)
    place = subject.state.data_ptr()
    for excess in rng.normal(size=300) - 1:
        subject.descend(torch.tensor(excess, dtype=torch.float32))
        expected.descend(excess)
    assert float(subject.value) == pytest.approx(expected.value, rel=1e-5)
    assert float(subject.value) > 0.31
    assert subject.state.data_ptr() == place


def test_a_constraint_that_cannot_be_met_ends_at_a_bound():
    """All Q equal: their KL is 0 at any temperature."""
    temperature = LearntScale(1.001e-6, CPU)
    for _ in range(10):
        temperature.descend(torch.tensor(2.0))
    assert float(temperature.value) == pytest.approx(1e-6)
    weights = soft_weights(np.ones((1, 4), np.float32), float(temperature.value))
    np.testing.assert_array_equal(weights, np.ones((1, 4)))


# --- The weight of the entropy term by the spread ----------------------------------------------


@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_the_entropy_weight_rises_while_the_spread_is_too_small(spread):
    weight = torch.tensor(0.01)
    for _ in range(1000):
        learnt.follow_spread(weight, torch.tensor(spread), 0.2)
    assert float(weight) == pytest.approx(0.01 * math.exp(3 * (0.2 - spread)), rel=1e-3)
    for _ in range(20_000):
        learnt.follow_spread(weight, torch.tensor(spread), 0.2)
    assert float(weight) == pytest.approx(10 if spread < 0.2 else 1e-4)


@pytest.mark.parametrize("target", [0.15, 0.35])
def test_the_spread_of_a_policy_comes_to_its_target(monkeypatch, target):
    """One state, Q = -‖a‖²: a constant ω_ent of 0.01 ends elsewhere. A faster controller fits the
    test's faster learning rate."""
    monkeypatch.setattr(learnt, "SPREAD_RATE", 0.1)
    spreads = {}
    for weight in ("auto", 0.01):
        hp = QVPOHyperparameters(
            hidden=(32, 32), actor_lr=3e-3, batch_size=16, diffusion_steps=5,
            num_policy_samples=16, entropy_weight=weight, sample_std_target=target,
        )  # fmt: skip
        policy = SingleStatePolicy(2, hp, seed=0)
        found = []
        for update in range(1500):
            samples = policy.sample(16, 16)
            policy.improve(samples, -samples.square().sum(-1))
            if update >= 1000:
                found.append(samples.std(dim=1, correction=0).mean())
        spreads[weight] = float(torch.stack(found).mean())
    assert spreads["auto"] == pytest.approx(target, abs=0.02)
    assert abs(spreads[0.01] - target) > 0.04


# --- In a run ----------------------------------------------------------------------------------

SMALL = {
    "hidden": (8, 8),
    "batch_size": 8,
    "warmup_steps": 0,
    "replay_capacity": 100,
    "diffusion_steps": 3,
    "num_policy_samples": 8,
    "k_target": 2,
    "engine": "eager",
}
SOFT = {"q_weights": "softmax", "kl_target": 1.0, "entropy_weight": "auto"}


def learner_and_replay(**options):
    hp = QVPOHyperparameters(**{**SMALL, **options})
    torch.manual_seed(0)
    learner = QVPOLearner(QVPONetworks(3, 2, hp), hp, seed=0, device="cpu")
    replay = ReplayBuffer(100, 3, 2, seed=0, device="cpu")
    rows = [torch.rand(50, width) for width in (3, 2, 1, 3, 1)]
    reward, end = rows[2][:, 0], (rows[4][:, 0] > 0.9).float()
    replay.add(Transitions(rows[0], rows[1], reward, rows[3], end))
    return learner, replay


def test_options_that_bring_metrics_may_be_switched_on_during_a_run():
    learner, replay = learner_and_replay()
    learner.train(replay, 2)
    before = learner.pop_metrics()
    learner.configure(QVPOHyperparameters(**{**SMALL, **SOFT}))
    learner.train(replay, 3)
    after = learner.pop_metrics()
    assert after.keys() - before.keys() == {"q_weight_kl"}
    learner.train(replay, 1)
    assert learner.pop_metrics().keys() == after.keys()


def test_a_learner_of_a_checkpoint_without_learnt_numbers_starts_with_the_first_ones():
    old, _ = learner_and_replay()
    state = old.state_dict()
    for name in old._learnt():
        del state[name]
    learner, _ = learner_and_replay(**SOFT)
    learner.load_state_dict(state)
    assert learner.settings_in_force() == pytest.approx(
        {"entropy_weight": 0.01, "q_temperature": 1.0}
    )


def test_the_options_are_off_by_default():
    assert QVPOHyperparameters().q_weights == "qadv"
    assert "softmax" in option_table(QVPOHyperparameters)
