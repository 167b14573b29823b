"""QVPO on RLlib: configuration, policy, algorithm. Its learner is `core.qvpo.QVPOLearner`."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from ray.rllib.policy.sample_batch import DEFAULT_POLICY_ID
from ray.tune.registry import register_trainable
from torch import Generator, Tensor

from qvpo_rllib.algorithms.export import export_policy
from qvpo_rllib.core.engine import CPU
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks
from qvpo_rllib.core.sampler import ActionSelector, draw_noise
from qvpo_rllib.rollout.policy import OffPolicyTorchPolicy, to_numpy
from qvpo_rllib.runtime.algorithm import OffPolicyAlgorithm
from qvpo_rllib.runtime.config import OffPolicyConfig
from qvpo_rllib.serving.onnx import OPSET


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


class QVPOTorchPolicy(OffPolicyTorchPolicy[QVPONetworks, QVPOHyperparameters]):
    """Acts with the best of K diffusion samples by the critics; see `OffPolicyTorchPolicy`."""

    hyperparameters_class = QVPOHyperparameters
    networks_class = QVPONetworks
    learner_class = QVPOLearner
    behavior_prefixes = ("actor.", "critic.")

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, config: Any) -> None:
        super().__init__(observation_space, action_space, config)
        nets = self.acting_networks()
        self._selector = ActionSelector(
            nets.actor, nets.critic, nets.schedule, self.kernels.sampler
        )
        self._updates_seen = 0

    def act_with_q(
        self, obs: NDArray[np.floating], *, generator: Generator | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        rows = self.network_input(obs)
        actions, q = self._act(rows, False, self.hp.k_eval, generator or self.generator)
        if q is None:
            q = self._selector.q_of(rows, actions)
        return to_numpy(actions), to_numpy(q)

    def _num_samples(self, k: int | None, explore: bool) -> int:
        if k is None:
            return self.hp.k_behavior if explore else self.hp.k_eval
        if k < 1:
            raise ValueError(f"k={k} is not allowed: it must be 1 or more.")
        return k

    def _act(
        self, obs: Tensor, explore: bool, k: int, generator: Generator
    ) -> tuple[Tensor, Tensor | None]:
        steps, num_states = self.hp.diffusion_steps, obs.shape[0]
        noise = draw_noise(steps, num_states, k, self.act_dim, generator, CPU)
        self.acting_networks()
        if self.learner is not None and self.learner.num_updates != self._updates_seen:
            self._updates_seen = self.learner.num_updates
            self._selector.weights_changed()
        return self._selector.act(obs, noise)


class QVPO(OffPolicyAlgorithm):
    """Q-weighted Variational Policy Optimization (Ding et al., NeurIPS 2024).

    Build it from `QVPOConfig`. A result of `train()` has RLlib's usual keys; the learner's metrics
    are under `info/learner/default_policy/learner_stats`, the update ledger under `ledger`.
    """

    config_class = QVPOConfig
    policy_class = QVPOTorchPolicy

    def export_policy_model(
        self, export_dir: str, policy_id: str = DEFAULT_POLICY_ID, onnx: int | None = None
    ) -> None:
        """Writes the policy as a bundle, as `qvpo export` does.

        Args:
            export_dir: must not exist.
            onnx: `OPSET` also writes `policy.onnx`; None does not.

        Raises:
            ValueError: `export_dir` exists, another operator set, or no ONNX here.
        """
        if onnx not in (None, OPSET):
            raise ValueError(
                f"onnx={onnx!r} is not allowed: QVPO's ONNX graph uses the operator set {OPSET} "
                f"(onnx={OPSET})."
            )
        out = Path(export_dir).expanduser().absolute()
        export_policy(self.get_policy(policy_id), self.metadata(), out, onnx=onnx is not None)


register_trainable("QVPO", QVPO)
