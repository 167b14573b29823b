"""The affine map between the networks' actions in [-1, 1] and an environment's box."""

import numpy as np
from numpy.typing import NDArray


class ActionScale:
    """Maps [-1, 1] onto [low, high] in each dimension; the box may be asymmetric.

    Args:
        low, high: [A], finite, low < high.
    """

    def __init__(self, low: NDArray[np.floating], high: NDArray[np.floating]) -> None:
        self.low, self.high = low, high
        self.dtype = low.dtype
        self._half = (high.astype(np.float64) - low) / 2
        self._middle = (high.astype(np.float64) + low) / 2

    def to_env(self, action: NDArray[np.floating]) -> NDArray[np.floating]:
        """Maps [..., A] in [-1, 1] to [..., A] in [low, high], in the box's dtype."""
        scaled = self._middle + self._half * action
        return np.clip(scaled, self.low, self.high).astype(self.dtype)

    def to_unit(self, action: NDArray[np.floating]) -> NDArray[np.float32]:
        """Maps [..., A] in [low, high] to [..., A] in [-1, 1]."""
        unit = (action.astype(np.float64) - self._middle) / self._half
        return np.clip(unit, -1.0, 1.0).astype(np.float32)
