"""A diffusion policy for one state and a Q that is known: the policy half of a QVPO update.

The toy experiments (the bandit of Figure 2, Theorem 2) have no environment, replay or critic. What
is left of an update, weights, loss and optimiser step, is made of the parts that train QVPO;
`tests/test_single_state.py` holds it against `QVPOLearner.update`, number by number.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from qvpo_rllib.core import losses
from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.errors import NonFiniteError
from qvpo_rllib.core.hyperparameters import QVPOHyperparameters
from qvpo_rllib.core.losses import actor_objective
from qvpo_rllib.core.networks import NoisePredictor
from qvpo_rllib.core.options import check_name
from qvpo_rllib.core.qvpo import Q_STATISTICS_RATE
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
    return QVPOHyperparameters(**{**base, **settings})


def applicable(hp: QVPOHyperparameters, *, fixed: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the options that have an effect on a toy, without the `fixed` ones."""
    return {name: getattr(hp, name) for name in APPLICABLE if name not in fixed}


class ImprovementNoise(NamedTuple):
    """Every random number of one `improve`, for B states, k chosen and N_e uniform actions."""

    uniform: Tensor  # [B, N_e, A] uniform in [-1, 1]
    step: Tensor  # [B·(k + N_e)] int64 in [0, T): the diffusion step of each trained row
    forward: Tensor  # [B·(k + N_e), A] standard normal: the noise to be predicted


class SingleStatePolicy:
    """π_θ(a) of one state, with its optimiser and its random numbers. On the CPU.

    Args:
        act_dim: A, dimensions of an action in [-1, 1].
        hp: of it only `APPLICABLE` is read; `batch_size` is B, the copies of the state per update.
        seed: of the network's first values and of everything drawn later.
    """

    def __init__(self, act_dim: int, hp: QVPOHyperparameters, *, seed: int) -> None:
        self.act_dim, self.hp = act_dim, hp
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spawn_seed(seed, Stream.NETWORKS))
            self.actor = NoisePredictor(OBS_DIM, act_dim, hp.hidden, hp.diffusion_steps)
        self.schedule = NoiseSchedule(hp.noise_schedule, hp.diffusion_steps)
        self.optimizer = torch.optim.Adam(
            self.actor.parameters(), lr=hp.actor_lr, eps=hp.adam_eps, fused=True
        )
        self.generator = Generator().manual_seed(spawn_seed(seed, Stream.LEARNER))
        self.q_mean, self.q_std = torch.zeros(()), torch.ones(())

    def sample(
        self, num_states: int, num_samples: int, generator: Generator | None = None
    ) -> Tensor:
        """Returns actions [num_states, num_samples, A] in [-1, 1] from the reverse process.

        Args:
            generator: of the noise; the policy's own if None. With another one, a measurement does
                not change the training.
        """
        noise = draw_noise(
            self.hp.diffusion_steps,
            num_states,
            num_samples,
            self.act_dim,
            self.generator if generator is None else generator,
            torch.device("cpu"),
        )
        return sample_actions(self.actor, self.schedule, self._obs(num_states), noise)

    def draw_improvement_noise(self, num_states: int) -> ImprovementNoise:
        hp, generator = self.hp, self.generator
        rows = num_states * (hp.num_chosen_samples + hp.num_uniform_samples)
        uniform = torch.empty(num_states, hp.num_uniform_samples, self.act_dim)
        return ImprovementNoise(
            uniform=uniform.uniform_(-1, 1, generator=generator),
            step=torch.randint(hp.diffusion_steps, (rows,), generator=generator),
            forward=torch.randn(rows, self.act_dim, generator=generator),
        )

    def improve(self, samples: Tensor, q: Tensor, noise: ImprovementNoise | None = None) -> float:
        """One step of Adam on Eq. 6 + Eq. 10.

        Args:
            samples: [B, N, A] in [-1, 1], from this policy or from a behaviour policy.
            q: [B, N], their Q.
            noise: drawn from the policy's generator if None.

        Returns:
            The loss. Raises `NonFiniteError` if it is a NaN or infinite.
        """
        hp, num_states = self.hp, samples.shape[0]
        if noise is None:
            noise = self.draw_improvement_noise(num_states)
        self.q_mean.lerp_(q.mean(), Q_STATISTICS_RATE)
        self.q_std.lerp_(q.std(correction=0), Q_STATISTICS_RATE)
        chosen_q, chosen = losses.best_of(q, samples, hp.num_chosen_samples)
        weights = losses.q_weights(
            hp.q_weights,
            chosen_q,
            q.mean(dim=1),
            q_cut=hp.q_cut,
            q_mean=self.q_mean,
            q_std=self.q_std,
        )
        loss, _, _ = actor_objective(
            self.actor,
            self.schedule,
            self._obs(num_states),
            chosen,
            weights,
            noise.uniform,
            losses.entropy_weights(weights, hp.entropy_weight),
            noise.step,
            noise.forward,
            hp.entropy_reduction,
            hp.vlo_coefficient,
        )
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        limit = float("inf") if hp.grad_clip is None else hp.grad_clip
        nn.utils.clip_grad_norm_(self.actor.parameters(), limit, foreach=True)
        self.optimizer.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(f"The policy's loss is {value}. Lower actor_lr.")
        return value

    def _obs(self, count: int) -> Tensor:
        return torch.zeros(count, OBS_DIM)
