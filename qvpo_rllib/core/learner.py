"""The learner: actor, critics, targets and optimisers, and one update of them all.

It knows nothing of how it is driven: batches come in, detached scalar tensors go out.
"""

import copy
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from qvpo_rllib.core import losses
from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.engine import CudaGraphs, kernels_of, matmul_precision, resolve_engine
from qvpo_rllib.core.hyperparameters import Hyperparameters
from qvpo_rllib.core.networks import NoisePredictor, TwinQ
from qvpo_rllib.core.replay import ReplayBuffer, Transitions
from qvpo_rllib.core.sampler import draw_noise, min_q, sample_actions
from qvpo_rllib.core.seeding import restore_generator

# Rate of the running mean and standard deviation of Q that `qexp` normalises with (the authors'
# program's alpha_mean and alpha_std).
Q_STATISTICS_RATE = 1e-3
# States of a batch whose samples' distances are taken, N_d² each: a batch's states are in no order.
DISTANCE_STATES = 16


class UpdateNoise(NamedTuple):
    """Every random number of one update, so that another implementation can be fed the same."""

    target: Tensor  # [T, B, K_t, A] standard normal: the TD target's actions
    policy: Tensor  # [T, B, N_d, A] standard normal: the policy samples
    uniform: Tensor  # [B, N_e, A] uniform in [-1, 1]
    step: Tensor  # [B·(k + N_e)] int64 in [0, T): the diffusion step of each trained row
    forward: Tensor  # [B·(k + N_e), A] standard normal: the noise to be predicted


class Networks(nn.Module):
    """Actor, twin critics and their targets."""

    def __init__(self, obs_dim: int, act_dim: int, hp: Hyperparameters) -> None:
        super().__init__()
        self.act_dim = act_dim
        self.actor = NoisePredictor(obs_dim, act_dim, hp.hidden, hp.diffusion_steps)
        self.critic = TwinQ(obs_dim, act_dim, hp.hidden)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.schedule = NoiseSchedule(hp.noise_schedule, hp.diffusion_steps)


class Learner:
    """One QVPO learner on one device.

    Args:
        networks: built for the same hyperparameters; moved to `device`.
        seed: of the generator that draws `UpdateNoise`.

    Raises:
        ValueError: the hyperparameters ask for what the device has not.
    """

    def __init__(
        self, networks: Networks, hp: Hyperparameters, *, seed: int, device: torch.device | str
    ) -> None:
        if hp.k_target is None:
            raise ValueError(
                "k_target is not resolved: give a number (see presets.resolve_for_task)."
            )
        self.device = torch.device(device)
        if hp.sampling_precision == "tf32" and self.device.type != "cuda":
            raise ValueError(
                f"sampling_precision='tf32' needs an NVIDIA GPU; the learner is on "
                f"{str(self.device)!r}. Use 'fp32', or 'bf16', which CPUs know too."
            )
        self.engine = resolve_engine(hp.engine, self.device)
        self.kernels = kernels_of(self.engine, self.device)
        self.networks = networks.to(self.device)
        self.generator = Generator(device=self.device)
        self.generator.manual_seed(seed)
        self.actor_optimizer = self._adam(networks.actor)
        self.critic_optimizer = self._adam(networks.critic)
        self.num_updates = 0
        self.env_steps = 0
        self.entropy_weight = torch.zeros((), device=self.device)
        self.q_mean = torch.zeros((), device=self.device)
        self.q_std = torch.ones((), device=self.device)
        self._metric_names: list[str] = []
        self._metric_sums: Tensor | None = None  # [metrics]
        self._num_summed = 0
        self._graphs: CudaGraphs | None = None
        self._captured_replay: ReplayBuffer | None = None
        self.hp = hp
        self.configure(hp)

    @staticmethod
    def _adam(module: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(module.parameters(), fused=True)

    def configure(self, hp: Hyperparameters) -> None:
        """Takes new hyperparameters into effect; the networks' shape, T and engine must stay."""
        on_gpu = self.device.type == "cuda"
        for optimizer, lr in (
            (self.actor_optimizer, hp.actor_lr),
            (self.critic_optimizer, hp.critic_lr),
        ):
            for group in optimizer.param_groups:
                group["eps"], group["capturable"] = hp.adam_eps, on_gpu
                # A tensor on the GPU stays where a captured graph reads it.
                if on_gpu and isinstance(group["lr"], Tensor) and group["lr"].is_cuda:
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = torch.tensor(lr, device=self.device) if on_gpu else lr
        if _constants_of_a_graph(hp) != _constants_of_a_graph(self.hp):
            self._graphs = None
        self.hp = hp
        self.set_env_steps(self.env_steps)

    def set_env_steps(self, env_steps: int) -> None:
        """Moves ω_ent to its value after `env_steps` environment steps."""
        self.env_steps = env_steps
        self.entropy_weight.fill_(self.hp.entropy_weight_at(env_steps))

    def train(self, replay: ReplayBuffer, num_updates: int) -> None:
        """`num_updates` updates on batches from `replay`; the metrics wait for `pop_metrics`."""
        if self.engine == "cuda_graph":
            if self._graphs is None or self._captured_replay is not replay:
                step = functools.partial(self._train_once, replay)
                self._graphs = CudaGraphs(step, [self.generator, replay.generator])
                self._captured_replay = replay
            self._graphs.run(num_updates)
        else:
            for _ in range(num_updates):
                self._train_once(replay)
        self.num_updates += num_updates
        self._num_summed += num_updates

    def metric_mean(self, name: str) -> float:
        """Mean of one metric over the updates of `train` since `pop_metrics`; waits for it."""
        assert self._metric_sums is not None
        return float(self._metric_sums[self._metric_names.index(name)]) / self._num_summed

    def pop_metrics(self) -> dict[str, float]:
        """Means over the updates of `train` since the last call; empty if there were none."""
        if self._metric_sums is None or self._num_summed == 0:
            return {}
        values = (self._metric_sums / self._num_summed).tolist()
        self._metric_sums.zero_()
        self._num_summed = 0
        return dict(zip(self._metric_names, values, strict=True))

    def _unreported_metrics(self) -> dict[str, Any] | None:
        """The metrics of the updates since `pop_metrics`."""
        if self._metric_sums is None or self._num_summed == 0:
            return None
        return {
            "names": list(self._metric_names),
            "sums": self._metric_sums.clone(),
            "count": self._num_summed,
        }

    def _train_once(self, replay: ReplayBuffer) -> None:
        critic_batch = policy_batch = replay.sample(self.hp.batch_size)
        if self.hp.update_order == "critic_then_policy":
            policy_batch = replay.sample(self.hp.batch_size)
        noise = self.draw_update_noise(self.hp.batch_size)
        metrics = self._update(critic_batch, policy_batch, noise)
        values = torch.stack([value.float() for value in metrics.values()])
        if self._metric_sums is None:
            self._metric_names, self._metric_sums = list(metrics), torch.zeros_like(values)
        self._metric_sums.add_(values)

    def draw_update_noise(self, batch_size: int) -> UpdateNoise:
        hp, act_dim, device = self.hp, self.networks.act_dim, self.device
        rows = batch_size * (hp.num_chosen_samples + hp.num_uniform_samples)
        generator = self.generator
        assert hp.k_target is not None

        def noise(num_samples: int) -> Tensor:
            return draw_noise(
                hp.diffusion_steps, batch_size, num_samples, act_dim, generator, device
            )

        return UpdateNoise(
            target=noise(hp.k_target),
            policy=noise(hp.num_policy_samples),
            uniform=torch.empty(
                batch_size, hp.num_uniform_samples, act_dim, device=device
            ).uniform_(-1, 1, generator=generator),
            step=torch.randint(hp.diffusion_steps, (rows,), generator=generator, device=device),
            forward=torch.randn(rows, act_dim, generator=generator, device=device),
        )

    def update(
        self,
        critic_batch: Transitions,
        policy_batch: Transitions | None = None,
        noise: UpdateNoise | None = None,
    ) -> dict[str, Tensor]:
        """One update of critics, actor and targets (Algorithm 1, lines 4 to 11).

        Args:
            critic_batch: transitions for the TD loss.
            policy_batch: transitions whose states train the policy; the same batch if None.
            noise: drawn from the learner's generator if None.

        Returns:
            Detached scalar tensors on the device; see the README's table of metrics.
        """
        if policy_batch is None:
            policy_batch = critic_batch
        if policy_batch.reward.shape != critic_batch.reward.shape:
            raise ValueError(
                f"The two batches must be of one size, not {critic_batch.reward.shape[0]} and "
                f"{policy_batch.reward.shape[0]}."
            )
        if noise is None:
            noise = self.draw_update_noise(critic_batch.reward.shape[0])
        self.num_updates += 1
        return self._update(critic_batch, policy_batch, noise)

    def _update(
        self, critic_batch: Transitions, policy_batch: Transitions, noise: UpdateNoise
    ) -> dict[str, Tensor]:
        if self.hp.update_order == "critic_then_policy":
            metrics = self._update_critic(critic_batch, noise)
            metrics |= self._update_policy(policy_batch.obs, noise)
        else:
            metrics = self._update_policy(policy_batch.obs, noise)
            metrics |= self._update_critic(critic_batch, noise)
        self._update_targets()
        return metrics

    def _update_critic(self, batch: Transitions, noise: UpdateNoise) -> dict[str, Tensor]:
        nets, hp = self.networks, self.hp
        actor = nets.target_actor if hp.target_actor else nets.actor
        next_samples = self._sample_actions(actor, batch.next_obs, noise.target)  # [B, K_t, A]
        next_q = min_q(nets.target_critic, batch.next_obs, next_samples, self.kernels.sampler)
        target = losses.td_target(batch.reward, batch.terminal, next_q.amax(dim=1), hp.gamma)
        loss, q_mean = self.kernels.critic_objective(nets.critic, batch.obs, batch.action, target)
        grad_norm = self._descend(loss, self.critic_optimizer, nets.critic)
        return {
            "critic_loss": loss.detach(),
            "critic_grad_norm": grad_norm,
            "q_mean": q_mean,
            "td_target_mean": target.mean(),
        }

    def _update_policy(self, obs: Tensor, noise: UpdateNoise) -> dict[str, Tensor]:
        nets, hp = self.networks, self.hp
        samples = self._sample_actions(nets.actor, obs, noise.policy)  # [B, N_d, A]
        q = min_q(nets.critic, obs, samples, self.kernels.sampler)  # [B, N_d]
        value = q.mean(dim=1)
        self.q_mean.lerp_(q.mean(), Q_STATISTICS_RATE)
        self.q_std.lerp_(q.std(correction=0), Q_STATISTICS_RATE)
        chosen_q, chosen = losses.best_of(q, samples, hp.num_chosen_samples)  # [B, k], [B, k, A]
        weights = losses.q_weights(
            hp.q_weights, chosen_q, value, q_cut=hp.q_cut, q_mean=self.q_mean, q_std=self.q_std
        )
        loss, entropy_term, mean_error = self.kernels.actor_objective(
            nets.actor,
            nets.schedule,
            obs,
            chosen,
            weights,
            noise.uniform,
            losses.entropy_weights(weights, self.entropy_weight),
            noise.step,
            noise.forward,
            hp.entropy_reduction,
            hp.vlo_coefficient,
        )
        grad_norm = self._descend(loss, self.actor_optimizer, nets.actor)
        return {
            "actor_loss": loss.detach(),
            "entropy_loss": entropy_term,
            "denoising_error": mean_error,
            "actor_grad_norm": grad_norm,
            "value_mean": value.mean(),
            "advantage_mean": (chosen_q[:, 0] - value).mean(),
            "q_weight_mean": weights.mean(),
            "q_weight_zero_share": (weights <= 0).float().mean(),
            "sample_std": samples.std(dim=1, correction=0).mean(),
            "nearest_sample_distance": nearest_sample_distance(samples[:DISTANCE_STATES]),
        }

    def _sample_actions(self, actor: NoisePredictor, obs: Tensor, noise: Tensor) -> Tensor:
        """`sample_actions` in the sampling precision."""
        dtype = torch.bfloat16 if self.hp.sampling_precision == "bf16" else None
        with matmul_precision(self.hp.sampling_precision):
            return sample_actions(
                actor, self.networks.schedule, obs, noise, self.kernels.sampler, dtype
            )

    def _descend(self, loss: Tensor, optimizer: torch.optim.Adam, module: nn.Module) -> Tensor:
        """One clipped step of Adam. Returns the gradient's norm before clipping."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        limit = float("inf") if self.hp.grad_clip is None else self.hp.grad_clip
        norm = nn.utils.clip_grad_norm_(module.parameters(), limit, foreach=True)
        optimizer.step()
        return norm

    @torch.no_grad()
    def _update_targets(self) -> None:
        nets = self.networks
        for target, online in (
            (nets.target_actor, nets.actor),
            (nets.target_critic, nets.critic),
        ):
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), self.hp.tau)

    def state_dict(self) -> dict[str, Any]:
        """Everything that an update reads or writes, except the hyperparameters."""
        return {
            "networks": self.networks.state_dict(),
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "generator": self.generator.get_state().cpu(),
            "num_updates": self.num_updates,
            "env_steps": self.env_steps,
            "q_mean": self.q_mean.clone(),
            "q_std": self.q_std.clone(),
            "unreported": self._unreported_metrics(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`, then re-applies the learner's own hyperparameters."""
        self.networks.load_state_dict(state["networks"])
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        restore_generator(self.generator, state["generator"])
        self.num_updates, self.env_steps = state["num_updates"], state["env_steps"]
        self.q_mean.copy_(state["q_mean"])
        self.q_std.copy_(state["q_std"])
        unreported = state.get("unreported") or {"names": [], "sums": None, "count": 0}
        self._metric_names, self._num_summed = list(unreported["names"]), unreported["count"]
        sums = unreported["sums"]
        self._metric_sums = None if sums is None else sums.to(self.device, copy=True)
        self._graphs = None  # the optimisers' state has moved
        self.configure(self.hp)


def nearest_sample_distance(samples: Tensor) -> Tensor:
    """Mean Euclidean distance of a sample to the nearest other one of its state: [B, N, A] → [].

    It is zero where the N samples of a state have collapsed into clusters; 0 for N = 1.
    """
    num_samples = samples.shape[1]
    if num_samples == 1:
        return samples.new_zeros(())
    squared = (samples[:, :, None] - samples[:, None]).square().sum(-1)  # [B, N, N]
    to_itself = torch.eye(num_samples, dtype=torch.bool, device=samples.device)
    return squared.masked_fill(to_itself, math.inf).amin(-1).sqrt().mean()


def _constants_of_a_graph(hp: Hyperparameters) -> Hyperparameters:
    """What a captured graph holds as constants: all but what is read from tensors."""
    return dataclasses.replace(
        hp,
        actor_lr=1.0,
        critic_lr=1.0,
        entropy_weight=0.0,
        entropy_weight_end=None,
        entropy_weight_floor=0.0,
    )
