"""`QVPO`: the RLlib algorithm."""

from ray.tune.registry import register_trainable

from qvpo_rllib.config import QVPOConfig
from qvpo_rllib.off_policy.algorithm import OffPolicyAlgorithm
from qvpo_rllib.policy import QVPOTorchPolicy


class QVPO(OffPolicyAlgorithm):
    """Q-weighted Variational Policy Optimization (Ding et al., NeurIPS 2024).

    Build it from `QVPOConfig`. A result of `train()` has RLlib's usual keys; the learner's metrics
    are under `info/learner/default_policy/learner_stats`, the update ledger under `ledger`.
    """

    config_class = QVPOConfig
    policy_class = QVPOTorchPolicy


register_trainable("QVPO", QVPO)
