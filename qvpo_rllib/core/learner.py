"""What the learners of QVPO and its off-policy rivals share: everything but the losses.

They know nothing of how they are driven: batches come in, detached scalar tensors go out.
"""

import copy
import dataclasses
import functools
from typing import Any

import torch
from torch import Generator, Tensor, nn

from qvpo_rllib.core import losses
from qvpo_rllib.core.engine import CudaGraphs, kernels_of, resolve_engine
from qvpo_rllib.core.hyperparameters import OffPolicyHyperparameters
from qvpo_rllib.core.replay import ReplayBuffer, Transitions
from qvpo_rllib.core.seeding import restore_generator


class ActorCritic(nn.Module):
    """Actor, critics and a target of each."""

    def __init__(self, actor: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.actor = actor
        self.critic = critic
        self.target_actor = copy.deepcopy(actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(critic).requires_grad_(False)


class OffPolicyLearner:
    """Actor, critics, targets and optimisers on one device, and updates of them all.

    A subclass says what one update is (`step` and the noise it takes, or all of `update_from`);
    `train` does many and keeps their metrics until they are asked for.

    Args:
        networks: built for the same hyperparameters; moved to `device`.
        seed: of the generator that draws an update's noise.
    """

    networks: Any  # an `ActorCritic`; each learner names its own
    hp: Any

    def __init__(
        self,
        networks: ActorCritic,
        hp: OffPolicyHyperparameters,
        *,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self.device = torch.device(device)
        self.engine = resolve_engine(hp.engine, self.device)
        self.kernels = kernels_of(self.engine, self.device)
        self.networks = networks.to(self.device)
        self.generator = Generator(device=self.device)
        self.generator.manual_seed(seed)
        self.actor_optimizer = self._adam(networks.actor)
        self.critic_optimizer = self._adam(networks.critic)
        self.num_updates = 0
        self.env_steps = 0
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

    def draw_update_noise(self, batch_size: int) -> Any:
        """Every random number of one update, from the learner's generator."""
        raise NotImplementedError

    def step(self, batch: Transitions, noise: Any) -> dict[str, Tensor]:
        """One update on one batch. Returns detached scalars on the device, always the same ones."""
        raise NotImplementedError

    def update(self, batch: Transitions, /, *, noise: Any = None) -> dict[str, Tensor]:
        """One update on a batch of the caller's; see `step`.

        Args:
            noise: drawn from the learner's generator if None.
        """
        if noise is None:
            noise = self.draw_update_noise(batch.reward.shape[0])
        metrics = self.step(batch, noise)
        self.num_updates += 1
        return metrics

    def update_from(self, replay: ReplayBuffer) -> dict[str, Tensor]:
        """One update on what it draws from `replay`; the caller counts it."""
        batch = replay.sample(self.hp.batch_size)
        return self.step(batch, self.draw_update_noise(self.hp.batch_size))

    def configure(self, hp: OffPolicyHyperparameters) -> None:
        """Takes new hyperparameters into effect; networks and engine must stay as they are."""
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
        captured = self._graphs is not None
        if captured and self.graph_constants(hp) != self.graph_constants(self.hp):
            self._graphs = None
        self.hp = hp
        self.set_env_steps(self.env_steps)

    def graph_constants(self, hp: Any) -> Any:
        """What a captured graph holds as constants: all but what is read from tensors."""
        return dataclasses.replace(hp, actor_lr=1.0, critic_lr=1.0)

    def set_env_steps(self, env_steps: int) -> None:
        """Moves whatever follows a schedule to its value after `env_steps` environment steps."""
        self.env_steps = env_steps

    def train(self, replay: ReplayBuffer, num_updates: int) -> None:
        """`num_updates` updates on batches from `replay`; the metrics wait for `pop_metrics`."""
        if self.engine == "cuda_graph":
            if self._graphs is None or self._captured_replay is not replay:
                step = functools.partial(self._train_once, replay)
                self._graphs = CudaGraphs(step, [self.generator, replay.generator])
                self._captured_replay = replay
            self._graphs.run(num_updates)
            self.num_updates += num_updates
        else:
            for _ in range(num_updates):
                self._train_once(replay)
                self.num_updates += 1
        self._num_summed += num_updates

    def _train_once(self, replay: ReplayBuffer) -> None:
        metrics = self.update_from(replay)
        values = torch.stack([value.float() for value in metrics.values()])
        if self._metric_sums is None:
            self._metric_names, self._metric_sums = list(metrics), torch.zeros_like(values)
        self._metric_sums.add_(values)

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

    def settings_in_force(self) -> dict[str, float]:
        """Hyperparameters that follow a schedule, at their present values, for the results."""
        return {}

    def _unreported_metrics(self) -> dict[str, Any] | None:
        """The metrics of the updates since `pop_metrics`."""
        if self._metric_sums is None or self._num_summed == 0:
            return None
        return {
            "names": list(self._metric_names),
            "sums": self._metric_sums.clone(),
            "count": self._num_summed,
        }

    def fit_critics(self, batch: Transitions, next_q: Tensor) -> dict[str, Tensor]:
        """One step of the critics towards r + γ (1 - d) · next_q.

        Args:
            next_q: what the next states are worth, [B], without gradient.
        """
        target = losses.td_target(batch.reward, batch.terminal, next_q, self.hp.gamma)
        critic = self.networks.critic
        loss, q_mean = self.kernels.critic_objective(critic, batch.obs, batch.action, target)
        grad_norm = self.descend(loss, self.critic_optimizer, critic)
        return {
            "critic_loss": loss.detach(),
            "critic_grad_norm": grad_norm,
            "q_mean": q_mean,
            "td_target_mean": target.mean(),
        }

    def descend(self, loss: Tensor, optimizer: torch.optim.Adam, module: nn.Module) -> Tensor:
        """One clipped step of Adam. Returns the gradient's norm before clipping."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        limit = float("inf") if self.hp.grad_clip is None else self.hp.grad_clip
        norm = nn.utils.clip_grad_norm_(module.parameters(), limit, foreach=True)
        optimizer.step()
        return norm

    @torch.no_grad()
    def move_target(self, target: nn.Module, online: nn.Module) -> None:
        """One step of the moving average, of rate τ."""
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
            "unreported": self._unreported_metrics(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`, then re-applies the learner's own hyperparameters."""
        self.networks.load_state_dict(state["networks"])
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        restore_generator(self.generator, state["generator"])
        self.num_updates, self.env_steps = state["num_updates"], state["env_steps"]
        unreported = state.get("unreported") or {"names": [], "sums": None, "count": 0}
        self._metric_names, self._num_summed = list(unreported["names"]), unreported["count"]
        sums = unreported["sums"]
        self._metric_sums = None if sums is None else sums.to(self.device, copy=True)
        self._graphs = None  # the optimisers' state has moved
        self.configure(self.hp)
