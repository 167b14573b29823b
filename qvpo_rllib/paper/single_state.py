"""A diffusion policy for one state and a Q that is known: the policy half of a QVPO update.

The toy experiments (the bandit of Figure 2, Theorem 2) have no environment, replay or critic. A
`QVPOLearner` improves the policy on samples and a Q that the experiment gives; its critics are not
used.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from qvpo_rllib.core.errors import NonFiniteError
from qvpo_rllib.core.options import check_name
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.qvpo import ImprovementNoise, QVPOLearner, QVPONetworks
from qvpo_rllib.core.sampler import draw_noise, sample_actions
from qvpo_rllib.core.seeding import Stream, spawn_seed

# The hyperparameters that mean something without critics, environment and targets.
APPLICABLE = (
    "num_policy_samples",
    "num_chosen_samples",
    "num_uniform_samples",
    "entropy_weight",
    "entropy_reduction",
    "q_weights",
    "q_cut",
    "kl_target",
    "diffusion_steps",
    "noise_schedule",
    "vlo_coefficient",
    "hidden",
    "actor_lr",
    "adam_eps",
    "grad_clip",
    "batch_size",
)
OBS_DIM = 1  # one constant dummy observation


def toy_hyperparameters(
    base: Mapping[str, Any], settings: Mapping[str, Any], *, fixed: Sequence[str] = ()
) -> QVPOHyperparameters:
    """Returns a toy's hyperparameters: `settings` (from `--set`) over the experiment's `base`.

    Args:
        fixed: options that `settings` may not name, as the experiment's trainings differ in them.

    Raises:
        ValueError: an unknown option, one without effect here, or a value that is not allowed.
    """
    for name in settings:
        if name in fixed:
            raise ValueError(
                f"{name} cannot be set here: it is what the trainings differ in. Leave it out."
            )
        check_name(name, QVPOHyperparameters)
        if name not in APPLICABLE:
            raise ValueError(
                f"{name} has no effect on this experiment, which has one state and a known Q. "
                f"The options that have: {', '.join(APPLICABLE)}."
            )
    hp = QVPOHyperparameters(**{**base, **settings})
    if hp.entropy_weight == "auto":
        raise ValueError(
            "entropy_weight='auto' is not allowed here, where it is compared: give a number."
        )
    return hp


def applicable(hp: QVPOHyperparameters, *, fixed: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the options that have an effect on a toy, without the `fixed` ones."""
    return {name: getattr(hp, name) for name in APPLICABLE if name not in fixed}


class SingleStatePolicy:
    """π_θ(a) of one state, with its optimiser and its random numbers. On the CPU.

    Args:
        act_dim: A, dimensions of an action in [-1, 1].
        hp: of it only `APPLICABLE` is read; `batch_size` is B, the copies of the state per update.
        seed: of the network's first values and of everything drawn later.
    """

    def __init__(self, act_dim: int, hp: QVPOHyperparameters, *, seed: int) -> None:
        hp = dataclasses.replace(hp, k_target=1, engine="native")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spawn_seed(seed, Stream.NETWORKS))
            networks = QVPONetworks(OBS_DIM, act_dim, hp)
        self.actor, self.schedule = networks.actor, networks.schedule
        self.learner = QVPOLearner(
            networks, hp, seed=spawn_seed(seed, Stream.LEARNER), device="cpu"
        )

    def sample(
        self, num_states: int, num_samples: int, generator: Generator | None = None
    ) -> Tensor:
        """Returns actions [num_states, num_samples, A] in [-1, 1] from the reverse process.

        Args:
            generator: of the noise; the policy's own if None. With another one, a measurement does
                not change the training.
        """
        noise = draw_noise(
            self.schedule.diffusion_steps,
            num_states,
            num_samples,
            self.learner.networks.act_dim,
            self.learner.generator if generator is None else generator,
            torch.device("cpu"),
        )
        obs = torch.zeros(num_states, OBS_DIM)
        return sample_actions(self.actor, self.schedule, obs, noise, self.learner.kernels.sampler)

    def set_learning_rate(self, actor_lr: float) -> None:
        """Sets the learning rate of the updates to come."""
        for group in self.learner.actor_optimizer.param_groups:
            group["lr"] = actor_lr

    def improve(self, samples: Tensor, q: Tensor, noise: ImprovementNoise | None = None) -> float:
        """Takes one step of Adam on Eq. 6 + Eq. 10.

        Args:
            samples: [B, N, A] in [-1, 1], from this policy or from a behaviour policy.
            q: [B, N], their Q.
            noise: drawn from the policy's generator if None.

        Returns:
            The loss. Raises `NonFiniteError` if it is a NaN or infinite.
        """
        num_states = samples.shape[0]
        if noise is None:
            noise = self.learner.draw_improvement_noise(num_states)
        obs = torch.zeros(num_states, OBS_DIM)
        loss = float(self.learner.improve_policy(obs, samples, q, noise)["actor_loss"])
        if not math.isfinite(loss):
            raise NonFiniteError(f"The policy's loss is {loss}. Lower actor_lr.")
        return loss
