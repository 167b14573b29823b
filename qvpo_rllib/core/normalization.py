"""Running mean and deviation of observations, and what networks see of them.

A value becomes (x - mean) / √(variance + EPSILON), clipped to ±CLIP, as in Gymnasium's
`NormalizeObservation` with the clip of Stable-Baselines3's `VecNormalize`.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

CLIP = 10.0  # normalised observations and rewards stay in [-CLIP, CLIP]
EPSILON = 1e-8


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of a set of vectors [D], float64."""

    number: float
    mean: NDArray[np.float64]
    deviations: NDArray[np.float64]

    @classmethod
    def of(cls, rows: ArrayLike) -> "Moments":
        """The moments of `rows` [B, D]; B may be 0."""
        values = np.asarray(rows, np.float64)
        if not len(values):
            return cls.none(values.shape[1])
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
    """Moments as float32 buffers, which are written in place: a captured graph reads them.

    RLlib's `set_weights` would round them to float32 anyway.
    """

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

    def write(self, moments: Moments) -> None:
        """Takes these moments, after whatever the device has still to do with the old ones."""
        parts = [np.array([moments.number]), moments.mean, moments.variance]
        packed = torch.from_numpy(np.concatenate(parts)).float()
        if self.mean.is_cuda:
            packed = packed.pin_memory()  # so that nobody waits for the device
        new = torch.split(packed, [len(part) for part in parts])
        for buffer, values in zip((self.number, self.mean, self.variance), new, strict=True):
            buffer.copy_(values, non_blocking=True)

    def add(self, new: Moments) -> None:
        total = self.read().plus(new)
        if total.number:
            self.write(total)

    def standardize(self, values: Tensor) -> Tensor:
        """[..., D] with mean 0 and variance 1, clipped. Before there are any moments: clipped."""
        scaled = (values - self.mean) / torch.sqrt(self.variance + EPSILON)
        return scaled.clamp(-CLIP, CLIP)
