"""TD3, DIPO and QSM: updates against the slow reference, and tasks with a known answer."""

import numpy as np
import pytest
import rival_reference
import torch

from qvpo_rllib.algorithms import dipo, qsm, td3
from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.networks import NoisePredictor
from qvpo_rllib.core.qvpo import QVPONetworks
from qvpo_rllib.core.replay import ReplayBuffer, Transitions
from qvpo_rllib.core.sampler import draw_noise, sample_actions

OBS, ACT, BATCH, UPDATES = 3, 2, 4, 3
SMALL = {"hidden": (6, 5), "batch_size": BATCH, "actor_lr": 3e-3, "critic_lr": 5e-3, "tau": 0.1,
         "gamma": 0.9, "warmup_steps": 0, "replay_capacity": 1000, "engine": "eager"}  # fmt: skip
BEST = torch.tensor([0.4, -0.6])


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch(seed, size=BATCH):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    terminal = torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat(size // 4)
    return Transitions(
        normal(size, OBS), normal(size, ACT).tanh(), 2 * normal(size), normal(size, OBS), terminal
    )


def randomised(nets, seed=0):
    """Every parameter random, targets unlike the online networks."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in nets.named_parameters():
        spread = 1.2 / parameter.shape[1] ** 0.5 if name.endswith("weight") else 0.3
        parameter.data.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return nets


def assert_close(nets, expected):
    for module in ("actor", "critic", "target_actor", "target_critic"):
        for name, value in getattr(nets, module).named_parameters():
            wanted = getattr(expected, module)[name]
            np.testing.assert_allclose(value.detach(), wanted, rtol=0, atol=1e-8, err_msg=name)


# --- Against the reference -------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, {"policy_delay": 1, "target_noise": 2.0}], ids=str)
def test_td3_updates_equal_the_reference(double, overrides):
    hp = td3.TD3Hyperparameters(**SMALL, **overrides)
    nets = randomised(td3.TD3Networks(OBS, ACT, hp))
    expected = rival_reference.TD3Update(nets, hp)
    learner = td3.TD3Learner(nets, hp, seed=0, device="cpu")
    for i in range(UPDATES):
        noise = learner.draw_update_noise(BATCH)
        metrics = learner.update(batch(i), noise=noise)
        learner.num_updates += 1
        for name, value in expected.update(batch(i), noise, i + 1).items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-8), name
        assert_close(nets, expected)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"target_actor_interval": 2, "grad_clip": 0.1, "action_lr": 0.5}],
    ids=str,
)
def test_dipo_updates_equal_the_reference_and_are_written_back(double, overrides):
    values = {"diffusion_steps": 3, "action_steps": 4, **SMALL, **overrides}
    hp = dipo.DIPOHyperparameters.for_task(values, "Hopper-v5")
    nets = randomised(QVPONetworks(OBS, ACT, hp).double())
    expected = rival_reference.DIPOUpdate(nets, hp)
    learner = dipo.DIPOLearner(nets, hp, seed=0, device="cpu")
    replay = ReplayBuffer(50, OBS, ACT, seed=1, device="cpu", improves_actions=True)
    replay.add(batch(5, size=20))
    draws = torch.Generator(), torch.Generator()
    for i in range(UPDATES):
        draws[0].set_state(replay.generator.get_state())
        draws[1].set_state(learner.generator.get_state())
        first, second = ((torch.rand(BATCH, generator=draws[0]) * 20).long() for _ in range(2))
        rows = Transitions(*(column[first] for column in replay.columns))
        improved = replay.improved_action.clone()
        noise = _same_noise(learner, draws[1])
        metrics = learner.update_from(replay)
        learner.num_updates += 1
        found, wanted = expected.update(
            rows, replay.columns.obs[second], improved[second], noise, i + 1
        )
        for name, value in wanted.items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-8), name
        assert_close(nets, expected)
        improved[second] = torch.tensor(found)
        torch.testing.assert_close(replay.improved_action, improved, rtol=0, atol=1e-9)
        assert torch.equal(replay.columns.action[:20], batch(5, size=20).action)


def test_dipos_native_updates_equal_eager_ones_and_leave_pytorch_one_thread(monkeypatch):
    learners, seen = [], []
    for engine in ("eager", "native"):
        values = {"diffusion_steps": 3, "action_steps": 4, **SMALL, "engine": engine}
        hp = dipo.DIPOHyperparameters.for_task(values, "Hopper-v5")
        nets = randomised(QVPONetworks(OBS, ACT, hp))
        learner = dipo.DIPOLearner(nets, hp, seed=0, device="cpu")
        replay = ReplayBuffer(50, OBS, ACT, seed=1, device="cpu", improves_actions=True)
        replay.add(batch(5, size=20))
        update_from = learner.update_from
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            monkeypatch.setattr(
                learner,
                "update_from",
                lambda source, f=update_from: (seen.append(torch.get_num_threads()), f(source))[1],
            )
            learner.train(replay, 1)
        finally:
            torch.set_num_threads(before)
        learners.append((learner, replay))
    assert seen == [3, 1]
    (eager, expected), (native, found) = learners
    assert native.engine == "native"
    torch.testing.assert_close(found.improved_action, expected.improved_action, rtol=0, atol=1e-5)
    assert not torch.equal(found.improved_action[:20], found.columns.action[:20])
    for mine, other in zip(native.networks.parameters(), eager.networks.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


def _same_noise(learner, generator):
    """What `learner` will draw next, without drawing it."""
    own, learner.generator = learner.generator, generator
    noise = learner.draw_update_noise(BATCH)
    learner.generator = own
    return noise


@pytest.mark.parametrize("overrides", [{}, {"grad_clip": 0.5, "exploration_noise": 1.0}], ids=str)
def test_qsm_updates_equal_the_reference(double, overrides):
    hp = qsm.QSMHyperparameters(diffusion_steps=3, **SMALL, **overrides)
    nets = randomised(QVPONetworks(OBS, ACT, hp).double())
    expected = rival_reference.QSMUpdate(nets, hp)
    learner = qsm.QSMLearner(nets, hp, seed=0, device="cpu")
    target_actor = {n: v.clone() for n, v in nets.target_actor.named_parameters()}
    for i in range(UPDATES):
        noise = learner.draw_update_noise(BATCH)
        metrics = learner.update(batch(i), noise=noise)
        learner.num_updates += 1
        for name, value in expected.update(batch(i), noise).items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-6), name
        assert_close(nets, expected)
    for name, value in nets.target_actor.named_parameters():
        assert torch.equal(value, target_actor[name])  # unused


# --- A bandit whose best action is known -----------------------------------------------------


def learnt_actions(learner, replay, updates, act):
    """Actions [200, 2] in the one state after `updates`."""
    learner.train(replay, updates)
    with torch.no_grad():
        return act(learner.networks, torch.ones(200, 1), torch.Generator().manual_seed(7))


def bandit(improves_actions=False):
    """Random actions of one state; each ends its episode with reward -|a - a*|²."""
    actions = 2 * torch.rand(4096, 2, generator=torch.Generator().manual_seed(0)) - 1
    obs, reward = torch.ones(4096, 1), -(actions - BEST).square().sum(dim=1)
    replay = ReplayBuffer(4096, 1, 2, seed=0, device="cpu", improves_actions=improves_actions)
    replay.add(Transitions(obs, actions, reward, obs, torch.ones(4096)))
    return replay


TOY = {"hidden": (64, 64), "batch_size": 128, "actor_lr": 1e-3, "critic_lr": 3e-3,
       "warmup_steps": 0}  # fmt: skip


def test_td3_finds_the_best_action_of_a_bandit():
    torch.manual_seed(0)
    hp = td3.TD3Hyperparameters(**{**TOY, "actor_lr": 3e-3})
    learner = td3.TD3Learner(td3.TD3Networks(1, 2, hp), hp, seed=0, device="cpu")
    before = learner.networks.actor(torch.ones(1, 1))
    actions = learnt_actions(learner, bandit(), 800, lambda nets, obs, _: nets.actor(obs))
    assert (before - BEST).norm() > 0.4
    assert (actions[0] - BEST).norm() < 0.15


def test_dipo_finds_the_best_action_of_a_bandit():
    torch.manual_seed(0)
    hp = dipo.DIPOHyperparameters.for_task({**TOY, "diffusion_steps": 5}, "Bandit-v0")
    learner = dipo.DIPOLearner(QVPONetworks(1, 2, hp), hp, seed=0, device="cpu")
    replay = bandit(improves_actions=True)

    def act(nets, obs, generator):
        noise = draw_noise(5, len(obs), 1, 2, generator, learner.device)
        return sample_actions(nets.actor, nets.schedule, obs, noise)[:, 0]

    actions = learnt_actions(learner, replay, 400, act)
    assert ((replay.improved_action - BEST).norm(dim=1) < 0.1).float().mean() > 0.9
    assert (actions - BEST).norm(dim=1).mean() < 0.15


def test_qsm_samples_around_the_best_action_of_a_bandit():
    """M_q ∇Q of Q = -|a - a*|² pulls the samples to a*; a larger M_q would jump over it."""
    torch.manual_seed(0)
    hp = qsm.QSMHyperparameters(**TOY, diffusion_steps=10, q_gradient_scale=1.0)
    learner = qsm.QSMLearner(QVPONetworks(1, 2, hp), hp, seed=0, device="cpu")

    def act(nets, obs, generator):
        noise = torch.randn(10, len(obs), 2, generator=generator)
        return qsm.sample(nets.actor, nets.schedule, obs, noise)

    actions = learnt_actions(learner, bandit(), 600, act)
    assert (actions.mean(dim=0) - BEST).norm() < 0.15
    assert (actions - BEST).norm(dim=1).mean() < 0.45  # of random ones 0.9


# --- Acting ----------------------------------------------------------------------------------


def test_qsm_samples_equal_the_reference(double):
    actor = randomised(NoisePredictor(OBS, ACT, (6, 5), 4)).double()
    schedule = NoiseSchedule("vp", 4)
    obs, noise = batch(0).obs, torch.randn(4, BATCH, ACT)
    expected = rival_reference.qsm_sample(
        rival_reference.weights_of(actor),
        rival_reference.betas("vp", 4),
        obs.numpy(),
        noise.numpy(),
    )
    found = qsm.sample(actor, schedule, obs, noise)
    np.testing.assert_allclose(found, expected, atol=1e-6)  # the schedule is rounded to float32
    assert (np.abs(expected) < 1).any()
