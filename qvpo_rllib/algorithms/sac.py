"""SAC as RLlib ships it, with the settings of the paper's comparison.

Ours: the replay (`columnar_buffer`), a given number of updates per env step, uniformly random
actions before the first update, the log-probability of saturated actions (`SquashedGaussian`).
RLlib's loss bootstraps at a time limit by itself.

Deviation: RLlib's critic loss is Huber's with a threshold of 1, not the squared error.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from ray.rllib.algorithms import sac as rllib
from ray.rllib.algorithms.sac.sac_torch_model import SACTorchModel
from ray.rllib.algorithms.sac.sac_torch_policy import SACTorchPolicy
from ray.rllib.models.torch.torch_action_dist import TorchSquashedGaussian
from ray.rllib.utils.exploration import StochasticSampling
from torch import Tensor, rand_like
from torch.nn import functional

from qvpo_rllib.algorithms.on_rllib import ChoosingPolicy, OnRLlibAlgorithm, OnRLlibConfig
from qvpo_rllib.algorithms.shared_options import LIGHT, QUICK
from qvpo_rllib.core.normalization import Moments, RunningMoments
from qvpo_rllib.core.options import (
    BELOW_ONE,
    COUNT,
    NON_NEGATIVE_COUNT,
    POSITIVE,
    SHARE,
    WIDTHS,
    Options,
    Setting,
    option,
)
from qvpo_rllib.core.options.shared import TINY_REPLAY, EnvironmentOptions
from qvpo_rllib.core.seeding import Stream, spawn_seed

# RLlib takes the classes by their names.
BUFFER = "qvpo_rllib.algorithms.columnar_buffer.ColumnarBuffer"
EXPLORATION = "qvpo_rllib.algorithms.sac.UniformWarmup"


@dataclass(frozen=True, kw_only=True)
class SACHyperparameters(EnvironmentOptions):
    """Table 2's values for SAC."""

    presets: ClassVar[Mapping[str, Setting]] = {
        "default": {},
        "light": LIGHT | {"auto_alpha": True},
        "quick": QUICK | {"tau": 0.02, "auto_alpha": True},
    }
    smoke: ClassVar[Setting] = TINY_REPLAY
    fixed_by_checkpoint: ClassVar[tuple[str, ...]] = (
        *EnvironmentOptions.fixed_by_checkpoint,
        "hidden",
        "activation",
        "normalize_observations",
    )

    hidden: tuple[int, ...] = option((256, 256), "hidden layers of actor and critics", range=WIDTHS)
    activation: str = option("relu", "activation function", choices=("relu", "tanh"))
    actor_lr: float = option(3e-4, "Adam's learning rate for the actor", range=POSITIVE)
    critic_lr: float = option(3e-4, "Adam's learning rate for the critics", range=POSITIVE)
    grad_clip: float | None = option(
        None, "largest gradient norm of each network; none: no clipping", range=POSITIVE
    )
    alpha: float = option(0.2, "entropy coefficient; with auto_alpha its first value", "α",
                          range=POSITIVE)  # fmt: skip
    auto_alpha: bool = option(
        False, "true: alpha is learnt, towards an entropy of minus the action dimensions"
    )
    alpha_lr: float = option(3e-4, "Adam's learning rate for a learnt alpha", range=POSITIVE)
    gamma: float = option(0.99, "discount factor", "γ", range=BELOW_ONE)
    tau: float = option(0.005, "rate of the targets' moving average, every update", "τ",
                        range=SHARE)  # fmt: skip
    batch_size: int = option(256, "transitions per update", range=COUNT)
    replay_capacity: int = option(1_000_000, "transitions the replay holds", range=COUNT)
    warmup_steps: int = option(
        10_000, "env steps of uniformly random actions before any update", range=NON_NEGATIVE_COUNT
    )
    update_ratio: float = option(1.0, "updates per env step after the warm-up", range=POSITIVE)
    truncation_as_terminal: bool = option(
        False, "true: a time limit ends the return (a known error); false: the value bootstraps it"
    )
    normalize_observations: bool = option(
        False, "by running mean and deviation of what training observes, clipped at 10"
    )

    def check(self) -> None:
        self.require(
            "replay_capacity",
            self.replay_capacity >= max(self.batch_size, self.warmup_steps),
            f"at least batch_size={self.batch_size} and warmup_steps={self.warmup_steps}",
        )


class UniformWarmup(StochasticSampling):  # type: ignore[misc]
    """Uniform actions in [-1, 1] for the first `warmup_steps`, then the policy's samples.

    RLlib's own draws from the environment's box and scales that once more.
    """

    def __init__(self, action_space: Any, *, warmup_steps: int, **arguments: Any) -> None:
        super().__init__(action_space, **arguments)
        self.warmup_steps = warmup_steps

    def get_exploration_action(
        self, *, action_distribution: Any, timestep: Any = None, explore: bool = True
    ) -> tuple[Any, Any]:
        action, log_probability = super().get_exploration_action(
            action_distribution=action_distribution, timestep=timestep, explore=explore
        )
        if explore and self.last_timestep < self.warmup_steps:
            action = 2 * rand_like(action) - 1
        return action, log_probability


class SquashedGaussian(TorchSquashedGaussian):  # type: ignore[misc]
    """tanh(z), z normal: RLlib's, with the log-probability of its own samples exact.

    RLlib takes z back from the action by atanh, which ends at 7.25. Where the mean is far beyond,
    it finds a density near 0 and an entropy of hundreds of nats, and the critics learn to seek it.
    """

    def sample(self) -> Tensor:
        return self._keep(self.dist.rsample())

    def deterministic_sample(self) -> Tensor:
        return self._keep(self.dist.mean)

    def _keep(self, z: Tensor) -> Tensor:
        action: Tensor = self._squash(z)
        self._unsquashed, self.last_sample = z, action
        return action

    def logp(self, x: Tensor) -> Tensor:
        """log p(x), [B], of actions [B, A] in [-1, 1]."""
        if x is not self.last_sample:
            found: Tensor = super().logp(x)
            return found
        z = self._unsquashed
        log_slope = 2 * (math.log(2) - z - functional.softplus(-2 * z))  # log(1 - tanh² z)
        exact: Tensor = (self.dist.log_prob(z) - log_slope).sum(dim=-1)
        return exact


class NormalizedModel(SACTorchModel):  # type: ignore[misc]
    """RLlib's networks on normalised observations; actor and critics all take what it returns."""

    def __init__(self, obs_space: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(obs_space, *arguments, **named)
        self.observations = RunningMoments(math.prod(obs_space.shape))

    def forward(
        self, input_dict: dict[str, Tensor], state: list[Tensor], seq_lens: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        return self.observations.standardize(input_dict["obs"].float()), state


class SACPolicy(ChoosingPolicy, SACTorchPolicy):  # type: ignore[misc]
    """RLlib's policy with this distribution."""

    dist_class = SquashedGaussian

    def observe(self, obs: Tensor) -> None:
        """Adds observations of training, [B, O], to the moments that normalise them."""
        self.model.observations.add(Moments.of(obs))
        self._share_moments()

    def update_target(self, tau: float | None = None) -> None:
        super().update_target(tau)
        if isinstance(self.model, NormalizedModel):
            self._share_moments()  # RLlib has moved the target's towards them by tau

    def _share_moments(self) -> None:
        self.target_model.observations.load_state_dict(self.model.observations.state_dict())

    def restore_options(self) -> None:
        rates = self.config["optimization"]
        for name, optimizers in (
            ("actor", [self.actor_optim]),
            ("critic", self.critic_optims),
            ("entropy", [self.alpha_optim]),
        ):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rates[f"{name}_learning_rate"]
        if not self.config["auto_alpha"]:
            with torch.no_grad():
                self.model.log_alpha.fill_(math.log(self.config["alpha"]))


class RivalSACConfig(OnRLlibConfig, rllib.SACConfig):  # type: ignore[misc]
    """`training(...)` takes every field of `SACHyperparameters`."""

    hyperparameters_class: ClassVar[type[Options]] = SACHyperparameters
    algorithm_name = "SAC"

    def derive(self) -> dict[str, Any]:
        hp: SACHyperparameters = self.hyperparameters()
        networks: dict[str, Any] = {
            "fcnet_hiddens": list(hp.hidden),
            "fcnet_activation": hp.activation,
        }
        return {
            "model": {
                **self.model,
                "custom_model": NormalizedModel if hp.normalize_observations else None,
            },
            "q_model_config": {**self.q_model_config, **networks},
            "policy_model_config": {**self.policy_model_config, **networks},
            "initial_alpha": hp.alpha,
            "optimization": {
                "actor_learning_rate": hp.actor_lr,
                "critic_learning_rate": hp.critic_lr,
                "entropy_learning_rate": hp.alpha_lr if hp.auto_alpha else 0.0,
            },
            "train_batch_size": hp.batch_size,
            "_train_batch_size_per_learner": hp.batch_size,
            "num_steps_sampled_before_learning_starts": hp.warmup_steps,
            "exploration_config": {"type": EXPLORATION, "warmup_steps": hp.warmup_steps},
            "store_buffer_in_checkpoints": self.replay_in_checkpoints,
            "replay_buffer_config": {
                "type": BUFFER,
                "capacity": hp.replay_capacity,
                "batch_size": hp.batch_size,
                "seed": spawn_seed(self.seed, Stream.REPLAY),
                "truncation_as_terminal": hp.truncation_as_terminal,
            },
            "training_intensity": self._training_intensity(hp),
        }

    def _training_intensity(self, hp: SACHyperparameters) -> float:
        """RLlib's name for transitions trained on per transition sampled.

        It divides by one worker more than there are where all are remote: that is undone here.
        """
        workers = max(1, int(self.num_env_runners))
        together = workers * self.num_envs_per_env_runner
        updates = hp.update_ratio * together
        if round(max(updates, 1 / updates)) != max(updates, 1 / updates):
            raise ValueError(
                f"update_ratio={hp.update_ratio} is not allowed with {together} environments: "
                f"they step together, and their updates ({updates:g}) must be a whole number, or "
                "one in a whole number of such steps. Change update_ratio or "
                "num_envs_per_env_runner."
            )
        return hp.batch_size * hp.update_ratio * workers / (int(self.num_env_runners) + 1)


class RivalSAC(OnRLlibAlgorithm, rllib.SAC):  # type: ignore[misc]
    """Build it from `RivalSACConfig`."""

    config_class = RivalSACConfig
    policy_class = SACPolicy

    def training_step(self) -> dict[str, Any]:
        added = self.local_replay_buffer.num_transitions
        results = super().training_step()
        if not self.config.normalize_observations:
            return results
        # After the updates, so that a step learns by the moments that its actions were drawn by.
        for part in self.local_replay_buffer.since(added):
            self.get_policy().observe(part.obs)
        if self.env_runner_group.num_remote_env_runners() > 0:
            self.env_runner_group.sync_weights(policies=["default_policy"])
        return results
