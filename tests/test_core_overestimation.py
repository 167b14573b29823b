"""The bias of Q along episodes, against the definition written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvpo_rllib.rollout.episodes import CUT_OFF_WEIGHT, value_bias

rewards = st.lists(st.floats(-10, 10), min_size=1, max_size=40)


def returns_from(rewards: list[float], gamma: float) -> list[float]:
    return [
        sum(gamma**k * reward for k, reward in enumerate(rewards[t:])) for t in range(len(rewards))
    ]


@given(rewards, st.floats(0, 0.999), st.floats(-5, 5))
def test_a_terminated_episode_counts_all_its_states(
    rewards: list[float], gamma: float, error: float
) -> None:
    observed = np.array(returns_from(rewards, gamma))
    bias = value_bias(observed + error, np.array(rewards), True, gamma)
    assert bias is not None
    assert bias.observed == pytest.approx(observed.mean(), abs=1e-9)
    assert bias.predicted - bias.observed == pytest.approx(error, abs=1e-9)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.97])
def test_of_a_truncated_episode_the_states_before_the_cut_do_not_count(gamma: float) -> None:
    length = 150
    rewards = np.ones(length)
    endless = 1 / (1 - gamma)  # what the return would be without the time limit
    bias = value_bias(np.full(length, endless), rewards, False, gamma)
    assert bias is not None
    observed = returns_from(list(rewards), gamma)
    counted = [g for t, g in enumerate(observed) if gamma ** (length - t) <= CUT_OFF_WEIGHT]
    assert bias.observed == pytest.approx(np.mean(counted))
    assert 0 <= bias.predicted - bias.observed <= CUT_OFF_WEIGHT * endless
    assert value_bias(np.ones(5), np.ones(5), False, 0.99) is None
    assert value_bias(np.ones(5), np.ones(5), True, 0.99) is not None


def test_without_discount_ahead_a_state_is_its_reward() -> None:
    assert value_bias(np.array([2.0, 0.0]), np.array([1.0, 3.0]), False, 0.0) == (1.0, 2.0)
