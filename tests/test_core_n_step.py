"""n-step returns from the replay, against targets that are summed up step by step."""

from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvpo_rllib.core import losses
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.replay import EpisodeSteps, ReplayBuffer, Transitions, replay_bytes

quick = settings(deadline=None, max_examples=150, derandomize=True)
ENDS = ("goes on", "terminal", "time limit")


class Streams:
    """Several environments whose transitions arrive in turns, each known by its number."""

    def __init__(self, num_streams: int) -> None:
        self.episodes = list(range(num_streams))
        self.steps = [0] * num_streams
        self.next_episode = num_streams
        # By number of a transition that has arrived: episode, step, reward, terminal.
        self.arrived: list[tuple[int, int, float, float]] = []

    def fragment(self, ends: list[str], *, lost: bool) -> tuple[Transitions, EpisodeSteps] | None:
        """One step of each environment, unless it is lost on its way.

        The observations carry the transition's number.
        """
        rows, first = [], len(self.arrived)
        for i, end in enumerate(ends):
            reward = np.sin(self.episodes[i] + 10.0 * self.steps[i])
            rows.append((self.episodes[i], self.steps[i], reward, float(end == "terminal")))
            self.steps[i] += 1
            if end != "goes on":
                self.episodes[i], self.steps[i] = self.next_episode, 0
                self.next_episode += 1
        if lost:
            return None
        self.arrived += rows
        number = np.arange(first, first + len(rows), dtype=np.float32)[:, None]
        episode, step, reward, terminal = (np.array(c) for c in zip(*rows, strict=True))
        columns = number, number, reward.astype("f"), number + 0.5, terminal.astype("f")
        last = np.array([end != "goes on" for end in ends])
        return Transitions(*map(torch.from_numpy, columns)), EpisodeSteps(episode, step, last)

    def expected(self, number: int, n: int, gamma: float) -> tuple[float, float]:
        """The target of a transition, and the observation that it bootstraps from."""
        at = {(e, t): i for i, (e, t, _, _) in enumerate(self.arrived)}
        episode, step, _, _ = self.arrived[number]
        numbers = [number]
        while (following := at.get((episode, step + len(numbers)))) is not None:
            numbers.append(following)
        known = [self.arrived[i][2:] for i in numbers]
        k = min(n, len(known))
        target = reference.n_step_target(known, 0, n, gamma, [q_of(i + 0.5) for i in numbers])
        return target, numbers[k - 1] + 0.5


def q_of(number: Any) -> Any:
    return 100 + 3 * number


def check(replay: ReplayBuffer, streams: Streams, n: int, gamma: float) -> None:
    if not len(replay):
        return
    batch = replay.sample(200, n, gamma)
    target = losses.td_target(batch.reward, batch.terminal, q_of(batch.next_obs[:, 0]), gamma)
    plain = torch.isin(batch.obs[:, 0], reference.in_order(replay).obs[:, 0])
    assert plain.all()
    for number, found, next_obs in zip(batch.obs[:, 0], target, batch.next_obs[:, 0], strict=True):
        wanted, last = streams.expected(int(number), n, gamma)
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        assert next_obs == last
    assert torch.equal(batch.action, batch.obs)


def buffer(capacity: int) -> ReplayBuffer:
    return ReplayBuffer(capacity, 1, 1, seed=0, device="cpu", follows_episodes=True)


@quick
@given(st.data(), st.integers(1, 30), st.integers(1, 3), st.integers(1, 5))
def test_targets_are_those_that_a_loop_over_the_episode_finds(
    data: Any, capacity: int, num_streams: int, n: int
) -> None:
    """Episodes of several environments that end in both ways, lost fragments, a ring that wraps,
    and a checkpoint in between, perhaps into a ring of another size."""
    gamma = data.draw(st.sampled_from([0.0, 0.5, 0.9]))
    ends = st.lists(st.sampled_from(ENDS), min_size=num_streams, max_size=num_streams)
    fragments = st.lists(st.tuples(ends, st.integers(0, 4).map(lambda i: i == 0)), max_size=25)
    streams, replay = Streams(num_streams), buffer(capacity)
    for before, part in enumerate([data.draw(fragments), data.draw(fragments)]):
        for fragment_ends, lost in part:
            fragment = streams.fragment(fragment_ends, lost=lost)
            if fragment is not None:
                replay.add(*fragment)
        check(replay, streams, n, gamma)
        if before == 0:
            other = buffer(data.draw(st.sampled_from([capacity, 4, 40])))
            other.load(replay.state_dict(), replay.segments())
            other.set_steps_to_successors(replay.steps_to_successors())
            replay = other
            check(replay, streams, n, gamma)


def test_several_steps_of_an_episode_may_come_at_once_and_in_more_than_the_ring_holds() -> None:
    streams, parts = Streams(2), []
    for i in range(9):
        ends = ["terminal" if i == 6 else "goes on", "goes on"]
        parts.append(streams.fragment(ends, lost=False))
    transitions, steps = zip(*filter(None, parts), strict=True)
    replay = buffer(11)
    replay.add(
        Transitions(*map(torch.cat, zip(*transitions, strict=True))),
        EpisodeSteps(*map(np.concatenate, zip(*steps, strict=True))),
    )
    check(replay, streams, 3, 0.9)
    assert [step for _, _, step in replay.state_dict()["newest"]] == [1, 8]  # no ended episode


def test_a_time_limit_bootstraps_and_an_end_does_not() -> None:
    """Three steps of reward 1, by hand: γ = 0.5."""
    for end, expected in (("terminal", 1.75), ("time limit", 1.75 + 0.125 * 8)):
        replay = buffer(10)
        columns = torch.arange(3.0)[:, None]
        terminal = torch.tensor([0.0, 0.0, float(end == "terminal")])
        episode = np.zeros(3, np.int64), np.arange(3), np.array([False, False, True])
        replay.add(
            Transitions(columns, columns, torch.ones(3), columns + 1, terminal),
            EpisodeSteps(*episode),
        )
        batch = replay.sample(100, 5, 0.5)
        target = losses.td_target(batch.reward, batch.terminal, torch.full((100,), 8.0), 0.5)
        first = batch.obs[:, 0] == 0
        assert (target[first] == expected).all()
        assert (batch.next_obs[first] == 3).all()


def test_one_step_is_what_it_was() -> None:
    plain, following = (
        ReplayBuffer(10, 1, 1, seed=0, device="cpu", follows_episodes=follows)
        for follows in (False, True)
    )
    streams = Streams(2)
    for _ in range(9):
        fragment = streams.fragment(["goes on", "time limit"], lost=False)
        assert fragment is not None
        plain.add(fragment[0])
        following.add(*fragment)
    for one, other in zip(plain.sample(50), following.sample(50, 1, 0.9), strict=True):
        assert torch.equal(one, other)
    assert "newest" not in plain.state_dict()


def test_n_step_is_checked_and_counted() -> None:
    with pytest.raises(ValueError, match="n_step=0 is not allowed: it must be an integer of 1"):
        QVPOHyperparameters(n_step=0)
    with pytest.raises(ValueError, match="n_step=501 is not allowed: it must be at most replay"):
        QVPOHyperparameters(n_step=501, replay_capacity=500, batch_size=8, warmup_steps=10)
    assert replay_bytes(10, 3, 2, follows_episodes=True) == replay_bytes(10, 3, 2) + 80
