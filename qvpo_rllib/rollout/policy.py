"""`OffPolicyTorchPolicy`: RLlib's policy that owns actor, critics and targets."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar, Generic

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.models.torch.torch_modelv2 import TorchModelV2
from ray.rllib.policy.sample_batch import SampleBatch
from ray.rllib.policy.torch_policy import TorchPolicy
from torch import Generator, Tensor, nn

from qvpo_rllib.core.backends.acting_copy import ActingCopy
from qvpo_rllib.core.engine import CPU, acting_engine, kernels_of, matmul_precision
from qvpo_rllib.core.learner import ActorCritic, Hyper, Networks, OffPolicyLearner
from qvpo_rllib.core.options.qvpo import resolved_hyperparameters
from qvpo_rllib.core.replay import EpisodeSteps, Transitions
from qvpo_rllib.core.seeding import Stream, restore_generator, spawn_seed
from qvpo_rllib.rollout.environments import check_spaces


class PolicyModel(TorchModelV2, nn.Module):  # type: ignore[misc]
    """The networks, in the form in which RLlib expects a policy's model."""

    def __init__(
        self, obs_space: gym.Space, action_space: gym.Space, config: Any, networks: ActorCritic
    ) -> None:
        nn.Module.__init__(self)
        TorchModelV2.__init__(self, obs_space, action_space, None, config["model"], "qvpo")
        self.networks = networks


class OffPolicyTorchPolicy(TorchPolicy, Generic[Networks, Hyper]):  # type: ignore[misc]
    """Acts with its networks on the CPU; on the local training worker it learns, on a GPU or there.

    Actions are in [-1, 1]; RLlib's `normalize_actions` (on by default) maps them to the box. A
    subclass names its classes and defines how it acts (`_act`).

    Attributes:
        networks_class: called with observation dimensions, action dimensions, hyperparameters.
        behavior_prefixes: of the parameters that a rollout worker needs in order to act; no others
            travel, but the moments that normalise observations.
    """

    hyperparameters_class: type[Hyper]
    networks_class: Callable[[int, int, Hyper], Networks]
    learner_class: type[OffPolicyLearner[Networks, Hyper, Any]]
    behavior_prefixes: ClassVar[tuple[str, ...]] = ("actor.",)

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, config: Any) -> None:
        check_spaces(observation_space, action_space)
        # This policy keeps its part, even where RLlib replaces `self.config` later.
        self.hp = resolved_hyperparameters(config, self.hyperparameters_class)
        self.seed: int | None = config["seed"]
        self.worker_index: int = config["worker_index"] or 0
        self.in_evaluation = bool(config["in_evaluation"])
        self.is_learner = self.worker_index == 0 and not self.in_evaluation
        self.obs_dim, self.act_dim = observation_space.shape[0], action_space.shape[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spawn_seed(self.seed, Stream.NETWORKS))
            networks = self.networks_class(self.obs_dim, self.act_dim, self.hp)
        if not self.is_learner:
            config = {**config, "num_gpus": 0, "num_gpus_per_env_runner": 0}
        model = PolicyModel(observation_space, action_space, config, networks)
        super().__init__(observation_space, action_space, config, model=model)
        for name, requirement in self.view_requirements.items():
            requirement.used_for_compute_actions = name == SampleBatch.OBS
        self.networks: Networks = self.model.networks
        self.generator = Generator()
        self.seed_actions(0)
        self.kernels = kernels_of(acting_engine(self.hp.engine), CPU)
        self.learner: OffPolicyLearner[Networks, Hyper, Any] | None = None
        if self.is_learner:
            seed = spawn_seed(self.seed, Stream.LEARNER)
            self.learner = self.learner_class(self.networks, self.hp, seed=seed, device=self.device)
        self._acting, self._copy = self.networks, None
        if self.device.type != "cpu":
            self._acting = copy.deepcopy(self.networks).to(CPU)
            self._copy = ActingCopy(self.networks, self._acting, self.acting_prefixes)

    @property
    def acting_prefixes(self) -> tuple[str, ...]:
        """Of the names of all that acting needs."""
        return (*self.behavior_prefixes, "observations.")

    def acting_networks(self) -> Networks:
        """Returns the networks to act with: on the CPU, as those that learn are now."""
        if self._copy is not None:
            self._copy.refresh(self.learner.num_updates if self.learner else 0)
        return self._acting

    def optimizer(self) -> list[torch.optim.Optimizer]:
        """Returns none for RLlib: the learner owns its optimisers."""
        return []

    def seed_actions(self, env_steps: int) -> None:
        """Starts this policy's stream of noise, for a run that is at `env_steps`."""
        indices = (env_steps, self.worker_index, int(self.in_evaluation))
        self.generator.manual_seed(spawn_seed(self.seed, Stream.ACTION, *indices))

    @torch.no_grad()
    def act(
        self,
        obs: NDArray[np.floating],
        *,
        explore: bool = False,
        k: int | None = None,
        generator: Generator | None = None,
    ) -> NDArray[np.float32]:
        """Returns an action for each observation: [B, O] → [B, A] in [-1, 1].

        Args:
            explore: whether to act as in training, else as in evaluation.
            k: actions drawn per state, of which the best is taken; if None, `k_behavior` to
                explore, else `k_eval`.
            generator: of everything that is drawn; the policy's own if None.

        Raises:
            ValueError: the observations have another shape, or a `k` is given to a policy that
                takes one action in each state.
        """
        actions, _ = self._act(
            self.network_input(obs),
            explore,
            self._num_samples(k, explore),
            generator or self.generator,
        )
        return to_numpy(actions)

    def act_with_q(
        self, obs: NDArray[np.floating], *, generator: Generator | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Returns the actions of an evaluation, as `act` does, and the critics' minimum Q, [B].

        Q is None unless the policy acts by its critics: a worker has no others.
        """
        return self.act(obs, generator=generator), None

    def _act(
        self, obs: Tensor, explore: bool, k: int, generator: Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Returns actions [B, A] in [-1, 1] for obs [B, O], and their Q [B] where it is known.

        `obs` is what `network_input` returns.
        """
        raise NotImplementedError

    def _num_samples(self, k: int | None, explore: bool) -> int:
        """Returns how many actions `_act` draws per state."""
        refuse_k(k, self)
        return 1

    def network_input(self, obs: NDArray[np.floating]) -> Tensor:
        """Returns an environment's observations [B, O] as the networks that act take them.

        Raises:
            ValueError: they have another shape.
        """
        tensor = torch.as_tensor(np.asarray(obs), dtype=torch.float32)
        if tensor.ndim != 2 or tensor.shape[1] != self.obs_dim:
            raise ValueError(
                f"Observations have shape {tuple(tensor.shape)}; this policy needs "
                f"[batch, {self.obs_dim}]."
            )
        return self.acting_networks().normalize(tensor)

    def compute_actions(
        self,
        obs_batch: NDArray[np.floating],
        *args: Any,
        explore: bool | None = None,
        **kwargs: Any,
    ) -> tuple[NDArray[np.float32], list[Any], dict[str, Any]]:
        if explore is None:
            explore = self.config["explore"]
        return self.act(obs_batch, explore=bool(explore)), [], {}

    def compute_actions_from_input_dict(
        self,
        input_dict: dict[str, Any],
        explore: bool | None = None,
        timestep: int | None = None,
        **kwargs: Any,
    ) -> tuple[NDArray[np.float32], list[Any], dict[str, Any]]:
        return self.compute_actions(input_dict[SampleBatch.OBS], explore=explore)

    def export_model(self, export_dir: str, onnx: int | None = None) -> None:
        raise self._unsupported(
            "export_model", "qvpo export and algorithm.export_policy_model write QVPO's"
        )

    def compute_log_likelihoods(self, *args: Any, **kwargs: Any) -> Any:
        raise self._unsupported("compute_log_likelihoods", "it knows no density of its actions")

    def compute_gradients(self, *args: Any, **kwargs: Any) -> Any:
        raise self._unsupported("compute_gradients", "learn_on_batch does a whole update")

    def _unsupported(self, method: str, reason: str) -> ValueError:
        return ValueError(f"{type(self).__name__} has no {method}: {reason}.")

    def learn_on_batch(self, samples: SampleBatch) -> dict[str, Any]:
        """Does one update on a batch of RLlib's: columns obs, actions in [-1, 1], rewards, …

        Each row stands for itself, whatever `n_step` is.

        Raises:
            RuntimeError: this policy does not learn.
        """
        if self.learner is None:
            raise RuntimeError("Only the policy on the local training worker learns.")
        batch = to_transitions(samples, self.hp.truncation_as_terminal)
        batch = self.learner.normalized(Transitions(*(c.to(self.device) for c in batch)))
        with matmul_precision("fp32", self.device):
            metrics = self.learner.update(batch)
        self.learner.num_updates += 1
        self.num_grad_updates = self.learner.num_updates
        return {"learner_stats": {name: float(value) for name, value in metrics.items()}}

    def get_weights(self) -> dict[str, NDArray[np.float32]]:
        """Returns the parameters that acting needs, by name."""
        # As copies: `numpy()` alone would alias the live parameters.
        return {
            name: value.detach().numpy().copy()
            for name, value in self.acting_networks().state_dict().items()
            if name.startswith(self.acting_prefixes)
        }

    def set_weights(self, weights: dict[str, NDArray[np.float32]]) -> None:
        """Restores `get_weights()`. Raises `ValueError` if they do not fit the networks."""
        # Arrays from Ray's object store are read-only, which `as_tensor` would warn about.
        tensors = {name: torch.tensor(value) for name, value in weights.items()}
        missing, unexpected = self.networks.load_state_dict(tensors, strict=False)
        wrong = [n for n in missing if n.startswith(self.acting_prefixes)] + list(unexpected)
        if wrong:
            raise ValueError(f"These weights do not fit the policy's networks: {wrong[:4]}.")

    def get_state(self) -> dict[str, Any]:
        state: dict[str, Any] = super().get_state()
        if self.learner is not None:
            state["qvpo_learner"] = _to_cpu(self.learner.state_dict())
            state["qvpo_action_generator"] = self.generator.get_state().cpu()
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state({k: v for k, v in state.items() if k != "policy_spec"})
        if self.learner is not None and "qvpo_learner" in state:
            self.learner.load_state_dict(state["qvpo_learner"])
            self.num_grad_updates = self.learner.num_updates
            restore_generator(self.generator, state["qvpo_action_generator"])


AnyPolicy = OffPolicyTorchPolicy[Any, Any]  # of whichever algorithm


def to_transitions(samples: SampleBatch, truncation_as_terminal: bool) -> Transitions:
    """Returns RLlib's columns as `Transitions` on the CPU.

    A time limit ends an episode but not the return: its transition bootstraps from the final
    observation, unless `truncation_as_terminal`.
    """
    terminal = np.asarray(samples[SampleBatch.TERMINATEDS], dtype=np.float32)
    if truncation_as_terminal:
        truncated = np.asarray(samples[SampleBatch.TRUNCATEDS], dtype=np.float32)
        terminal = np.maximum(terminal, truncated)
    columns = (SampleBatch.OBS, SampleBatch.ACTIONS, SampleBatch.REWARDS, SampleBatch.NEXT_OBS)
    arrays = [np.asarray(samples[c], dtype=np.float32) for c in columns]
    # Arrays from Ray's object store are read-only, which `from_numpy` would warn about.
    owned = (a if a.flags.writeable else a.copy() for a in (*arrays, terminal))
    return Transitions(*(torch.from_numpy(a) for a in owned))


def episode_steps(samples: SampleBatch) -> EpisodeSteps | None:
    """Returns where the rows stand in their episodes, if their worker has noted it."""
    if SampleBatch.EPS_ID not in samples:
        return None
    ended = np.asarray(samples[SampleBatch.TERMINATEDS]) | np.asarray(
        samples[SampleBatch.TRUNCATEDS]
    )
    return EpisodeSteps(samples[SampleBatch.EPS_ID], samples[SampleBatch.T], ended)


def refuse_k(k: int | None, policy: object) -> None:
    """Raises `ValueError` if a `k` is given to a policy that has no K."""
    if k is not None:
        raise ValueError(
            f"k={k} is not allowed: {type(policy).__name__} takes one action in each state. Leave "
            "k out; K is for QVPO, whose policy takes the best of K actions."
        )


def to_numpy(tensor: Tensor) -> NDArray[np.float32]:
    """Returns the numbers of `tensor`, which is float32, on the CPU and has no gradient."""
    array: NDArray[np.float32] = tensor.numpy()
    return array


def _to_cpu(value: Any) -> Any:
    """Returns a learner's state with its tensors copied to the CPU."""
    if isinstance(value, Tensor):
        # On a CPU `cpu()` alone would alias the live parameter.
        return value.detach().clone().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_cpu(item) for item in value]
    return value
