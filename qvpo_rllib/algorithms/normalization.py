"""Running normalisation of observations and rewards for PPO and SPO.

The statistics are buffers of the network: they travel to the workers, into checkpoints and to
`qvpo evaluate` with its parameters. They move once per training step, after the updates, so that a
batch is learnt with the very statistics that its actions were drawn with.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.models.torch.fcnet import FullyConnectedNetwork
from torch import Tensor

from qvpo_rllib.core.normalization import RunningMoments


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
        if self.normalize_observations and self.observations.number:
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
