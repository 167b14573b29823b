"""Normalised observations in the mathematics: the statistics, and what learners make of them."""

from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvpo_rllib.algorithms import ALGORITHMS
from qvpo_rllib.core.normalization import Moments, RunningMoments
from qvpo_rllib.core.replay import ReplayBuffer, Transitions

OBS, ACT = 4, 2
SIZES = {"hidden": (8,), "batch_size": 8, "warmup_steps": 0, "replay_capacity": 100}
DIFFUSION = {"diffusion_steps": 2}
QVPO = {**DIFFUSION, "num_policy_samples": 4, "num_uniform_samples": 2, "k_target": 2}
OWN: dict[str, dict[str, Any]] = {
    "qvpo": QVPO,
    "dipo": {**DIFFUSION, "action_steps": 1, "action_clip_ratio": 0.1, "target_actor_interval": 1},
    "qsm": DIFFUSION,
    "td3": {},
}
ENGINES = [("qvpo", "eager"), ("qvpo", "native"), ("dipo", "native"), ("qsm", "eager"),
           ("td3", "eager")]  # fmt: skip


def learner_of(name: str, engine: str, **options: Any) -> Any:
    entry = ALGORITHMS[name]
    policy = entry.load().policy_class
    hp = entry.hyperparameters(**{**SIZES, **OWN[name], "engine": engine, **options})
    torch.manual_seed(0)
    return policy.learner_class(policy.networks_class(OBS, ACT, hp), hp, seed=0, device="cpu")


def transitions(count: int, seed: int) -> Transitions:
    """Observations of very different sizes, one of which never changes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((OBS,), (ACT,), (), (OBS,), ())
    obs, action, reward, next_obs, end = (
        torch.randn(count, *shape, generator=generator) for shape in shapes
    )
    size, middle = torch.tensor([1.0, 300, 0.01, 0]), torch.tensor([0.0, -50, 3, 7])
    return Transitions(
        obs * size + middle, action.tanh(), reward, next_obs * size + middle, (end > 1).float()
    )


def replay_of(name: str, rows: Transitions) -> ReplayBuffer:
    replay = ReplayBuffer(100, OBS, ACT, seed=1, device="cpu", improves_actions=name == "dipo")
    replay.add(rows)
    return replay


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 100))
def test_what_networks_see_is_normalised_by_all_that_was_observed(
    sizes: list[int], seed: int
) -> None:
    learner = learner_of("td3", "eager", normalize_observations=True)
    rng, seen = np.random.default_rng(seed), []
    for size in sizes:
        rows = rng.normal([0, 1e4, -5, 3], [1, 10, 1e-3, 0], (size, OBS)).astype(np.float32)
        learner.observe(rows)
        seen.append(rows)
    history = np.concatenate(seen)
    values = np.concatenate([seen[-1], history + np.array([1, -20, 0.01, 1])]).astype(np.float32)
    found = learner.networks.normalize(torch.from_numpy(values)).numpy()
    # A mean in float32 is off by 1e-7 of its size, here of up to 3e-4 deviations.
    np.testing.assert_allclose(found, reference.standardized(history, values), atol=0.05, rtol=0.02)
    assert np.abs(found).max() <= 10


def test_a_million_single_steps_lose_nothing() -> None:
    """In float32 the mean of a million steps no longer notices another one."""
    learner = learner_of("td3", "eager", normalize_observations=True)
    half = np.full((500_000, OBS), 100.0)
    learner.observe(half + np.tile([[1.0], [-1.0]], (250_000, 1)))
    exact = learner.networks.observations.mean.clone()
    for _ in range(2000):
        learner.observe(np.full((1, OBS), 101.0))
    learner.observe(half[:1])
    assert (learner.networks.observations.mean > exact).all()
    expected = 100 + 2000 / 502_001
    assert learner._observed.mean == pytest.approx(np.full(OBS, expected), rel=1e-12)


@pytest.mark.parametrize(("name", "engine"), ENGINES)
def test_an_update_is_the_update_on_normalised_observations(name: str, engine: str) -> None:
    """To the last bit, with every engine: the networks cannot tell who normalised."""
    rows = transitions(60, seed=0)
    learner = learner_of(name, engine, normalize_observations=True)
    learner.observe(rows.obs)
    normalize = learner.networks.normalize
    plain = learner_of(name, engine)
    ready = rows._replace(obs=normalize(rows.obs), next_obs=normalize(rows.next_obs))
    replay, prepared = replay_of(name, rows), replay_of(name, ready)
    addresses = [buffer.data_ptr() for buffer in learner.networks.observations.buffers()]
    for _ in range(3):
        learner.train(replay, 2)
        plain.train(prepared, 2)
    assert learner.pop_metrics() == plain.pop_metrics()
    for mine, other in zip(learner.networks.parameters(), plain.networks.parameters(), strict=True):
        assert torch.equal(mine, other)
    # The replay has what the environment gave, and a captured graph would read the same memory.
    assert torch.equal(replay.columns.obs[:60], rows.obs)
    learner.observe(transitions(5, seed=1).obs)
    assert addresses == [b.data_ptr() for b in learner.networks.observations.buffers()]
    learner.train(replay, 1)
    plain.train(prepared, 1)
    assert learner.pop_metrics() != plain.pop_metrics()  # by other moments


def test_updates_do_not_move_the_statistics_and_only_updates_are_compared() -> None:
    learner = learner_of("qvpo", "eager", normalize_observations=True)
    rows = transitions(60, seed=0)
    learner.observe(rows.obs)
    before = {n: b.clone() for n, b in learner.networks.observations.named_buffers()}
    learner.train(replay_of("qvpo", rows), 5)
    for name, buffer in learner.networks.observations.named_buffers():
        assert torch.equal(buffer, before[name])
    assert learner.networks.observations.number == 60


@pytest.mark.parametrize("name", list(OWN))
def test_a_restored_learner_goes_on_in_the_same_statistics(name: str) -> None:
    rows, more = transitions(60, seed=0), transitions(7, seed=1)
    learner, other = (learner_of(name, "eager", normalize_observations=True) for _ in range(2))
    learner.observe(rows.obs)
    other.load_state_dict(learner.state_dict())
    for one in (learner, other):
        one.observe(more.obs)
    for mine, found in zip(
        learner.networks.observations.buffers(),
        other.networks.observations.buffers(),
        strict=True,
    ):
        assert torch.equal(mine, found)
    assert learner._observed.number == 67


@pytest.mark.parametrize("name", list(OWN))
def test_without_the_option_nothing_is_there(name: str) -> None:
    learner = learner_of(name, "eager")
    learner.observe(transitions(5, seed=0).obs)
    state = learner.state_dict()
    assert "observed" not in state
    assert not any(n.startswith("observations") for n in state["networks"])
    values = torch.full((2, OBS), 50.0)
    assert learner.networks.normalize(values) is values


def test_moments_reach_the_buffers_as_they_are() -> None:
    running = RunningMoments(2)
    running.write(Moments(4.0, np.array([1.0, 2.0]), np.array([8.0, 0.0])))
    assert running.number.tolist() == [4.0]
    assert running.mean.tolist() == [1.0, 2.0]
    assert running.variance.tolist() == [2.0, 0.0]


@pytest.mark.parametrize("before", [0, 5])
def test_a_fragment_without_steps_changes_no_moments(before: int) -> None:
    """A worker whose only environment raised in its first step hands over such a fragment."""
    learner = learner_of("qvpo", "eager", normalize_observations=True)
    learner.observe(transitions(before, seed=0).obs)
    moments = learner.networks.observations.read()
    learner.observe(np.zeros((0, OBS), np.float32))
    for found, expected in zip(learner.networks.observations.read(), moments, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert np.isfinite(moments.mean).all()
