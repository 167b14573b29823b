"""What RLlib's own PPO, SPO and SAC get here: options, streams, evaluation, checkpoints."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.evaluation.metrics import RolloutMetrics
from ray.rllib.evaluation.rollout_worker import RolloutWorker
from ray.rllib.utils.metrics.learner_info import LEARNER_STATS_KEY
from torch import Generator

from qvpo_rllib.core.errors import NonFiniteError
from qvpo_rllib.core.seeding import Stream, spawn_seed
from qvpo_rllib.rollout.environments import action_scale, check_spaces
from qvpo_rllib.rollout.episodes import run_episodes
from qvpo_rllib.rollout.policy import refuse_k
from qvpo_rllib.runtime.base import BaseAlgorithm
from qvpo_rllib.runtime.config import BaseConfig


class ChoosingPolicy:
    """Lets RLlib's own policy class, before which it stands, act as this package's policies do."""

    def act(
        self: Any,
        obs: NDArray[np.floating],
        *,
        explore: bool = False,
        k: int | None = None,
        generator: Generator | None = None,
    ) -> NDArray[np.float32]:
        """Returns an action for each observation: [B, O] → [B, A] in [-1, 1].

        Args:
            explore: whether to draw them; else they are the distribution's mode.
            k: must be None, since the policy takes one action in each state.
            generator: has no effect, since RLlib draws from PyTorch's own stream.
        """
        refuse_k(k, self)
        actions = self.compute_actions(np.asarray(obs, np.float32), explore=explore)[0]
        return np.asarray(np.clip(actions, -1.0, 1.0), np.float32)

    def export_model(self: Any, export_dir: str, onnx: int | None = None) -> None:
        """Writes `model.pt`, RLlib's model for `torch.load`. Raises `ValueError` for `onnx`."""
        if onnx:
            raise ValueError(f"{type(self).__name__} has no ONNX: qvpo export has QVPO's.")
        super().export_model(export_dir)  # type: ignore[misc]

    def set_state(self: Any, state: dict[str, Any]) -> None:
        """Restores `get_state()`; this policy's own options stay in force."""
        super().set_state({k: v for k, v in state.items() if k != "policy_spec"})  # type: ignore[misc]
        self.num_grad_updates = state["num_grad_updates"]
        self.restore_options()

    def restore_options(self) -> None:
        """Puts the options back in force that came with a state's weights or optimisers."""
        raise NotImplementedError


class SeededRolloutWorker(RolloutWorker):  # type: ignore[misc]
    """RLlib's rollout worker with this project's streams of random numbers and its evaluation.

    RLlib adds small integers to a run's seed, so that neighbouring seeds share environments. Here
    every environment has a stream of its own, and so have the actions of remote workers.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.restart_streams(0)

    def restart_streams(self, env_steps: int) -> None:
        """Gives this worker new streams; those of a run that goes on depend on its `env_steps`."""
        seed = self.config.seed
        if self.env is None or self.config.in_evaluation or seed is None:
            return  # evaluation seeds every episode
        index = self.worker_index
        for i, env in enumerate(self.async_env.get_sub_environments()):
            stream = spawn_seed(seed, Stream.ENVIRONMENT, env_steps, index, i)
            # Not by `reset`, which would cut short an episode under way.
            env.unwrapped.np_random = np.random.default_rng(stream)
        actions = spawn_seed(seed, Stream.ACTION, env_steps, index, 0)
        if index > 0 or env_steps > 0:  # the learner's process was seeded by the algorithm
            torch.manual_seed(actions)
            np.random.seed(actions % 2**32)  # noqa: NPY002  RLlib draws from it

    def evaluate_episodes(
        self,
        seeds: Sequence[int],
        action_seed: int,
        before_step: Callable[[], None] = lambda: None,
    ) -> list[RolloutMetrics] | NonFiniteError:
        """Plays one whole episode per seed, acting with the distribution's mode.

        Args:
            seeds: the environments' seeds, one per episode.
            action_seed: unused: nothing is drawn.
            before_step: is called before every step; what it raises ends the evaluation.
        """
        envs, policy = self.async_env.get_sub_environments(), self.get_policy()

        def act(obs: NDArray[np.float32]) -> tuple[NDArray[np.float32], None]:
            before_step()
            return policy.act(obs), None

        scale, name = action_scale(envs[0].action_space), f"{self.config.env} (evaluation)"
        try:
            episodes = run_episodes(envs, act, scale, seeds, name)
        except NonFiniteError as error:
            return error
        return [RolloutMetrics(e.length, e.episode_return) for e in episodes]


class OnRLlibConfig(BaseConfig):
    """Its `derive` turns the hyperparameters into RLlib's own settings."""

    honoured_too = frozenset({"metrics_episode_collection_timeout_s", "ignore_env_runner_failures"})

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class)
        self.exploration_config = {"type": "StochasticSampling"}
        # New minibatches in every epoch; RLlib's loader for several GPUs cuts a batch up once.
        self.simple_optimizer = True
        self.env_runners(env_runner_cls=SeededRolloutWorker)


class OnRLlibAlgorithm(BaseAlgorithm):
    """A subclass puts it before RLlib's own algorithm in its bases."""

    @staticmethod
    def validate_env(env: Any, env_context: Any) -> None:
        """Refuses spaces that RLlib would take, such as discrete actions; see `check_spaces`."""
        check_spaces(env.observation_space, env.action_space)

    @property
    def updates(self) -> int:
        return int(self.get_policy().num_grad_updates)

    def training_step(self) -> dict[str, Any]:
        self.raise_if_stop_requested()
        try:
            results: dict[str, Any] = super().training_step()
        except ValueError as error:  # a distribution's, whose parameters have become NaN
            if all(p.isfinite().all() for p in self.get_policy().model.parameters()):
                raise
            raise self._refuse("loss", math.nan) from error
        for result in results.values():
            stats = result[LEARNER_STATS_KEY]
            # Some are arrays of one number, and a few are arrays of many, which no table has.
            result[LEARNER_STATS_KEY] = {n: v.item() for n, v in _single_numbers(stats)}
            for name, value in result[LEARNER_STATS_KEY].items():
                # Other numbers may be infinite on purpose, such as an unused bound.
                if "loss" in name and not math.isfinite(value):
                    raise self._refuse(name, value)
        return results

    def _refuse(self, quantity: str, value: float) -> NonFiniteError:
        return self.non_finite(quantity, value, "Lower the learning rates, or set grad_clip.")


def _single_numbers(stats: dict[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    arrays = ((name, np.asarray(value)) for name, value in stats.items())
    return ((name, array) for name, array in arrays if array.size == 1)
