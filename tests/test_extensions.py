"""What goes beyond the paper: each against its slow reference, then what must always hold."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvpo_rllib.core import losses
from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.extensions import learnt
from qvpo_rllib.core.extensions.entropy import log_density, noise_predictor
from qvpo_rllib.core.extensions.learnt import LearntScale
from qvpo_rllib.core.extensions.refinement import guided_actions, improved_actions
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks
from qvpo_rllib.core.replay import ReplayBuffer, Transitions
from qvpo_rllib.core.sampler import min_q, sample_actions
from qvpo_rllib.paper.single_state import SingleStatePolicy

CPU = torch.device("cpu")
quick = settings(deadline=None, max_examples=60, derandomize=True)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def soft_weights(q, temperature):
    """The shares of Q [B, N], in numpy."""
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
    equal, single = torch.full((2, 8), 1 / 8), torch.tensor([[1.0, *[0.0] * 7]])
    assert float(losses.soft_weight_kl(equal)) == pytest.approx(0, abs=1e-6)
    assert float(losses.soft_weight_kl(single)) == pytest.approx(math.log(8))


@quick
@given(st.integers(0, 10**6), st.integers(3, 9), st.floats(0.5, 20))
def test_no_other_weights_of_the_same_kl_have_a_higher_mean_q(seed, num, temperature):
    """The weights are the solution of REPS's problem, not any that prefer a high Q."""
    rng = np.random.default_rng(seed)
    q = 3 * rng.normal(size=(1, num))
    best = soft_weights(q, temperature)[0]
    logits = np.log(best + 1e-12) + 0.2 * rng.normal(size=num)
    low, high = 0.0, 10.0  # the exponent at which a neighbour has the KL of the best
    for _ in range(50):
        exponent = (low + high) / 2
        other = np.exp(exponent * (logits - logits.max()))
        other /= other.sum()
        kl = [reference.soft_weight_kl(weights[None]) for weights in (best, other)]
        low, high = (exponent, high) if kl[1] <= kl[0] else (low, exponent)
    assert kl[1] == pytest.approx(kl[0], abs=1e-9)
    assert other @ q[0] <= best @ q[0] + 1e-7


@quick
@given(st.integers(0, 10**6), st.floats(-1e4, 1e4), st.floats(1e-2, 1e2))
def test_soft_weights_know_neither_zero_nor_unit_of_q(seed, constant, factor):
    q = np.random.default_rng(seed).normal(size=(3, 6))
    expected = soft_weights(q, 0.7)
    np.testing.assert_allclose(soft_weights(factor * q + constant, factor * 0.7), expected, 1e-5)
    np.testing.assert_allclose(expected.sum(axis=1), 1)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_learnt_temperature_brings_the_kl_to_its_target(rng, scale):
    q, temperature = scale * rng.normal(size=(64, 64)), LearntScale(1.0, CPU)
    before = losses.soft_weight_kl(torch.tensor(soft_weights(q, 1.0)))
    assert abs(float(before) - 0.8) > 0.2
    q = torch.tensor(q)
    for _ in range(7000):
        shares = torch.softmax(q / temperature.value, dim=1)
        temperature.descend(0.8 - losses.soft_weight_kl(shares).float())
    found = losses.soft_weight_kl(torch.tensor(soft_weights(q, float(temperature.value))))
    assert float(found) == pytest.approx(0.8, abs=0.03)


def test_a_learnt_scale_begins_once():
    scale = LearntScale(1.0, CPU)
    for start in (0.0, 3.0):
        scale.begin(torch.tensor(start))
        assert float(scale.value) == pytest.approx(start or 1e-6)
    scale.descend(torch.tensor(1.0))
    scale.begin(torch.tensor(7.0))
    assert float(scale.value) == pytest.approx(3 * math.exp(-3e-4))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_equal_shares_count_for_one_action(reduction):
    """All samples alike: the loss is that of one of them with the weight 1, and so is the entropy
    term, which would weigh N_d times less if each sample counted."""
    error, uniform = torch.tensor([0.7, 0.2]), torch.rand(2 * 5)
    one = losses.policy_loss(error, torch.ones(2), uniform, torch.full((10,), 0.3), reduction, 2)
    shares = torch.full((2, 8), 1 / 8)
    weight = losses.entropy_weights(shares, 0.3, 1).repeat_interleave(5)
    many = losses.policy_loss(
        error.repeat_interleave(8), shares.flatten(), uniform, weight, reduction, 2
    )
    torch.testing.assert_close(many, one)


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
    np.testing.assert_array_equal(weights, np.full((1, 4), 0.25))


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


@pytest.mark.parametrize("target", [0.2, 0.35])
def test_the_spread_of_a_policy_comes_to_its_target(monkeypatch, target):
    """One state, Q = -‖a‖²; a constant ω_ent of 0.01 ends at 0.1. A faster controller goes with the
    test's faster learning rate."""
    monkeypatch.setattr(learnt, "SPREAD_RATE", 0.2)
    hp = QVPOHyperparameters(
        hidden=(32, 32), actor_lr=3e-3, batch_size=16, diffusion_steps=5,
        num_policy_samples=16, entropy_weight="auto", sample_std_target=target,
    )  # fmt: skip
    policy, found = SingleStatePolicy(2, hp, seed=0), []
    for _ in range(800):
        samples = policy.sample(16, 16)
        policy.improve(samples, -samples.square().sum(-1))
        found.append(samples.std(dim=1, correction=0).mean())
    assert float(torch.stack(found[-150:]).mean()) == pytest.approx(target, abs=0.02)


# --- Refinement --------------------------------------------------------------------------------

OBS, ACT = 3, 2


def random_networks(dtype=torch.float64, **options):
    """Every parameter random, so that no mistake hides in zeros."""
    nets = QVPONetworks(OBS, ACT, QVPOHyperparameters(**{**SMALL, **options}))
    generator = torch.Generator().manual_seed(2)
    for parameter in nets.parameters():
        parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return nets.to(dtype)


def test_improved_actions_are_pytorchs_adam_to_the_last_bit():
    nets, obs = random_networks(torch.float32), torch.randn(9, OBS)
    start = torch.randn(9, ACT).clamp(-1, 1)
    gradient_of = nets.critic.q_gradient(obs)
    expected = start.clone().requires_grad_()
    adam = torch.optim.Adam([expected], lr=0.03, eps=1e-5)
    for _ in range(20):
        expected.grad = -gradient_of(expected)
        torch.nn.utils.clip_grad_norm_([expected], 0.2)
        adam.step()
        with torch.no_grad():
            expected.clamp_(-1, 1)
    found = improved_actions(gradient_of, start, 20, 0.03, 0.2)
    assert torch.equal(found, expected)
    assert (found - start).abs().max() > 0.3
    assert (found.abs() == 1).any()  # the clamp counts


@pytest.mark.parametrize("steps", [1, 5])
def test_improved_actions(rng, steps):
    nets = random_networks()
    obs, start = rng.normal(size=(4, OBS)), rng.uniform(-1, 1, (4, ACT))
    expected = reference.improved_actions(
        reference.weights_of(nets.critic), obs, start, steps, 0.03, 0.2
    )
    found = improved_actions(
        nets.critic.q_gradient(torch.tensor(obs)), torch.tensor(start), steps, 0.03, 0.2
    )
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "vp"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_guided_actions(rng, steps, schedule):
    nets = random_networks(noise_schedule=schedule)
    obs, noise = rng.normal(size=(5, OBS)), rng.normal(size=(3, 5, ACT))
    actor, critic = reference.weights_of(nets.actor), reference.weights_of(nets.critic)
    beta = reference.betas(schedule, 3)
    expected = [
        reference.guided_action(actor, critic, beta, obs[r], noise[:, r], steps, 0.7)
        for r in range(5)
    ]
    tensors = torch.tensor(obs), torch.tensor(noise)
    gradient_of = nets.critic.q_gradient(tensors[0])
    found = guided_actions(
        nets.actor, nets.schedule, gradient_of, *tensors, steps, torch.tensor(0.7)
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)  # √(1 - ᾱ) is rounded to float32
    plain = sample_actions(nets.actor, nets.schedule, tensors[0], tensors[1][:, :, None])[:, :, 0]
    assert (found - plain).abs().max() > 1e-3


def test_guidance_without_strength_is_the_chain_itself():
    nets, obs, noise = random_networks(), torch.randn(5, OBS), torch.randn(3, 5, ACT)
    obs, noise = obs.double(), noise.double()
    arguments = nets.actor, nets.schedule, nets.critic.q_gradient(obs), obs, noise
    plain = sample_actions(nets.actor, nets.schedule, obs, noise[:, :, None])[:, 0]
    torch.testing.assert_close(guided_actions(*arguments, 3, torch.tensor(0.0)), plain)
    torch.testing.assert_close(guided_actions(*arguments, 0, torch.tensor(9.0)), plain)


@pytest.mark.parametrize("kind", ["gradient", "guidance"])
def test_refined_actions_have_a_higher_q_and_stay_in_the_box(kind):
    learner, replay = learner_and_replay(target_refinement=kind, num_chosen_samples=2)
    learner.train(replay, 5)
    assert learner.pop_metrics()["refinement_gain"] > 0
    nets, hp = learner.networks, learner.hp
    obs, noise = torch.randn(200, OBS), torch.randn(3, 200, 8, ACT)
    samples = sample_actions(nets.actor, nets.schedule, obs, noise)
    q = min_q(nets.critic, obs, samples)
    chosen_q, chosen = losses.best_of(q, samples, 2)
    moved = learner.refinement.moved(nets, hp, obs, q, chosen, noise, nets.critic)
    assert moved.abs().max() <= 1
    assert not moved.requires_grad
    gain = min_q(nets.critic, obs, moved) - chosen_q
    assert float((gain >= -1e-6).float().mean()) > 0.9
    assert float(gain.mean()) > 1e-4


def test_guidance_does_not_know_the_scale_of_q():
    """Q times 64, exactly: the very same targets."""
    found = []
    for factor in (1, 64):
        learner, _ = learner_and_replay(target_refinement="guidance", guidance_scale=0.5)
        nets = learner.networks
        for twin in (nets.critic.q1, nets.critic.q2):
            for parameter in twin.linears()[-1].parameters():
                parameter.data.mul_(factor)
        generator = torch.Generator().manual_seed(1)
        obs = torch.randn(6, OBS, generator=generator)
        noise = torch.randn(3, 6, 8, ACT, generator=generator)
        samples = sample_actions(nets.actor, nets.schedule, obs, noise)
        q = min_q(nets.critic, obs, samples)
        _, chosen = losses.best_of(q, samples)
        found.append(learner.refinement.moved(nets, learner.hp, obs, q, chosen, noise, nets.critic))
        assert (found[-1] - chosen).abs().max() > 1e-3
    torch.testing.assert_close(*found)


# --- Entropy in the TD target ------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear", "vp"])
def test_log_density(rng, schedule):
    nets = random_networks(noise_schedule=schedule)
    obs, action = rng.normal(size=(5, OBS)), rng.uniform(-1, 1, (5, ACT))
    noise = rng.normal(size=(3, 5, 4, ACT))
    actor, beta = reference.weights_of(nets.actor), reference.betas(schedule, 3)
    expected = [
        reference.log_density(actor, beta, obs[b], action[b], noise[:, b]) for b in range(5)
    ]
    with torch.no_grad():
        predict = noise_predictor(nets.actor, torch.tensor(obs))
        found = log_density(predict, nets.schedule, torch.tensor(action), torch.tensor(noise))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


class Mixture:
    """Gaussians of equal weight and one deviation, with the exact predictor of their noise."""

    def __init__(self, centres, deviation, schedule):
        self.centres = torch.tensor(centres, dtype=torch.float64)  # [C, A]
        self.deviation, self.schedule = deviation, schedule

    def predict(self, noisy, t):
        """√(1 - ᾱ)·(-∇ ln p_t), Tweedie's formula: p_t is a mixture, too."""
        bar = self.schedule.reverse_steps[t, 0] ** -2
        variance = bar * self.deviation**2 + 1 - bar
        away = noisy[..., None, :] - bar.sqrt() * self.centres  # [B, M, C, A]
        shares = torch.softmax(-away.square().sum(-1) / (2 * variance), dim=-1)
        return (1 - bar).sqrt() * (shares[..., None] * away).sum(-2) / variance

    def log_density(self, action):
        away = (action[:, None] - self.centres).square().sum(-1)
        norm = -action.shape[1] / 2 * math.log(2 * math.pi * self.deviation**2)
        return (
            norm + torch.logsumexp(-away / (2 * self.deviation**2), 1) - math.log(len(self.centres))
        )

    def draw(self, count):
        which = torch.randint(len(self.centres), (count,))
        spread = self.deviation * torch.randn(count, self.centres.shape[1], dtype=torch.float64)
        return self.centres[which] + spread


MIXTURES = {
    "gaussian": ([[0.2]], 0.1),
    "narrow": ([[-0.3, 0.4]], 0.05),
    "two peaks": ([[0.5, 0.0], [-0.5, 0.2]], 0.1),
    "three peaks": ([[0.6], [0.0], [-0.5]], 0.08),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_the_estimated_density_of_a_known_mixture(name):
    """Over a long chain the estimate is the density itself; over one of 20 steps the density
    blurred: too low on average, and the same order of likely and unlikely actions."""
    torch.manual_seed(0)
    found = {}
    for steps in (20, 1000):
        mixture = Mixture(*MIXTURES[name], NoiseSchedule("cosine", steps))
        actions = mixture.draw(200)
        noise = torch.randn(steps, 200, 50, actions.shape[1], dtype=torch.float64)
        estimate = log_density(mixture.predict, mixture.schedule, actions, noise)
        known = mixture.log_density(actions)
        found[steps] = float((estimate - known).mean()) / actions.shape[1]
        correlation = float(torch.corrcoef(torch.stack([estimate, known]))[0, 1])
        assert correlation > (0.9 if steps == 1000 else 0.75)
    assert abs(found[1000]) < 0.05
    assert -1.0 < found[20] < -0.1


def test_a_wider_policy_has_the_higher_entropy_and_a_learnt_weight_answers():
    schedule, noise = NoiseSchedule("cosine", 20), torch.randn(20, 100, 20, 1).double()
    entropies = []
    for deviation in (0.03, 0.1, 0.3):
        mixture = Mixture([[0.0]], deviation, schedule)
        actions = mixture.draw(100)
        entropies.append(-float(log_density(mixture.predict, schedule, actions, noise).mean()))
    assert entropies == sorted(entropies)
    for target, direction in ((-9.0, -1), (9.0, 1)):
        learner, replay = learner_and_replay(entropy_in_target="auto", target_entropy=target)
        learner.train(replay, 20)
        moved = learner.settings_in_force()["entropy_in_target"] - 0.05
        assert direction * moved > 1e-4


def test_the_td_target_falls_with_the_density_of_its_action():
    plain, replay = learner_and_replay()
    soft, _ = learner_and_replay(entropy_in_target=0.4)
    batch = replay.sample(8)
    noise = soft.draw_update_noise(8)
    nets = soft.networks
    samples = sample_actions(nets.target_actor, nets.schedule, batch.next_obs, noise.target)
    _, best = losses.best_of(min_q(nets.target_critic, batch.next_obs, samples), samples)
    with torch.no_grad():
        predict = noise_predictor(nets.target_actor, batch.next_obs)
        log_p = log_density(predict, nets.schedule, best[:, 0], noise.entropy)
        difference = plain._next_q(batch, noise) - soft._next_q(batch, noise)
    torch.testing.assert_close(difference, 0.4 * log_p, atol=1e-6, rtol=1e-5)
    assert log_p.std() > 0.01


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


@pytest.mark.parametrize(
    "options", [SOFT, {"target_refinement": "guidance"}], ids=["soft", "guided"]
)
def test_their_metrics_are_there_before_the_first_update_of_the_policy(options):
    learner, replay = learner_and_replay(policy_interval=3, **options)
    learner.train(replay, 2)
    names = list(learner._metric_names)
    learner.train(replay, 2)
    assert learner._metric_names == names
    assert learner._num_summed == 4


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
