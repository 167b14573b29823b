"""`QVPOConfig`: RLlib's `AlgorithmConfig` with every hyperparameter of QVPO."""

from qvpo_rllib.core.hyperparameters import Hyperparameters
from qvpo_rllib.off_policy.config import OffPolicyConfig


class QVPOConfig(OffPolicyConfig):
    """Configuration of `QVPO`.

    `training(...)` takes every field of `qvpo_rllib.core.hyperparameters.Hyperparameters`, which
    documents them; everything else is RLlib's. Example:

        config = QVPOConfig().environment("Ant-v5").training(k_behavior=4)
        algo = config.build_algo()
        result = algo.train()

    One iteration is at least 1,000 env steps (`reporting(min_sample_timesteps_per_iteration=…)`);
    every 10th ends with an evaluation of 10 episodes with the best of `k_eval` actions.
    """

    hyperparameters_class = Hyperparameters
    algorithm_name = "QVPO"

    def __init__(self, algo_class: type | None = None) -> None:
        from qvpo_rllib.algorithm import QVPO

        super().__init__(algo_class or QVPO)
