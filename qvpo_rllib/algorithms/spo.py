"""SPO, Simple Policy Optimization: PPO whose clipped surrogate is a smooth one.

Everything else (advantages, normalisation, minibatches, value loss) is PPO's, see `ppo`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.policy.sample_batch import SampleBatch
from ray.rllib.utils.torch_utils import explained_variance
from torch import Tensor

from qvpo_rllib.algorithms.ppo import PPOHyperparameters, PPOPolicy, RivalPPO, RivalPPOConfig
from qvpo_rllib.core.options import Options, Setting, with_default


def spo_loss(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """-mean[A r - |A| (r - 1)² / (2 ε)], a scalar.

    Its gradient vanishes where r = 1 + sign(A) ε, and beyond that it pulls the ratio back, where
    PPO's clipped surrogate is flat.

    Args:
        ratio: π(a|s) / π_old(a|s), [B] float32.
        advantage: A, [B] float32.
        epsilon: ε.
    """
    penalty = advantage.abs() * (ratio - 1).square() / (2 * epsilon)
    return -(advantage * ratio - penalty).mean()


@dataclass(frozen=True, kw_only=True)
class SPOHyperparameters(PPOHyperparameters):
    """Table 2's values for SPO."""

    presets: ClassVar[Mapping[str, Setting]] = {
        "default": {},
        # Its updates end within a ratio of 1 ± ε: what it learns depends on the number of batches.
        "light": {"lr_end": None, "train_batch_size": 1024, "minibatch_size": 64},
        "quick": {"lr": 1e-3, "lr_end": None, "train_batch_size": 500, "minibatch_size": 100},
    }

    hidden: tuple[int, ...] = with_default(PPOHyperparameters, "hidden", (64, 64))
    lr: float = with_default(PPOHyperparameters, "lr", 3e-4)
    lr_end: float | None = with_default(PPOHyperparameters, "lr_end", 0.0)
    entropy_coeff: float = with_default(PPOHyperparameters, "entropy_coeff", 0.0)


class SPOPolicy(PPOPolicy):
    """PPO's policy with SPO's loss."""

    def loss(self, model: Any, dist_class: Any, train_batch: SampleBatch) -> Tensor:
        logits, _ = model(train_batch)
        distribution = dist_class(logits, model)
        log_ratio = (
            distribution.logp(train_batch[SampleBatch.ACTIONS])
            - train_batch[SampleBatch.ACTION_LOGP]
        )
        ratio = log_ratio.exp()
        policy_loss = spo_loss(
            ratio, train_batch[Postprocessing.ADVANTAGES], self.config["clip_param"]
        )
        value, target = model.value_function(), train_batch[Postprocessing.VALUE_TARGETS]
        value_loss = (value - target).square().mean()
        entropy = distribution.entropy().mean()
        total: Tensor = (
            policy_loss
            + self.config["vf_loss_coeff"] * value_loss
            - self.config["entropy_coeff"] * entropy
        )
        # By the names that RLlib's PPO reports; kl is Schulman's estimate of KL(old, new).
        model.tower_stats |= {
            "total_loss": total,
            "mean_policy_loss": policy_loss,
            "mean_vf_loss": value_loss,
            "vf_explained_var": explained_variance(target, value),
            "mean_entropy": entropy,
            "mean_kl_loss": torch.mean(ratio - 1 - log_ratio),
        }
        return total


class SPOConfig(RivalPPOConfig):
    """`training(...)` takes every field of `SPOHyperparameters`."""

    hyperparameters_class: ClassVar[type[Options]] = SPOHyperparameters
    algorithm_name = "SPO"


class SPO(RivalPPO):
    """Build it from `SPOConfig`."""

    config_class = SPOConfig
    policy_class = SPOPolicy
