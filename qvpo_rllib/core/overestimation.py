"""What the critics predict against what then came: the bias of Q along whole episodes."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Of a truncated episode only those states count after which what the time limit cut off would
# weigh less than this.
CUT_OFF_WEIGHT = 0.05


class ValueBias(NamedTuple):
    """Means over an episode's states."""

    predicted: float  # min Q(s_t, a_t)
    observed: float  # Σ_k γ^k r_{t+k}


def value_bias(
    q: NDArray[np.floating], rewards: NDArray[np.floating], terminated: bool, gamma: float
) -> ValueBias | None:
    """Predicted Q and observed discounted return of one episode's states (REDQ, Chen et al. 2021).

    Args:
        q, rewards: [length], of the actions taken.
        terminated: whether the episode's return really ended; otherwise a time limit cut it off,
            and its last states, whose observed return is only a part, are left out.

    Returns:
        None where a time limit leaves no state.
    """
    length = len(rewards)
    observed, following = np.empty(length), 0.0
    for t in reversed(range(length)):
        following = float(rewards[t]) + gamma * following
        observed[t] = following
    if not terminated and gamma > 0:
        length -= math.ceil(math.log(CUT_OFF_WEIGHT) / math.log(gamma)) - 1
    if length < 1:
        return None
    return ValueBias(float(np.mean(q[:length])), float(observed[:length].mean()))
