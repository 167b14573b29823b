"""A bandit whose best action is known, learnt in seconds; and reproducibility over updates."""

import pytest
import torch

from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks
from qvpo_rllib.core.replay import ReplayBuffer, Transitions
from qvpo_rllib.core.sampler import ActionSelector, draw_noise, sample_actions

BEST = torch.tensor([0.4, -0.6])
UPDATES = 400
HP = QVPOHyperparameters(
    hidden=(64, 64),
    diffusion_steps=5,
    num_policy_samples=16,
    k_target=1,
    actor_lr=1e-3,
    critic_lr=3e-3,
    batch_size=128,
    entropy_weight=0.002,
    engine="eager",  # compiling takes longer than the training
)


def replay(seed):
    """Random actions of one state; each ends its episode with reward -|a - a*|²."""
    count = 4096
    generator = torch.Generator().manual_seed(seed)
    actions = 2 * torch.rand(count, 2, generator=generator) - 1
    reward = -(actions - BEST).square().sum(dim=1)
    obs = torch.ones(count, 1)
    held = ReplayBuffer(count, 1, 2, seed=seed, device="cpu")
    held.add(Transitions(obs, actions, reward, obs, torch.ones(count)))
    return held


def learner(seed):
    torch.manual_seed(seed)
    return QVPOLearner(QVPONetworks(1, 2, HP), HP, seed=seed, device="cpu")


def train(subject, held, updates):
    for _ in range(updates):
        subject.update(held.sample(HP.batch_size), held.sample(HP.batch_size))


def distances(subject, num_samples):
    """Distance to the best action of 200 actions, each the best of `num_samples`: [200]."""
    nets, generator = subject.networks, torch.Generator().manual_seed(7)
    noise = draw_noise(HP.diffusion_steps, 200, num_samples, 2, generator, torch.device("cpu"))
    selector = ActionSelector(nets.actor, nets.critic, nets.schedule)
    action, _ = selector.act(torch.ones(200, 1), noise)
    return (action - BEST).norm(dim=1)


@pytest.fixture(scope="module")
def trained():
    """The learner after training, with its distances before: K = 8 and K = 1."""
    subject = learner(0)
    before = distances(subject, 8), distances(subject, 1)
    train(subject, replay(0), UPDATES)
    return subject, *before


def test_the_best_of_eight_is_near_the_best_action(trained):
    subject, before, _ = trained
    after = distances(subject, 8)
    assert before.mean() > 0.5
    assert after.mean() < 0.15
    assert after.quantile(0.9) < 0.25


def test_the_policy_itself_has_moved_towards_the_best_action(trained):
    """Without the critics' choice: single samples."""
    subject, _, before = trained
    after = distances(subject, 1)
    assert before.median() > 0.6
    assert after.median() < before.median() / 2


def test_the_critics_have_learnt_the_reward(trained):
    subject, _, _ = trained
    actions = 2 * torch.rand(500, 2, generator=torch.Generator().manual_seed(1)) - 1
    with torch.no_grad():
        q = subject.networks.critic(torch.ones(500, 1), actions)
    reward = -(actions - BEST).square().sum(dim=1)
    assert (q - reward).abs().mean() < 0.05


def test_a_larger_entropy_weight_keeps_the_policy_wider():
    spread = []
    for weight in (0.0, 0.3):
        torch.manual_seed(0)
        hp = QVPOHyperparameters(**{**HP.to_dict(), "entropy_weight": weight})
        subject, held = QVPOLearner(QVPONetworks(1, 2, hp), hp, seed=0, device="cpu"), replay(0)
        train(subject, held, 150)
        nets, generator = subject.networks, torch.Generator().manual_seed(7)
        noise = draw_noise(HP.diffusion_steps, 1, 500, 2, generator, torch.device("cpu"))
        actions = sample_actions(nets.actor, nets.schedule, torch.ones(1, 1), noise)
        spread.append(actions.std(dim=1).mean().item())
    assert spread[1] > 1.2 * spread[0]


def test_the_same_seed_gives_the_same_parameters_and_another_seed_others():
    subjects = [learner(seed) for seed in (3, 3, 4)]
    for subject, seed in zip(subjects, (3, 3, 4), strict=True):
        train(subject, replay(seed), 20)
    states = [list(subject.networks.parameters()) for subject in subjects]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert all(
        not torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True) if a.requires_grad
    )
