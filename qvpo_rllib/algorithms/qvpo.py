"""QVPO on RLlib: configuration, policy, algorithm. Its learner is `core.qvpo.QVPOLearner`."""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from ray.tune.registry import register_trainable
from torch import Generator, Tensor

from qvpo_rllib.core.hyperparameters import QVPOHyperparameters
from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks
from qvpo_rllib.core.sampler import ActionSelector, draw_noise
from qvpo_rllib.rollout.policy import OffPolicyTorchPolicy
from qvpo_rllib.runtime.algorithm import OffPolicyAlgorithm
from qvpo_rllib.runtime.config import OffPolicyConfig


class QVPOConfig(OffPolicyConfig):
    """Configuration of `QVPO`.

    `training(...)` takes every field of `QVPOHyperparameters`, which documents them; everything
    else is RLlib's. Example:

        config = QVPOConfig().environment("Ant-v5").training(k_behavior=4)
        algo = config.build_algo()
        result = algo.train()

    One iteration is at least 1,000 env steps (`reporting(min_sample_timesteps_per_iteration=…)`);
    every 10th ends with an evaluation of 10 episodes with the best of `k_eval` actions.
    """

    hyperparameters_class = QVPOHyperparameters
    algorithm_name = "QVPO"

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class or QVPO)


class QVPOTorchPolicy(OffPolicyTorchPolicy):
    """Acts with the best of K diffusion samples; on the local training worker it also learns.

    Actions are in [-1, 1]; RLlib's `normalize_actions` (on by default) maps them to the box.
    With `explore=True` K is `k_behavior`, with `explore=False` it is `k_eval`.
    """

    hyperparameters_class = QVPOHyperparameters
    networks_class = QVPONetworks
    learner_class = QVPOLearner
    behavior_prefixes = ("actor.", "critic.")

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, config: Any) -> None:
        super().__init__(observation_space, action_space, config)
        nets = self.networks
        self._selector = ActionSelector(
            nets.actor, nets.critic, nets.schedule, self.kernels.sampler
        )
        self._updates_seen = 0

    def choose(
        self, obs: NDArray[Any], *, explore: bool, generator: Generator | None = None
    ) -> NDArray[np.float32]:
        return self.act(obs, self.hp.k_behavior if explore else self.hp.k_eval, generator)

    def act(
        self, obs: NDArray[Any], k: int, generator: Generator | None = None
    ) -> NDArray[np.float32]:
        """The best of k actions for each observation: [B, O] → [B, A] float32 in [-1, 1]."""
        actions, _ = self._best_of(self.to_tensor(obs), k, generator)
        return _to_numpy(actions)

    def choose_and_predict(
        self, obs: NDArray[Any], generator: Generator | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        rows = self.to_tensor(obs)
        actions, q = self._best_of(rows, self.hp.k_eval, generator)
        if q is None:
            q = self._selector.q_of(rows, actions)
        return _to_numpy(actions), _to_numpy(q)

    def _best_of(
        self, obs: Tensor, k: int, generator: Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        noise = draw_noise(
            self.hp.diffusion_steps,
            obs.shape[0],
            k,
            self.act_dim,
            generator or self.generator,
            self.device,
        )
        if self.learner is not None and self.learner.num_updates != self._updates_seen:
            self._updates_seen = self.learner.num_updates
            self._selector.weights_changed()
        return self._selector.select(obs, noise)


def _to_numpy(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.cpu().numpy()
    return array


class QVPO(OffPolicyAlgorithm):
    """Q-weighted Variational Policy Optimization (Ding et al., NeurIPS 2024).

    Build it from `QVPOConfig`. A result of `train()` has RLlib's usual keys; the learner's metrics
    are under `info/learner/default_policy/learner_stats`, the update ledger under `ledger`.
    """

    config_class = QVPOConfig
    policy_class = QVPOTorchPolicy


register_trainable("QVPO", QVPO)
