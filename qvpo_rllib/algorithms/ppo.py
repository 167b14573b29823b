"""PPO as RLlib ships it, with the settings of the paper's comparison.

Ours: running normalisation of observations and rewards, and the comparison switch
`truncation_as_terminal`. RLlib's policy bootstraps the value at a time limit by itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from ray.rllib.algorithms import ppo as rllib
from ray.rllib.algorithms.ppo.ppo_torch_policy import PPOTorchPolicy
from ray.rllib.evaluation.postprocessing import compute_gae_for_sample_batch
from ray.rllib.policy.sample_batch import SampleBatch

from qvpo_rllib.algorithms.normalization import NormalizedNetwork, ReturnTracker
from qvpo_rllib.algorithms.on_rllib import ChoosingPolicy, OnRLlibAlgorithm, OnRLlibConfig
from qvpo_rllib.core.normalization import CLIP, EPSILON, Moments
from qvpo_rllib.core.options import (
    BELOW_ONE,
    COUNT,
    NON_NEGATIVE,
    POSITIVE,
    RUN_DEFAULTS,
    SHARE,
    WIDTHS,
    Options,
    RunDefaults,
    Setting,
    option,
)
from qvpo_rllib.core.options.shared import EnvironmentOptions


@dataclass(frozen=True, kw_only=True)
class PPOHyperparameters(EnvironmentOptions):
    """Table 2's values for PPO; what it leaves open is as in the program that the paper names."""

    presets: ClassVar[Mapping[str, Setting]] = {
        "default": {},
        "light": {"hidden": (64, 64), "lr": 3e-4, "lr_end": 0.0, "entropy_coeff": 0.0},
        "quick": {
            "hidden": (64, 64),
            "lr": 1e-3,
            "entropy_coeff": 0.0,
            "train_batch_size": 500,
            "minibatch_size": 100,
        },
    }
    # An on-policy batch comes from several environments, and takes more env steps to learn from.
    runs: ClassVar[Mapping[str, RunDefaults]] = {
        **RUN_DEFAULTS,
        "light": RunDefaults("Hopper-v5", 200_000, 10_000, 8),
        "default": RunDefaults("HalfCheetah-v5", 1_000_000, 10_000, 8),
    }
    decays: ClassVar[tuple[tuple[str, str], ...]] = (("lr_end", "lr_decay_steps"),)
    losses: ClassVar[tuple[str, ...]] = ("policy_loss", "vf_loss")
    smoke: ClassVar[Setting] = {
        "hidden": [32, 32],
        "train_batch_size": 80,
        "minibatch_size": 40,
        "num_epochs": 2,
    }
    fixed_by_checkpoint: ClassVar[tuple[str, ...]] = (
        *EnvironmentOptions.fixed_by_checkpoint,
        "hidden",
        "activation",
    )

    hidden: tuple[int, ...] = option((256, 256), "hidden layers of actor and critic", range=WIDTHS)
    activation: str = option("tanh", "activation function", choices=("tanh", "relu"))
    lr: float = option(7e-4, "Adam's learning rate", range=POSITIVE)
    lr_end: float | None = option(
        None,
        "none: constant; a number: lr moves linearly to it over lr_decay_steps",
        range=NON_NEGATIVE,
    )
    lr_decay_steps: int | None = option(
        None, "env steps over which lr moves; none: those of the run", range=COUNT
    )
    gamma: float = option(0.99, "discount factor", "γ", range=BELOW_ONE)
    lambda_: float = option(0.95, "of generalised advantage estimation", "λ", range=SHARE)
    clip_param: float = option(0.2, "how far the probability ratio may move", "ε", range=POSITIVE)
    entropy_coeff: float = option(0.01, "weight of the policy's entropy", range=NON_NEGATIVE)
    vf_loss_coeff: float = option(0.5, "weight of the value loss", range=NON_NEGATIVE)
    grad_clip: float | None = option(
        0.5, "largest gradient norm of actor and critic together; none: no clipping", range=POSITIVE
    )
    train_batch_size: int = option(2048, "env steps between two rounds of updates", range=COUNT)
    minibatch_size: int = option(256, "transitions per update", range=COUNT)
    num_epochs: int = option(10, "passes through the batch", range=COUNT)
    normalize_observations: bool = option(True, "by running mean and deviation, clipped at 10")
    normalize_rewards: bool = option(
        True, "by the running deviation of the discounted return, clipped at 10"
    )
    truncation_as_terminal: bool = option(
        False, "true: a time limit ends the return (a known error); false: the value bootstraps it"
    )

    def check(self) -> None:
        self.require(
            "minibatch_size",
            self.minibatch_size <= self.train_batch_size,
            f"at most train_batch_size={self.train_batch_size}",
        )


class PPOPolicy(ChoosingPolicy, PPOTorchPolicy):  # type: ignore[misc]
    """RLlib's policy; rewards are normalised, and their moments kept for the training step."""

    def __init__(self, observation_space: Any, action_space: Any, config: dict[str, Any]) -> None:
        self._returns: ReturnTracker | None = None  # RLlib first tries itself out on zeros
        super().__init__(observation_space, action_space, config)
        self._returns = ReturnTracker(config["gamma"])
        self._forget_moments()

    def _forget_moments(self) -> None:
        self._obs_moments = Moments.none(int(np.prod(self.observation_space.shape)))
        self._return_moments = Moments.none(1)

    def restore_options(self) -> None:
        self.on_global_var_update({"timestep": self.global_timestep})  # the learning rate moves
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.cur_lr

    def pop_moments(self) -> tuple[Moments, Moments]:
        """Those of the observations and discounted returns since the last call."""
        found = self._obs_moments, self._return_moments
        self._forget_moments()
        return found

    def add_moments(self, observations: Moments, returns: Moments) -> None:
        self.model.observations.add(observations)
        self.model.returns.add(returns)

    def postprocess_trajectory(
        self, sample_batch: SampleBatch, other_agent_batches: Any = None, episode: Any = None
    ) -> SampleBatch:
        """Advantages and value targets for a part of one episode."""
        if self._returns is not None:
            self._normalize(sample_batch)
        if self.config["truncation_as_terminal"] and sample_batch[SampleBatch.TRUNCATEDS][-1]:
            ended = np.array(sample_batch[SampleBatch.TERMINATEDS])
            ended[-1] = True
            sample_batch[SampleBatch.TERMINATEDS] = ended
        with torch.no_grad():
            return compute_gae_for_sample_batch(self, sample_batch, other_agent_batches, episode)

    def _normalize(self, batch: SampleBatch) -> None:
        assert self._returns is not None
        ended = bool(batch[SampleBatch.TERMINATEDS][-1] or batch[SampleBatch.TRUNCATEDS][-1])
        rewards = np.asarray(batch[SampleBatch.REWARDS])
        sums = self._returns.follow(int(batch[SampleBatch.EPS_ID][0]), rewards, ended)
        self._obs_moments = self._obs_moments.plus(Moments.of(batch[SampleBatch.OBS]))
        self._return_moments = self._return_moments.plus(Moments.of(sums[:, None]))
        if self.config["normalize_rewards"]:
            known = self.model.returns.read()
            # The very first batch has no statistics but its own.
            variance = (known if known.number else self._return_moments).variance[0]
            scaled = rewards / np.sqrt(variance + EPSILON)
            batch[SampleBatch.REWARDS] = np.clip(scaled, -CLIP, CLIP).astype(np.float32)


class RivalPPOConfig(OnRLlibConfig, rllib.PPOConfig):  # type: ignore[misc]
    """`training(...)` takes every field of `PPOHyperparameters`."""

    hyperparameters_class: ClassVar[type[Options]] = PPOHyperparameters
    algorithm_name = "PPO"
    honoured_too = OnRLlibConfig.honoured_too | {"batch_mode"}

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class)
        self.use_kl_loss = False
        self.kl_coeff = 0.0
        self.vf_clip_param = float("inf")

    def derive(self) -> dict[str, Any]:
        hp: PPOHyperparameters = self.hyperparameters()
        decays = hp.lr_end is not None and hp.lr_decay_steps is not None
        return {
            "model": {
                **self.model,
                "custom_model": NormalizedNetwork,
                "custom_model_config": {"normalize_observations": hp.normalize_observations},
                "fcnet_hiddens": list(hp.hidden),
                "fcnet_activation": hp.activation,
                "free_log_std": True,
                "vf_share_layers": False,
            },
            "lr_schedule": [[0, hp.lr], [hp.lr_decay_steps, hp.lr_end]] if decays else None,
        }


class RivalPPO(OnRLlibAlgorithm, rllib.PPO):  # type: ignore[misc]
    """Build it from `RivalPPOConfig`."""

    config_class = RivalPPOConfig
    policy_class = PPOPolicy

    def training_step(self) -> dict[str, Any]:
        results = super().training_step()
        group, policy = self.env_runner_group, self.get_policy()
        remote = group.num_remote_env_runners() > 0
        for moments in group.foreach_env_runner(_pop_moments, local_env_runner=not remote):
            policy.add_moments(*moments)
        if remote:
            group.sync_weights(policies=["default_policy"])
        return results


def _pop_moments(worker: Any) -> tuple[Moments, Moments]:
    found: tuple[Moments, Moments] = worker.get_policy().pop_moments()
    return found
