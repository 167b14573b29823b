"""Running normalisation of observations and rewards for PPO and SPO.

The statistics are buffers of the network: they travel to the workers, into checkpoints and to
`qvpo evaluate` with its parameters. They move once per training step, after the updates, so that a
batch is learnt with the very statistics that its actions were drawn with.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.models.torch.fcnet import FullyConnectedNetwork
from torch import Tensor, nn

CLIP = 10.0  # normalised observations and rewards stay in [-CLIP, CLIP]
EPSILON = 1e-8


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of a set of vectors [D], float64."""

    number: float
    mean: NDArray[np.float64]
    deviations: NDArray[np.float64]

    @classmethod
    def of(cls, rows: NDArray[np.floating]) -> "Moments":
        """The moments of `rows` [B, D]."""
        values = np.asarray(rows, np.float64)
        mean = values.mean(0)
        return cls(float(len(values)), mean, ((values - mean) ** 2).sum(0))

    @classmethod
    def none(cls, size: int) -> "Moments":
        return cls(0.0, np.zeros(size), np.zeros(size))

    def plus(self, other: "Moments") -> "Moments":
        """Those of both sets together (Chan, Golub and LeVeque 1979)."""
        number = self.number + other.number
        if number == 0:
            return self
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.number / number)
        product = shift**2 * (self.number * other.number / number)
        return Moments(number, mean, self.deviations + other.deviations + product)

    @property
    def variance(self) -> NDArray[np.float64]:
        """Of the set itself, not an estimate for a larger one; 1 for an empty set."""
        return self.deviations / self.number if self.number else np.ones_like(self.mean)


class RunningMoments(nn.Module):
    """Moments as float32 buffers: RLlib's `set_weights` rounds to that anyway."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.number: Tensor
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("number", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))

    def read(self) -> Moments:
        number, mean, variance = (
            buffer.detach().cpu().numpy().astype(np.float64)
            for buffer in (self.number, self.mean, self.variance)
        )
        return Moments(float(number[0]), mean, variance * number[0])

    def add(self, new: Moments) -> None:
        total = self.read().plus(new)
        if total.number:
            self.number.fill_(total.number)
            self.mean.copy_(torch.as_tensor(total.mean))
            self.variance.copy_(torch.as_tensor(total.variance))

    def standardize(self, values: Tensor) -> Tensor:
        """[B, D] with mean 0 and variance 1, clipped; unchanged before there are any moments."""
        if not self.number:
            return values
        scaled = (values - self.mean) / torch.sqrt(self.variance + EPSILON)
        return scaled.clamp(-CLIP, CLIP)


class NormalizedNetwork(FullyConnectedNetwork):  # type: ignore[misc]
    """RLlib's fully connected actor and critic on normalised observations.

    It also holds the moments of the discounted return, by whose deviation rewards are divided.
    """

    def __init__(
        self,
        obs_space: Any,
        action_space: Any,
        num_outputs: int,
        model_config: dict[str, Any],
        name: str,
        *,
        normalize_observations: bool,
    ) -> None:
        super().__init__(obs_space, action_space, num_outputs, model_config, name)
        self.normalize_observations = normalize_observations
        self.observations = RunningMoments(int(np.prod(obs_space.shape)))
        self.returns = RunningMoments(1)

    def forward(
        self, input_dict: dict[str, Tensor], state: list[Tensor], seq_lens: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        obs = input_dict["obs_flat"].float()
        if self.normalize_observations:
            obs = self.observations.standardize(obs)
        result: tuple[Tensor, list[Tensor]] = super().forward({"obs_flat": obs}, state, seq_lens)
        return result


class ReturnTracker:
    """The discounted sum of the rewards so far in every episode under way, γG + r.

    Its standard deviation is what rewards are divided by, as in Gymnasium's `NormalizeReward`.
    """

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        self._sums: dict[int, float] = {}

    def follow(
        self, episode: int, rewards: NDArray[np.floating], ended: bool
    ) -> NDArray[np.float64]:
        """The sums [B] after each of an episode's next `rewards` [B]."""
        total, sums = self._sums.pop(episode, 0.0), np.empty(len(rewards))
        for i, reward in enumerate(rewards):
            total = self.gamma * total + float(reward)
            sums[i] = total
        if not ended:
            self._sums[episode] = total
        return sums
