"""The base of all off-policy learners: everything but the losses.

A learner does not know who drives it: batches come in, detached scalar tensors go out.
"""

import copy
import dataclasses
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

import torch
from numpy.typing import ArrayLike
from torch import Generator, Tensor, nn

from qvpo_rllib.core import losses
from qvpo_rllib.core.backends.native import pytorch_on_one_thread
from qvpo_rllib.core.engine import CudaGraphs, kernels_of, matmul_precision, resolve_engine
from qvpo_rllib.core.normalization import Moments, RunningMoments
from qvpo_rllib.core.options.shared import OffPolicyHyperparameters
from qvpo_rllib.core.replay import ReplayBuffer, Transitions
from qvpo_rllib.core.seeding import restore_generator


class ActorCritic(nn.Module):
    """Actor, critics and a target of each; a subclass names their types.

    Attributes:
        observations: their running moments where `normalize_observations` asks for them, else None.
            The networks themselves take what `normalize` returns.
    """

    actor: nn.Module
    critic: nn.Module
    target_actor: nn.Module
    target_critic: nn.Module
    observations: RunningMoments | None

    def __init__(self, actor: nn.Module, critic: nn.Module, act_dim: int) -> None:
        super().__init__()
        self.act_dim = act_dim
        self.actor = actor
        self.critic = critic
        self.target_actor = copy.deepcopy(actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(critic).requires_grad_(False)
        self.observations = None

    def normalize(self, obs: Tensor) -> Tensor:
        """Returns observations [..., O] as the networks take them."""
        return obs if self.observations is None else self.observations.standardize(obs)


Networks = TypeVar("Networks", bound=ActorCritic)
Hyper = TypeVar("Hyper", bound=OffPolicyHyperparameters)
Noise = TypeVar("Noise")  # every random number of one update


class OffPolicyLearner(Generic[Networks, Hyper, Noise]):
    """Actor, critics, targets and optimisers on one device, and updates of them all.

    A subclass defines one update (`update`, and the noise that it takes); `train` does many, counts
    them, and keeps their metrics until `pop_metrics`.

    Args:
        networks: built for the same hyperparameters; moved to `device`.
        seed: of the generator that draws an update's noise.
    """

    def __init__(
        self,
        networks: Networks,
        hp: Hyper,
        *,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self.device = torch.device(device)
        self.engine = resolve_engine(hp.engine, self.device)
        self.kernels = kernels_of(self.engine, self.device)
        self.networks = networks.to(self.device)
        # Kept, since walking over a module's tree takes as long as Adam.
        self._parameters: dict[nn.Module, list[Tensor]] = {
            module: list(module.parameters())
            for module in (
                *(networks.actor, networks.critic),
                *(networks.target_actor, networks.target_critic),
            )
        }
        self.generator = Generator(device=self.device)
        self.generator.manual_seed(seed)
        self.actor_optimizer, self.critic_optimizer = (
            torch.optim.Adam(self._parameters[module], fused=True)
            for module in (networks.actor, networks.critic)
        )
        self.num_updates = 0
        self.env_steps = 0
        # All that was observed, in double precision: a buffer would lose what a single step adds.
        moments = networks.observations
        self._observed = None if moments is None else moments.read()
        self._metric_names: list[str] = []
        self._metric_sums: Tensor | None = None  # [metrics]
        self._num_summed = 0
        self._graphs: CudaGraphs | None = None
        # Not kept alive: whoever made it frees it.
        self._captured_replay: weakref.ref[ReplayBuffer] | None = None
        self.hp = hp
        self.configure(hp)

    @property
    def cycle(self) -> int:
        """Updates after which the same operations come again; an update may read `num_updates`."""
        return 1

    def is_native(self) -> bool:
        """Returns whether all of an update that several threads are worth is the library's."""
        return False

    def draw_update_noise(self, batch_size: int) -> Noise:
        """Returns every random number of one update, from the learner's generator."""
        raise NotImplementedError

    def update(self, batch: Transitions, /, *, noise: Noise | None = None) -> dict[str, Tensor]:
        """Does one update on `batch`, which the caller counts in `num_updates`.

        Args:
            batch: with observations as the networks take them (see `draw`).
            noise: drawn from the learner's generator if None.

        Returns:
            Detached scalar tensors on the device, under the same names in every update.
        """
        raise NotImplementedError

    def update_from(self, replay: ReplayBuffer) -> dict[str, Tensor]:
        """Does one update on what it draws from `replay`; see `update`."""
        return self.update(self.draw(replay))

    def draw(self, replay: ReplayBuffer) -> Transitions:
        """Returns a batch of `replay` with n-step returns, as the networks take it."""
        hp = self.hp
        return self.normalized(replay.sample(hp.batch_size, hp.n_step, hp.gamma))

    def normalized(self, batch: Transitions) -> Transitions:
        """Returns `batch` with observations as the networks take them."""
        normalize = self.networks.normalize
        return batch._replace(obs=normalize(batch.obs), next_obs=normalize(batch.next_obs))

    def observe(self, obs: ArrayLike) -> None:
        """Adds observations of training, [B, O], to the moments that normalise them, if any do.

        They stay as they are from one call to the next: within updates they never move.
        """
        if self._observed is not None and self.networks.observations is not None:
            self._observed = self._observed.plus(Moments.of(obs))
            self.networks.observations.write(self._observed)

    def train(self, replay: ReplayBuffer, num_updates: int) -> None:
        """Does `num_updates` updates on batches from `replay`; `pop_metrics` has their metrics."""
        if self.engine == "cuda_graph":
            if self._captured_replay is None or self._captured_replay() is not replay:
                self.close()
                self._captured_replay = weakref.ref(replay)
            if self._graphs is None:
                self._graphs = CudaGraphs([self.generator, replay.generator])
            first = self.num_updates

            def step(number: int) -> None:
                self.num_updates = number
                self._step(replay)

            self._graphs.run(step, num_updates, first, self.cycle)
            self.num_updates = first + num_updates
        else:
            with pytorch_on_one_thread() if self.is_native() else nullcontext():
                for _ in range(num_updates):
                    self._step(replay)
                    self.num_updates += 1
        self._num_summed += num_updates

    def close(self) -> None:
        """Frees captured graphs and their memory; the next `train` captures anew."""
        if self._graphs is not None:
            self._graphs.close()
        self._graphs = None

    def _step(self, replay: ReplayBuffer) -> None:
        with matmul_precision("fp32", self.device):
            metrics = self.update_from(replay)
        values = [value.float() for value in metrics.values()]
        if self._metric_sums is None or self._metric_names != list(metrics):
            self._metric_names, self._num_summed = list(metrics), 0  # options may have changed
            self._metric_sums = torch.zeros(len(values), dtype=torch.float32, device=self.device)
        torch._foreach_add_(list(self._metric_sums.unbind()), values)  # one kernel

    def configure(self, hp: Hyper) -> None:
        """Puts new hyperparameters into effect; those of networks and engine must be the same."""
        captured = self.engine == "cuda_graph"
        for optimizer, lr in (
            (self.actor_optimizer, hp.actor_lr),
            (self.critic_optimizer, hp.critic_lr),
        ):
            for group in optimizer.param_groups:
                group["eps"], group["capturable"] = hp.adam_eps, captured
                # A captured graph reads the rate from where this tensor is on the GPU.
                if captured and self._graphs is not None:
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = torch.tensor(lr, device=self.device) if captured else lr
        if self._graphs is not None and self.graph_constants(hp) != self.graph_constants(self.hp):
            self.close()
        self.hp = hp
        self.set_env_steps(self.env_steps)

    def graph_constants(self, hp: Hyper) -> Hyper:
        """Returns `hp` with fixed values for what a captured graph reads from tensors."""
        return dataclasses.replace(hp, actor_lr=1.0, critic_lr=1.0)

    def set_env_steps(self, env_steps: int) -> None:
        """Sets everything that follows a schedule to its value after `env_steps` env steps."""
        self.env_steps = env_steps

    def settings_in_force(self) -> dict[str, float]:
        """Returns the present values of hyperparameters that follow a schedule, by name."""
        return {}

    def read_metrics(self) -> Callable[[], dict[str, float]]:
        """Returns a function that returns the means over the updates since `pop_metrics`.

        On a GPU the numbers travel meanwhile; the function waits for these updates, not for others.
        """
        assert self._metric_sums is not None
        names, count = self._metric_names, self._num_summed
        means = (self._metric_sums / count).to("cpu", non_blocking=True)
        arrived = torch.Event(self.device) if self.device.type == "cuda" else None
        if arrived is not None:
            arrived.record()

        def read() -> dict[str, float]:
            if arrived is not None:
                arrived.synchronize()
            return dict(zip(names, means.tolist(), strict=True))

        return read

    def pop_metrics(self) -> dict[str, float]:
        """Returns means over the updates of `train` since the last call, or {} if it did none."""
        if self._metric_sums is None or self._num_summed == 0:
            return {}
        means = self.read_metrics()()
        self._metric_sums.zero_()
        self._num_summed = 0
        return means

    def fit_critics(self, batch: Transitions, next_q: Tensor) -> dict[str, Tensor]:
        """Takes one step of the critics towards r + γ (1 - d) · next_q.

        Args:
            next_q: the value of the next states, [B], without gradient; or quantiles of it, [m, B].
        """
        target = losses.td_target(batch.reward, batch.terminal, next_q, self.hp.gamma)
        critic = self.networks.critic
        loss, q_mean = self.kernels.critic_objective(critic, batch.obs, batch.action, target)
        grad_norm = self.descend(loss, self.critic_optimizer)
        metrics = {
            "critic_loss": loss.detach(),
            "critic_grad_norm": grad_norm,
            "q_mean": q_mean,
            "td_target_mean": target.mean(),
        }
        if target.dim() == 2:
            metrics["td_target_std"] = target.std(dim=0, correction=0).mean()
        return metrics

    def descend(self, loss: Tensor, optimizer: torch.optim.Adam) -> Tensor:
        """Takes one clipped step of Adam. Returns the gradient's norm before clipping."""
        (group,) = optimizer.param_groups
        for parameter in group["params"]:
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        # As `nn.utils.clip_grad_norm_` does it, without its detours in Python.
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.hp.grad_clip is not None:
            scale = (self.hp.grad_clip / (norm + 1e-6)).clamp(max=1)
            torch._foreach_mul_(gradients, scale)
        optimizer.step()
        return norm

    @torch.no_grad()
    def move_target(self, target: nn.Module, online: nn.Module) -> None:
        """Takes one step of the moving average, of rate τ."""
        torch._foreach_lerp_(self._parameters[target], self._parameters[online], self.hp.tau)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that an update reads or writes, except the hyperparameters."""
        unreported = None
        if self._metric_sums is not None and self._num_summed:
            unreported = {
                "names": list(self._metric_names),
                "sums": self._metric_sums.clone(),
                "count": self._num_summed,
            }
        return {
            "networks": self.networks.state_dict(),
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "generator": self.generator.get_state().cpu(),
            "num_updates": self.num_updates,
            "env_steps": self.env_steps,
            "unreported": unreported,
            **({} if self._observed is None else {"observed": self._observed._asdict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`, then applies the learner's own hyperparameters again."""
        self.networks.load_state_dict(state["networks"])
        if self._observed is not None:
            self._observed = Moments(**state["observed"])
        # Adam would go on in the very moments that the state holds.
        self.actor_optimizer.load_state_dict(copy.deepcopy(state["actor_optimizer"]))
        self.critic_optimizer.load_state_dict(copy.deepcopy(state["critic_optimizer"]))
        restore_generator(self.generator, state["generator"])
        self.num_updates, self.env_steps = state["num_updates"], state["env_steps"]
        self._metric_names, self._metric_sums, self._num_summed = [], None, 0
        if (unreported := state["unreported"]) is not None:
            self._metric_names, self._num_summed = list(unreported["names"]), unreported["count"]
            self._metric_sums = unreported["sums"].to(self.device, copy=True)
        self.close()  # the optimisers' state is elsewhere in memory now
        self.configure(self.hp)
