"""Numbers that an update learns beside its networks: a temperature, a weight.

All of their state is in tensors that are written in place, so that a captured update moves them.
"""

import math

import torch
from torch import Tensor

LEARNING_RATE = 3e-4
BETA_1, BETA_2, ADAM_EPS = 0.9, 0.999, 1e-8
# Where a constraint cannot be met (all Q are equal), the number stops at these bounds.
BOUNDS = (1e-6, 1e6)
# η of ω_ent: while the spread is 0.1 too low, ω_ent doubles every 2,300 updates. The spread itself
# answers within some hundred, so that the two do not swing.
SPREAD_RATE = 3e-3
ENTROPY_WEIGHT_START = 0.01  # the paper's
ENTROPY_WEIGHT_BOUNDS = (1e-4, 10.0)


class LearntScale:
    """A positive number x that Adam (rate 3e-4) moves on ln x.

    Attributes:
        state: [4]: ln x, Adam's two moments, and the number of its steps.
    """

    def __init__(self, start: float, device: torch.device) -> None:
        self.state = torch.tensor([math.log(start), 0.0, 0.0, 0.0], device=device)

    @property
    def value(self) -> Tensor:
        """x, a scalar tensor."""
        return self.state[0].exp()

    def begin(self, start: Tensor) -> None:
        """Sets x to the scalar `start`, at least at the lower bound, unless a step was taken."""
        log, _, _, steps = self.state.unbind()
        log.copy_(torch.where(steps > 0, log, start.clamp(min=BOUNDS[0]).log()))

    def descend(self, excess: Tensor) -> None:
        """Takes one step towards a lower x·excess: x falls while the scalar `excess` is above 0.

        It is the dual step of a constraint that holds where the excess is 0.
        """
        log, mean, square, steps = self.state.unbind()
        gradient = log.exp() * excess  # of x·excess by ln x
        steps.add_(1)
        mean.lerp_(gradient, 1 - BETA_1)
        square.lerp_(gradient.square(), 1 - BETA_2)
        mean_now = mean / (1 - BETA_1**steps)
        square_now = square / (1 - BETA_2**steps)
        log.sub_(LEARNING_RATE * mean_now / (square_now.sqrt() + ADAM_EPS))
        log.clamp_(math.log(BOUNDS[0]), math.log(BOUNDS[1]))


def follow_spread(entropy_weight: Tensor, spread: Tensor, target: float) -> None:
    """Moves ω_ent in place: ln ω_ent ← ln ω_ent + η·(target - spread).

    No source: the simplest controller without an error that stays. All are scalars.
    """
    entropy_weight.mul_((SPREAD_RATE * (target - spread)).exp()).clamp_(*ENTROPY_WEIGHT_BOUNDS)
