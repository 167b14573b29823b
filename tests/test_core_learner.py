"""Whole updates against the reference's, then the learner's bookkeeping."""

import copy

import numpy as np
import pytest
import reference
import torch

from qvpo_rllib.core.losses import nearest_sample_distance
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks, UpdateNoise
from qvpo_rllib.core.replay import Transitions

OBS, ACT, BATCH, UPDATES = 3, 2, 4, 3
MODULES = ("actor", "critic", "target_actor", "target_critic")

# Large rates, so that three updates move every parameter by far more than the tolerance.
BASE = {
    "hidden": (9, 9, 7),
    "diffusion_steps": 4,
    "num_policy_samples": 6,
    "k_target": 4,
    "actor_lr": 1e-2,
    "critic_lr": 3e-2,
    "tau": 0.2,
    "gamma": 0.9,
    "q_cut": 0.3,
    "entropy_weight": 0.5,
    "engine": "eager",  # tests/test_core_engine.py compares the others with it
}
CASES = [
    {},
    {"update_order": "policy_then_critic"},
    {"entropy_reduction": "mean"},
    {"num_chosen_samples": 3},
    {"num_chosen_samples": 3, "entropy_reduction": "mean"},
    {"num_uniform_samples": 0},
    {"num_uniform_samples": 0, "entropy_reduction": "mean", "num_chosen_samples": 3},
    {"vlo_coefficient": True},
    {"vlo_coefficient": True, "diffusion_steps": 1, "noise_schedule": "vp"},
    {"vlo_coefficient": True, "num_chosen_samples": 3, "noise_schedule": "linear"},
    {"target_actor": False},
    {"target_actor": False, "update_order": "policy_then_critic"},
    {"grad_clip": None},
    {"grad_clip": 0.05},
    {"k_target": 1},
    {"k_target": 1, "target_actor": False, "num_policy_samples": 1, "q_weights": "qexp"},
    {"q_weights": "qcut"},
    {"q_weights": "qrelu", "num_chosen_samples": 3},
    {"q_weights": "qexp"},
    {"q_weights": "qexp", "num_chosen_samples": 3, "update_order": "policy_then_critic"},
    {"q_weights": "softmax", "kl_target": 0.7},
    {"q_weights": "softmax", "kl_target": 1.5, "entropy_weight": "auto", "num_uniform_samples": 1},
    {"entropy_in_target": 0.3, "entropy_noises": 3},
    {"entropy_in_target": "auto", "k_target": 1, "update_order": "policy_then_critic"},
    {
        "entropy_in_target": "auto",
        "target_entropy": 0.5,
        "target_actor": False,
        "noise_schedule": "vp",
    },
    {"target_refinement": "gradient"},
    {"target_refinement": "gradient", "num_chosen_samples": 3, "q_weights": "qexp"},
    {"target_refinement": "gradient", "gradient_steps": 3, "gradient_lr": 0.1},
    {"target_refinement": "guidance", "noise_schedule": "linear", "guidance_steps": 2},
    {
        "target_refinement": "guidance",
        "num_chosen_samples": 3,
        "update_order": "policy_then_critic",
        "noise_schedule": "linear",  # with the others, samples share a corner of the box
    },
    {"hidden": (10,), "diffusion_steps": 20},
    {"entropy_weight": 0.0},
    {"critic": "quantile", "num_quantiles": 5, "dropped_quantiles": 1},
    {"critic": "quantile", "num_quantiles": 1, "dropped_quantiles": 0, "k_target": 1},
    {"critic_layer_norm": True, "update_order": "policy_then_critic"},
    {"critic": "quantile", "num_quantiles": 4, "critic_layer_norm": True, "q_weights": "qcut"},
]


@pytest.fixture
def double():
    """Tensors that the learner makes are float64 within the test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def hyperparameters(**overrides):
    return QVPOHyperparameters(**{**BASE, **overrides})


def networks(hp, seed=0, dtype=torch.float64):
    """Every parameter random, targets unlike the online networks: no mistake can hide in zeros."""
    result = QVPONetworks(OBS, ACT, hp)
    generator = torch.Generator().manual_seed(seed)
    for parameter in result.parameters():
        spread = 1.2 / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 0.3
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.data.copy_(spread * noise)
    return result.to(dtype)


def batch(seed, dtype=torch.float64, size=BATCH):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)

    return Transitions(
        obs=normal(size, OBS),
        action=normal(size, ACT).tanh(),
        reward=2 * normal(size),
        next_obs=normal(size, OBS),
        terminal=torch.tensor([0.0, 1.0, 0.0, 0.0] * (size // 4), dtype=dtype),
    )


def learner(hp, seed=0, nets=None):
    nets = networks(hp, dtype=torch.float32) if nets is None else nets
    return QVPOLearner(nets, hp, seed=seed, device="cpu")


def parameters(net):
    return {name: value.detach().clone() for name, value in net.named_parameters()}


def assert_close(nets, expected, atol):
    for module in MODULES:
        for name, value in getattr(nets, module).named_parameters():
            wanted = getattr(expected, module)[name]
            np.testing.assert_allclose(
                value.detach(), wanted, rtol=0, atol=atol, err_msg=f"{module}.{name}"
            )


# --- Against the reference -------------------------------------------------------------------


@pytest.mark.parametrize("overrides", CASES, ids=str)
def test_three_updates_equal_the_reference(double, overrides):
    hp = hyperparameters(**overrides)
    nets = networks(hp)
    before = parameters(nets)
    expected = reference.Update(nets, hp)
    subject = learner(hp, nets=nets)
    for i in range(UPDATES):
        noise = subject.draw_update_noise(BATCH)
        critic_batch, policy_batch = batch(2 * i), batch(2 * i + 1)
        metrics = subject.update(critic_batch, policy_batch, noise)
        wanted = expected.update(critic_batch, policy_batch, noise)
        for name, value in wanted.items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-8, abs=1e-10), name
    assert_close(nets, expected, atol=1e-8)
    for name, value in nets.named_parameters():  # every layer has moved, and far
        assert (value - before[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize("order", ["critic_then_policy", "policy_then_critic"])
def test_three_updates_in_float32_equal_the_reference(order):
    hp = hyperparameters(update_order=order, noise_schedule="linear")
    nets = networks(hp, dtype=torch.float32)
    expected = reference.Update(nets, hp)
    subject = learner(hp, nets=nets)
    for i in range(UPDATES):
        noise = subject.draw_update_noise(BATCH)
        subject.update(batch(i, torch.float32), None, noise)
        same = batch(i)
        exact = [v.double() if v.is_floating_point() else v for v in noise]
        expected.update(same, same, UpdateNoise(*exact))
    # Adam divides by |gradient| + 1e-5: an entry of tiny gradient keeps float32's rounding.
    assert_close(nets, expected, atol=1e-4)


@pytest.mark.parametrize("order", ["critic_then_policy", "policy_then_critic"])
def test_the_policy_is_updated_in_every_nth_update(double, order):
    hp = hyperparameters(policy_interval=2, update_order=order)
    nets = networks(hp)
    expected = reference.Update(nets, hp)
    subject = learner(hp, nets=nets)
    moved, losses = [], []
    for i in range(5):
        before = parameters(nets.actor)
        noise = subject.draw_update_noise(BATCH)
        metrics = subject.update(batch(2 * i), batch(2 * i + 1), noise)
        subject.num_updates += 1
        for name, value in expected.update(batch(2 * i), batch(2 * i + 1), noise).items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-8, abs=1e-10), name
        moved.append(any((p != before[n]).any() for n, p in nets.actor.named_parameters()))
        losses.append(metrics["actor_loss"].item())
    assert_close(nets, expected, atol=1e-8)
    assert moved == [False, True, False, True, False]
    # An update without the policy repeats its last metrics.
    assert losses == [0, losses[1], losses[1], losses[3], losses[3]]
    assert 0 < losses[1] != losses[3]


def test_a_restored_learner_goes_on_between_two_updates_of_the_policy():
    hp = hyperparameters(policy_interval=3)
    original = learner(hp, seed=1)
    restored = learner(hp, seed=2, nets=networks(hp, seed=9, dtype=torch.float32))
    for i in range(8):
        if i == 4:
            restored.load_state_dict(copy.deepcopy(original.state_dict()))
        subjects = (original, restored) if i >= 4 else (original,)
        metrics = []
        for subject in subjects:
            found = subject.update(batch(i, torch.float32))
            metrics.append({k: v.item() for k, v in found.items()})
            subject.num_updates += 1
        assert metrics[0] == metrics[-1]
    assert_identical(original, restored)


def test_a_restored_learner_has_the_metrics_of_its_own_options_alone():
    """The checkpoint has softmax's too; the first update repeats the last of the policy's."""
    softmax = {"q_weights": "softmax", "kl_target": 0.7}
    original = learner(hyperparameters(policy_interval=2, **softmax))
    expected = learner(hyperparameters(policy_interval=2))
    restored = learner(hyperparameters(policy_interval=2))
    restored.load_state_dict(original.state_dict())
    names = list(expected.update(batch(0, torch.float32)))
    for number in range(2):
        assert list(restored.update(batch(number, torch.float32))) == names
        restored.num_updates += 1


def test_a_policy_interval_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="policy_interval"):
        hyperparameters(policy_interval=0)


@pytest.mark.parametrize("order", ["critic_then_policy", "policy_then_critic"])
def test_one_batch_serves_both_losses_if_no_other_is_given(order):
    hp = hyperparameters(update_order=order)
    one, other = learner(hp), learner(hp)
    for i in range(2):
        both = batch(i, torch.float32)
        one.update(both)
        other.update(both, both)
    assert_identical(one, other)


def test_the_policy_learns_from_nothing_but_the_states_of_its_batch():
    hp = hyperparameters()
    one, other = learner(hp), learner(hp)
    critic_batch, policy_batch = batch(0, torch.float32), batch(1, torch.float32)
    garbage = policy_batch._replace(
        action=policy_batch.action + 1, reward=policy_batch.reward * 9, terminal=torch.ones(BATCH)
    )
    one.update(critic_batch, policy_batch)
    other.update(critic_batch, garbage)
    assert_identical(one, other)


# --- Bookkeeping -----------------------------------------------------------------------------


def assert_identical(one, other):
    states = [dict(learner.networks.named_parameters()) for learner in (one, other)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def differ(one, other):
    pairs = zip(one.networks.parameters(), other.networks.parameters(), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)


def test_targets_start_as_copies_that_share_no_memory_and_no_gradient():
    nets = QVPONetworks(OBS, ACT, hyperparameters())
    for online, target in ((nets.actor, nets.target_actor), (nets.critic, nets.target_critic)):
        for a, b in zip(online.parameters(), target.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()
            assert a.requires_grad
            assert not b.requires_grad


@pytest.mark.parametrize("chosen", [1, 3])
@pytest.mark.parametrize("uniform", [0, 10])
def test_drawn_noise_has_the_documented_shapes_and_ranges(chosen, uniform):
    hp = hyperparameters(num_chosen_samples=chosen, num_uniform_samples=uniform)
    noise = learner(hp).draw_update_noise(64)
    rows = 64 * (chosen + uniform)
    shapes = [tuple(value.shape) for value in noise]
    assert shapes[:5] == [
        *((4, 64, 4, ACT), (4, 64, 6, ACT), (64, uniform, ACT), (rows,), (rows, ACT)),
    ]
    assert shapes[5] == (4, 64, 0, ACT)
    assert set(noise.step.tolist()) == set(range(4))
    assert noise.forward.std().item() == pytest.approx(1, abs=0.2)
    if uniform:
        assert noise.uniform.abs().max() <= 1
        assert noise.uniform.std().item() == pytest.approx(1 / 3**0.5, abs=0.05)


def test_noise_that_is_not_given_comes_from_the_learners_generator():
    hp = hyperparameters()
    drawing, given, other_seed = learner(hp, seed=4), learner(hp, seed=4), learner(hp, seed=5)
    for i in range(2):
        drawing.update(batch(i, torch.float32))
        given.update(batch(i, torch.float32), noise=given.draw_update_noise(BATCH))
        other_seed.update(batch(i, torch.float32))
    assert_identical(drawing, given)
    assert differ(drawing, other_seed)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 2, 1), (5, 7, 2)])
def test_the_distance_to_the_nearest_sample(shape):
    samples = np.random.default_rng(0).uniform(-1, 1, shape)
    nearest = [
        min(np.linalg.norm(row[i] - row[j]) for j in range(len(row)) if j != i)
        for row in samples
        for i in range(len(row))
        if len(row) > 1
    ]
    result = nearest_sample_distance(torch.from_numpy(samples))
    assert float(result) == pytest.approx(np.mean(nearest) if nearest else 0.0)


def test_metrics_are_detached_finite_scalars():
    metrics = learner(hyperparameters()).update(batch(0, torch.float32))
    assert len(metrics) >= 10
    for name, value in metrics.items():
        assert value.shape == (), name
        assert not value.requires_grad, name
        assert torch.isfinite(value), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q_weights": "qexp"},
        {"critic": "quantile", "critic_layer_norm": True},
        {"q_weights": "softmax", "kl_target": 0.7, "entropy_weight": "auto"},
        {"target_refinement": "gradient"},
        {"target_refinement": "guidance"},
        {"entropy_in_target": "auto"},
    ],
    ids=str,
)
def test_a_restored_learner_goes_on_bit_by_bit(options):
    hp = hyperparameters(**options)
    original = learner(hp, seed=1)
    for i in range(3):
        original.update(batch(i, torch.float32))
        original.num_updates += 1
    state = copy.deepcopy(original.state_dict())
    restored = learner(hp, seed=2, nets=networks(hp, seed=9, dtype=torch.float32))
    restored.load_state_dict(state)
    for i in range(3, 6):
        one, other = (subject.update(batch(i, torch.float32)) for subject in (original, restored))
        assert {k: v.item() for k, v in one.items()} == {k: v.item() for k, v in other.items()}
        restored.num_updates += 1
    assert_identical(original, restored)
    assert restored.settings_in_force() == original.settings_in_force()
    assert restored.num_updates == 6


def test_a_restored_learner_keeps_its_own_hyperparameters():
    original = learner(hyperparameters())
    original.update(batch(0, torch.float32))
    restored = learner(hyperparameters(actor_lr=0.5, critic_lr=0.25, adam_eps=1e-3))
    restored.load_state_dict(original.state_dict())
    for optimizer, lr in ((restored.actor_optimizer, 0.5), (restored.critic_optimizer, 0.25)):
        assert [(g["lr"], g["eps"]) for g in optimizer.param_groups] == [(lr, 1e-3)]


def test_new_hyperparameters_take_effect_at_once():
    changed, fresh = learner(hyperparameters()), learner(hyperparameters(gamma=0.1, tau=0.9))
    changed.configure(fresh.hp)
    changed.update(batch(0, torch.float32))
    fresh.update(batch(0, torch.float32))
    assert_identical(changed, fresh)


def test_the_entropy_weight_follows_the_env_steps_into_the_update():
    moving = {"entropy_weight": 0.8, "entropy_weight_end": 0.0, "entropy_decay_steps": 100}
    subject, constant = (
        learner(hyperparameters(**moving)),
        learner(hyperparameters(entropy_weight=0.2)),
    )
    subject.set_env_steps(75)
    assert subject.entropy_weight == pytest.approx(0.2)
    one, other = (each.update(batch(0, torch.float32)) for each in (subject, constant))
    assert one["entropy_loss"].item() == pytest.approx(other["entropy_loss"].item(), rel=1e-5)
    assert other["entropy_loss"].item() > 0


def test_a_restored_learner_keeps_the_moved_entropy_weight():
    hp = hyperparameters(entropy_weight_end=0.0, entropy_decay_steps=100)
    original, restored = learner(hp), learner(hp)
    original.set_env_steps(80)
    restored.load_state_dict(original.state_dict())
    assert restored.entropy_weight == original.entropy_weight


def test_an_unresolved_k_target_is_refused():
    with pytest.raises(ValueError, match="k_target is not resolved"):
        learner(hyperparameters(k_target=None))
