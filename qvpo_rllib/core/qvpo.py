"""QVPO's networks and learner: one update of actor, critics and targets."""

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from qvpo_rllib.core import losses
from qvpo_rllib.core.backends.native import PackedCritic
from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.engine import SecondStream, matmul_precision
from qvpo_rllib.core.extensions.entropy import TargetEntropy
from qvpo_rllib.core.extensions.learnt import (
    ENTROPY_WEIGHT_START,
    LearntScale,
    follow_spread,
)
from qvpo_rllib.core.extensions.refinement import Refinement
from qvpo_rllib.core.learner import ActorCritic, OffPolicyLearner
from qvpo_rllib.core.networks import NoisePredictor, TwinQ, new_critic
from qvpo_rllib.core.normalization import RunningMoments
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.options.shared import DiffusionHyperparameters
from qvpo_rllib.core.replay import ReplayBuffer, Transitions
from qvpo_rllib.core.sampler import Chain, draw_noise, min_q, sample_actions

if TYPE_CHECKING:
    from qvpo_rllib.core.backends.fused import FusedSampler

# Rate of the running mean and standard deviation by which `qexp` normalises Q (alpha_mean and
# alpha_std in the authors' program).
Q_STATISTICS_RATE = 1e-3
# `nearest_sample_distance` is taken of so many states, since each costs N_d² distances. They are
# the batch's first: its states are in no order.
DISTANCE_STATES = 16
POLICY_METRICS = (
    "actor_loss",
    "entropy_loss",
    "denoising_error",
    "actor_grad_norm",
    "value_mean",
    "advantage_mean",
    "q_weight_mean",
    "q_weight_zero_share",
    "sample_std",
    "nearest_sample_distance",
)
# Those that come with a word of an option.
EXTRA_METRICS = {
    "softmax": ("q_weight_kl",),
    "gradient": ("refinement_gain",),
    "guidance": ("refinement_gain",),
}


class UpdateNoise(NamedTuple):
    """Every random number of one update: tests feed another implementation the same ones."""

    target: Tensor  # [T, B, K_t, A] standard normal: the TD target's actions
    policy: Tensor  # [T, B, N_d, A] standard normal: the policy samples
    uniform: Tensor  # [B, N_e, A] uniform in [-1, 1]
    # k is the number of trained samples per state.
    step: Tensor  # [B·(k + N_e)] int64 in [0, T): the diffusion step of each trained row
    forward: Tensor  # [B·(k + N_e), A] standard normal: the noise to be predicted
    entropy: Tensor  # [T, B, M, A] standard normal: ln p̂ of the TD target's actions; M may be 0


class ImprovementNoise(NamedTuple):
    """Three of `UpdateNoise`: what training the policy on given samples takes."""

    uniform: Tensor
    step: Tensor
    forward: Tensor


class QVPONetworks(ActorCritic):
    """Diffusion actor, twin critics, a target of each, and the noise schedule."""

    actor: NoisePredictor
    critic: TwinQ
    target_actor: NoisePredictor
    target_critic: TwinQ

    def __init__(self, obs_dim: int, act_dim: int, hp: DiffusionHyperparameters) -> None:
        actor = NoisePredictor(obs_dim, act_dim, hp.hidden, hp.diffusion_steps)
        has_choice = isinstance(hp, QVPOHyperparameters)  # the rivals have twins
        critic = (
            new_critic(obs_dim, act_dim, hp) if has_choice else TwinQ(obs_dim, act_dim, hp.hidden)
        )
        super().__init__(actor, critic, act_dim)
        self.schedule = NoiseSchedule(hp.noise_schedule, hp.diffusion_steps)
        if hp.normalize_observations:
            self.observations = RunningMoments(obs_dim)


class QVPOLearner(OffPolicyLearner[QVPONetworks, QVPOHyperparameters, UpdateNoise]):
    """One QVPO learner on one device; see `OffPolicyLearner` for its arguments.

    Raises:
        ValueError: the device cannot do what the hyperparameters ask for, or `k_target` is None.
    """

    def __init__(
        self,
        networks: QVPONetworks,
        hp: QVPOHyperparameters,
        *,
        seed: int,
        device: torch.device | str,
    ) -> None:
        if hp.k_target is None:
            raise ValueError("k_target is not resolved: give a number (see Options.resolve).")
        device = torch.device(device)
        for name in ("sampling_precision", "ranking_precision"):
            if getattr(hp, name) == "tf32" and device.type != "cuda":
                raise ValueError(
                    f"{name}='tf32' needs an NVIDIA GPU; the learner is on {str(device)!r}. Use "
                    "'fp32'; sampling_precision has 'bf16' too, which CPUs know."
                )
        self.entropy_weight = torch.full((), ENTROPY_WEIGHT_START, device=device)
        self.q_temperature = LearntScale(1.0, device)
        self.refinement = Refinement(device)
        self.target_entropy = TargetEntropy(device)
        self.q_mean = torch.zeros((), device=device)
        self.q_std = torch.ones((), device=device)
        # Those of the last update of the policy, which `policy_interval` - 1 updates repeat.
        self.policy_metrics: dict[str, Tensor] = {}
        super().__init__(networks, hp, seed=seed, device=device)
        # On a CPU without AVX512-BF16 PyTorch's own products take three times as long in bfloat16.
        self._fell_back = self.engine == "eager" != hp.engine and device.type == "cpu"
        self._beside = SecondStream(on=self.engine == "cuda_graph" and device.type == "cuda")
        self.fused: FusedSampler | None = None
        if hp.engine == "auto" and device.type == "cuda":
            # Not at the head: Triton, which no CPU needs, takes a third of a second to import.
            from qvpo_rllib.core.backends.fused import fused_sampler

            nets = self.networks
            self.fused = fused_sampler(nets.actor, nets.critic, nets.schedule, hp, device)

    @property
    def cycle(self) -> int:
        return self.hp.policy_interval

    def is_native(self) -> bool:
        hp = self.hp
        by_pytorch = hp.target_refinement == "guidance" or hp.entropy_in_target
        return self.engine == "native" and not by_pytorch

    def graph_constants(self, hp: QVPOHyperparameters) -> QVPOHyperparameters:
        return dataclasses.replace(
            super().graph_constants(hp),
            entropy_weight="auto" if hp.entropy_weight == "auto" else 0.0,
            entropy_weight_end=None,
            entropy_weight_floor=0.0,
        )

    def configure(self, hp: QVPOHyperparameters) -> None:
        extra = [EXTRA_METRICS.get(word, ()) for word in (hp.q_weights, hp.target_refinement)]
        zero = torch.zeros((), device=self.device)
        self.policy_metrics = {
            name: self.policy_metrics.get(name, zero.clone())
            for name in itertools.chain(POLICY_METRICS, *extra)
        }
        super().configure(hp)

    def set_env_steps(self, env_steps: int) -> None:
        """Moves ω_ent to its value after `env_steps` environment steps."""
        super().set_env_steps(env_steps)
        scheduled = self.hp.entropy_weight_at(env_steps)
        if scheduled is not None:
            self.entropy_weight.fill_(scheduled)

    def settings_in_force(self) -> dict[str, float]:
        found = {"entropy_weight": float(self.entropy_weight)}
        if self.hp.q_weights == "softmax":
            found["q_temperature"] = float(self.q_temperature.value)
        if self.hp.entropy_in_target != 0:
            found["entropy_in_target"] = float(self.target_entropy.weight_of(self.hp))
        return found

    def draw_update_noise(self, batch_size: int) -> UpdateNoise:
        hp, act_dim = self.hp, self.networks.act_dim
        assert hp.k_target is not None
        target, policy = (
            draw_noise(hp.diffusion_steps, batch_size, n, act_dim, self.generator, self.device)
            for n in (hp.k_target, hp.num_policy_samples)
        )
        improvement = self.draw_improvement_noise(batch_size)
        num_noises = 0 if hp.entropy_in_target == 0 else hp.entropy_noises
        entropy = draw_noise(
            hp.diffusion_steps, batch_size, num_noises, act_dim, self.generator, self.device
        )
        return UpdateNoise(target, policy, *improvement, entropy)

    def draw_improvement_noise(self, batch_size: int) -> ImprovementNoise:
        """Returns the random numbers of one `improve_policy`, from the learner's generator."""
        hp, act_dim, device, generator = self.hp, self.networks.act_dim, self.device, self.generator
        rows = batch_size * (hp.num_trained_samples + hp.num_uniform_samples)
        uniform = torch.empty(batch_size, hp.num_uniform_samples, act_dim, device=device)
        return ImprovementNoise(
            uniform=uniform.uniform_(-1, 1, generator=generator),
            step=torch.randint(hp.diffusion_steps, (rows,), generator=generator, device=device),
            forward=torch.randn(rows, act_dim, generator=generator, device=device),
        )

    def update_from(self, replay: ReplayBuffer) -> dict[str, Tensor]:
        critic_batch = self.draw(replay)
        if self.hp.update_order == "policy_then_critic":
            return self.update(critic_batch)
        return self.update(critic_batch, self.draw(replay))

    def update(
        self,
        critic_batch: Transitions,
        policy_batch: Transitions | None = None,
        noise: UpdateNoise | None = None,
    ) -> dict[str, Tensor]:
        """Does one update of critics, actor and targets (Algorithm 1, lines 4 to 11).

        The actor takes a step if the number of this update is a multiple of `policy_interval`.

        Args:
            critic_batch: transitions for the TD loss.
            policy_batch: transitions whose states train the policy; the same batch if None.
            noise: drawn from the learner's generator if None.

        Returns:
            Detached scalar tensors on the device; see the table of metrics in qvpo_rllib/README.md.
        """
        if policy_batch is None:
            policy_batch = critic_batch
        batch_size = critic_batch.reward.shape[0]
        if policy_batch.reward.shape[0] != batch_size:
            raise ValueError(
                f"The two batches must be of one size, not {batch_size} and "
                f"{policy_batch.reward.shape[0]}."
            )
        if noise is None:
            noise = self.draw_update_noise(batch_size)
        nets, hp, obs = self.networks, self.hp, policy_batch.obs
        critic_first = hp.update_order == "critic_then_policy"
        # Whether the target's actions come from an actor that this update has not changed yet.
        beside = critic_first or hp.target_actor
        metrics: dict[str, Tensor] = {}
        policy = Chain(nets.actor, obs, noise.policy)
        with_policy = (self.num_updates + 1) % hp.policy_interval == 0
        samples = next_samples = None
        if beside and with_policy and self.fused is not None and self.fused.samples:
            samples, next_samples = self.fused.sample(
                policy, self._target_chain(critic_batch, noise)
            )
        if beside:
            with self._beside.fork():
                next_q = self._next_q(critic_batch, noise, next_samples)
                if critic_first:
                    metrics |= self.fit_critics(critic_batch, next_q)
        if with_policy and samples is None:
            samples = self._sample_actions(policy)  # [B, N_d, A]
        if critic_first:
            self._beside.join()
        found = self.policy_metrics
        if samples is not None:
            plain = hp.target_refinement == "none"
            critic = nets.critic if plain else self.kernels.frozen(nets.critic)
            q = self._rank(critic, obs, samples)
            found = self.improve_policy(obs, samples, q, noise, critic)
            if hp.policy_interval > 1:
                kept = self.policy_metrics
                torch._foreach_copy_([*kept.values()], [found[name] for name in kept])
        metrics |= {name: found[name] for name in self.policy_metrics}
        if not critic_first:
            self._beside.join()
            if not beside:
                next_q = self._next_q(critic_batch, noise)
            metrics |= self.fit_critics(critic_batch, next_q)
        self.move_target(nets.target_actor, nets.actor)
        self.move_target(nets.target_critic, nets.critic)
        if hp.entropy_in_target != 0:
            metrics["policy_entropy"] = self.target_entropy.estimate.clone()
        return metrics

    def _target_chain(self, batch: Transitions, noise: UpdateNoise) -> Chain:
        nets = self.networks
        actor = nets.target_actor if self.hp.target_actor else nets.actor
        return Chain(actor, batch.next_obs, noise.target)

    def _next_q(
        self, batch: Transitions, noise: UpdateNoise, samples: Tensor | None = None
    ) -> Tensor:
        """Returns the TD target's value of the next states, [B], by samples [B, K_t, A].

        Of quantile critics it is quantiles, [m, B].
        """
        chain = self._target_chain(batch, noise)
        if samples is None:
            samples = self._sample_actions(chain)
        critic, kernels = self.networks.target_critic, self.kernels
        next_q, action = critic.target(
            *(batch.next_obs, samples),
            lambda: min_q(critic, batch.next_obs, samples, kernels.sampler),
            kernels.critic_estimates,
        )
        if self.hp.entropy_in_target == 0:
            return next_q
        return next_q - self.target_entropy.price(
            chain.actor, self.networks.schedule, self.hp, batch.next_obs, action, noise.entropy
        )

    def _rank(self, critic: TwinQ | PackedCritic, obs: Tensor, samples: Tensor) -> Tensor:
        """Returns the samples' Q in the ranking precision: [B, O], [B, N_d, A] → [B, N_d]."""
        if self.fused is not None and self.fused.ranks:
            assert isinstance(critic, TwinQ)
            return self.fused.min_q(critic, obs, samples)
        with matmul_precision(self.hp.ranking_precision, self.device):
            return min_q(critic, obs, samples, self.kernels.sampler)

    def improve_policy(
        self,
        obs: Tensor,
        samples: Tensor,
        q: Tensor,
        noise: UpdateNoise | ImprovementNoise,
        critic: TwinQ | PackedCritic | None = None,
    ) -> dict[str, Tensor]:
        """Takes one step of the actor on Eq. 6 plus Eq. 10.

        Args:
            obs: [B, O].
            samples: [B, N, A] in [-1, 1], the actions to choose from.
            q: [B, N], their Q.
            noise: that of a whole update where `target_refinement` is on: guidance takes the
                samples' own.
            critic: moves the best samples, and ranks them anew, where `target_refinement` is on.

        Returns:
            Detached scalar tensors, as `update` does.
        """
        nets, hp = self.networks, self.hp
        value = q.mean(dim=1)
        self.q_mean.lerp_(q.mean(), Q_STATISTICS_RATE)
        self.q_std.lerp_(q.std(correction=0), Q_STATISTICS_RATE)
        chosen_q, chosen = losses.best_of(q, samples, hp.num_trained_samples)  # [B, k], [B, k, A]
        advantage, extra = (chosen_q[:, 0] - value).mean(), {}
        if hp.target_refinement != "none":
            assert isinstance(noise, UpdateNoise)
            assert critic is not None
            chosen = self.refinement.moved(nets, hp, obs, q, chosen, noise.policy, critic)
            moved_q = self._rank(critic, obs, chosen)
            extra["refinement_gain"] = (moved_q - chosen_q).mean()
            chosen_q = moved_q
        if hp.q_weights == "softmax":
            self.q_temperature.begin(q.std(dim=1).mean() / math.sqrt(2 * hp.kl_target))
        weights = losses.q_weights(
            hp.q_weights,
            chosen_q,
            value,
            q_cut=hp.q_cut,
            q_mean=self.q_mean,
            q_std=self.q_std,
            temperature=self.q_temperature.value,
        )
        loss, entropy_term, mean_error = self.kernels.actor_objective(
            nets.actor,
            nets.schedule,
            obs,
            chosen,
            weights,
            noise.uniform,
            losses.entropy_weights(weights, self.entropy_weight, hp.num_chosen_samples),
            noise.step,
            noise.forward,
            hp.entropy_reduction,
            hp.vlo_coefficient,
            hp.num_chosen_samples,
        )
        grad_norm = self.descend(loss, self.actor_optimizer)
        metrics = {
            "actor_loss": loss.detach(),
            "entropy_loss": entropy_term,
            "denoising_error": mean_error,
            "actor_grad_norm": grad_norm,
            "value_mean": value.mean(),
            "advantage_mean": advantage,
            "q_weight_mean": weights.mean(),
            "q_weight_zero_share": (weights <= 0).float().mean(),
            "sample_std": samples.std(dim=1, correction=0).mean(),
            "nearest_sample_distance": losses.nearest_sample_distance(samples[:DISTANCE_STATES]),
        }
        if hp.q_weights == "softmax":
            extra["q_weight_kl"] = losses.soft_weight_kl(weights)
            self.q_temperature.descend(hp.kl_target - extra["q_weight_kl"])
        if hp.entropy_weight == "auto":
            follow_spread(self.entropy_weight, metrics["sample_std"], hp.sample_std_target)
        return metrics | extra

    def _sample_actions(self, chain: Chain) -> Tensor:
        """Returns `sample_actions` in the sampling precision."""
        if self.fused is not None and self.fused.samples:
            return self.fused.sample(chain)[0]
        hp = self.hp
        narrow = hp.sampling_precision == "bf16" and not self._fell_back
        dtype = torch.bfloat16 if narrow else None
        schedule, kernels = self.networks.schedule, self.kernels.sampler
        with matmul_precision(hp.sampling_precision, self.device):
            return sample_actions(chain.actor, schedule, chain.obs, chain.noise, kernels, dtype)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "q_mean": self.q_mean.clone(),
            "q_std": self.q_std.clone(),
            **{name: tensor.clone() for name, tensor in self._learnt().items()},
            "policy_metrics": {n: v.clone() for n, v in self.policy_metrics.items()},
        }

    def _learnt(self) -> dict[str, Tensor]:
        """Returns the tensors of numbers that updates learn, by their name in a checkpoint."""
        return {
            "entropy_weight": self.entropy_weight,
            "q_temperature": self.q_temperature.state,
            "advantage_square": self.refinement.advantage_square,
            "entropy_in_target": self.target_entropy.weight.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.q_mean.copy_(state["q_mean"])
        self.q_std.copy_(state["q_std"])
        for name, tensor in self._learnt().items():
            if name in state:  # earlier checkpoints have learnt none
                tensor.copy_(state[name])
        kept = state.get("policy_metrics", {})  # earlier checkpoints have none, nor need any
        # Those of options that are no longer in force would be of no update.
        for name in kept.keys() & self.policy_metrics.keys():
            self.policy_metrics[name].copy_(kept[name])
        super().load_state_dict(state)
