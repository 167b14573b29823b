"""What RLlib's own PPO, SPO and SAC get here: options, streams, evaluation, checkpoints."""

import functools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.env.vector_env import VectorEnv
from ray.rllib.evaluation.metrics import RolloutMetrics
from ray.rllib.evaluation.rollout_worker import RolloutWorker
from ray.rllib.utils.metrics.learner_info import LEARNER_STATS_KEY
from torch import Generator

from qvpo_rllib.core.errors import (
    ENDS_TRAINING,
    RAISED_BY_ENVIRONMENT,
    NonFiniteError,
    described,
)
from qvpo_rllib.core.seeding import Stream, environment_seed, spawn_seed
from qvpo_rllib.rollout.callbacks import EpisodeCallbacks, LastStep, WatchedEpisode
from qvpo_rllib.rollout.env_batch import EnvBatch, not_for_rllib
from qvpo_rllib.rollout.environments import action_scale, name_of
from qvpo_rllib.rollout.episodes import check_finite, environment_failure, run_episodes
from qvpo_rllib.rollout.outcomes import OutcomeCheck
from qvpo_rllib.rollout.policy import refuse_k
from qvpo_rllib.rollout.worker import episode_metrics, restart_of
from qvpo_rllib.rollout.wrapping import env_steps_of
from qvpo_rllib.runtime.base import BaseAlgorithm
from qvpo_rllib.runtime.config import BaseConfig
from qvpo_rllib.runtime.ray_private import last_failure, make_episodes, makes_vectors, note_failure

logger = logging.getLogger(__name__)


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


class CheckedVectorEnv(VectorEnv):  # type: ignore[misc]
    """RLlib's vector of environments, which checks and copies what they return.

    With `restarts`, an environment that raises is replaced. The exception of a step stands in the
    place of the observation, as RLlib expects it.
    """

    def __init__(self, vector_env: VectorEnv, where: str, *, restarts: bool) -> None:
        super().__init__(vector_env.observation_space, vector_env.action_space, vector_env.num_envs)
        self.restart_at = vector_env.restart_at
        self.try_render_at = vector_env.try_render_at
        self._envs: list[Any] = vector_env.get_sub_environments()
        self._restarts = restarts
        self._names = [f"{where}, environment {i})" for i in range(self.num_envs)]
        pairs = zip(self._envs, self._names, strict=True)
        self._checks = [OutcomeCheck(env, name, dtype=None) for env, name in pairs]
        self._lengths = [0] * self.num_envs
        self._scale = action_scale(self.action_space)
        # Observation, action and info of each environment's last step.
        self._last: list[tuple[Any, Any, Any]] = [(None, None, None)] * self.num_envs
        self.ended: deque[int] = deque()  # env steps of each episode that has ended
        self._seeds: dict[int, int] = {}  # of the next reset
        self._seed_of: Callable[[int, int], int] | None = None
        self._num_restarted = 0

    def seed(self, seed_of: Callable[[int, int], int]) -> None:
        """Gives the next reset of each environment a seed, and that of each replacement.

        Args:
            seed_of: called with the environment's index and how many were replaced since.
        """
        self._seed_of, self._num_restarted = seed_of, 0
        self._seeds = {i: seed_of(i, 0) for i in range(self.num_envs)}

    def get_sub_environments(self) -> list[Any]:
        return self._envs

    def last_step(self, i: int) -> LastStep:
        """Returns observation, action in [-1, 1] and info of environment `i`."""
        obs, action, info = self._last[i]
        return obs, action if action is None else self._scale.to_unit(np.asarray(action)), info

    def forget_ended(self, i: int) -> None:
        """Lets `last_step` return nothing until the next reset, unless that has come already."""
        if self._lengths[i] > 0:
            self._last[i] = (None, None, None)

    def vector_reset(
        self, *, seeds: Any = None, options: Any = None
    ) -> tuple[list[Any], list[Any]]:
        first = [self.reset_at(i) for i in range(self.num_envs)]
        return [obs for obs, _ in first], [info for _, info in first]

    def reset_at(
        self, index: int | None = None, *, seed: int | None = None, options: Any = None
    ) -> tuple[Any, Any]:
        i = index or 0
        self._lengths[i] = 0
        try:
            returned = self._envs[i].reset(seed=self._seeds.pop(i, seed), options=options)
        except RAISED_BY_ENVIRONMENT as error:
            self._replace(i, error)
            returned = self._envs[i].reset(seed=self._seeds.pop(i, seed), options=options)
        obs, info = self._checks[i].reset(returned)
        check_finite(obs, "observation", self._names[i], 0)
        self._last[i] = (obs, None, info)
        return obs, info

    def vector_step(self, actions: Sequence[Any]) -> tuple[list[Any], ...]:
        steps = [self._step(i, action) for i, action in enumerate(actions)]
        return tuple(list(column) for column in zip(*steps, strict=True))

    def _step(self, i: int, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._lengths[i] += 1
        try:
            # A copy, which the environment may change; RLlib's is read-only.
            returned = self._envs[i].step(np.array(action))
        except RAISED_BY_ENVIRONMENT as error:
            self._replace(i, error)
            # RLlib takes an exception for the end of a faulty episode, but no SystemExit.
            faulty = error if isinstance(error, Exception) else RuntimeError(described(error))
            return faulty, 0.0, True, True, {}
        step = self._checks[i].step(returned, self._lengths[i])
        check_finite(step[0], "observation", self._names[i], self._lengths[i])
        check_finite(step[1], "reward", self._names[i], self._lengths[i])
        self._last[i] = (step[0], action, step[4])
        if step[2] or step[3]:
            self.ended.append(env_steps_of(self._envs[i], self._lengths[i]))
        return step

    def _replace(self, i: int, error: BaseException) -> None:
        failure = environment_failure(self._names[i], error, self._lengths[i])
        if not self._restarts:
            raise failure from error
        logger.warning("%s. This environment alone is restarted.", failure)
        self.restart_at(i)
        self._num_restarted += 1
        if self._seed_of is not None:
            self._seeds[i] = self._seed_of(i, self._num_restarted)


class SeededRolloutWorker(RolloutWorker):  # type: ignore[misc]
    """RLlib's rollout worker with this project's streams of random numbers and its evaluation.

    RLlib adds small integers to a run's seed, so that neighbouring seeds share environments. Here
    every environment has a stream of its own, and so have the actions of remote workers.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.env is not None:
            self.async_env.vector_env = CheckedVectorEnv(
                self.async_env.vector_env,
                f"{name_of(self.config.env)} (worker {self.worker_index}",
                restarts=self.config.restart_failed_sub_environments,
            )
            make_episodes(self, self._new_episode)
        self.restart_streams(0)

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """RLlib's, but what ends training is returned; RLlib restarts a worker that raises."""

        def guarded(worker: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return func(worker, *args, **kwargs)
            except ENDS_TRAINING as error:
                return error
            except Exception as error:
                note_failure(described(error))
                raise

        return super().apply(guarded, *args, **kwargs)

    def _new_episode(self, i: int) -> WatchedEpisode:
        envs: CheckedVectorEnv = self.async_env.vector_env
        envs.forget_ended(i)
        return WatchedEpisode(
            i,
            self.policy_map,
            self.policy_mapping_fn,
            last=functools.partial(envs.last_step, i),
            worker=self,
            callbacks=self.callbacks,
        )

    def restart_streams(self, env_steps: int) -> None:
        """Gives this worker new streams; those of a run that goes on depend on its `env_steps`.

        An episode under way goes on with the old one.
        """
        seed = self.config.seed
        if self.env is None or self.config.in_evaluation or seed is None:
            return  # evaluation seeds every episode
        index = self.worker_index
        self.async_env.vector_env.seed(functools.partial(environment_seed, seed, env_steps, index))
        actions = spawn_seed(seed, Stream.ACTION, env_steps, index, 0)
        if index > 0 or env_steps > 0:  # the learner's process was seeded by the algorithm
            torch.manual_seed(actions)
            np.random.seed(actions % 2**32)  # noqa: NPY002  RLlib draws from it

    def get_metrics(self) -> list[RolloutMetrics]:
        """Returns RLlib's, in whose order episodes end, with lengths in env steps.

        RLlib counts the policy's steps, which are fewer where `frame_skip` is above 1.
        """
        metrics: list[RolloutMetrics] = super().get_metrics()
        if self.env is None or self.config.in_evaluation:
            return metrics
        ended = self.async_env.vector_env.ended
        return [
            m if m.episode_faulty else m._replace(episode_length=ended.popleft()) for m in metrics
        ]

    def evaluate_episodes(
        self,
        seeds: Sequence[int],
        action_seed: int,
        before_step: Callable[[], None] = lambda: None,
    ) -> list[RolloutMetrics] | Exception:
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

        scale, name = action_scale(envs[0].action_space), f"{name_of(self.config.env)} (evaluation)"
        hooks = EpisodeCallbacks(self)
        try:
            episodes = run_episodes(envs, act, scale, seeds, name, hooks, restart_of(self))
        except ENDS_TRAINING as error:
            return error
        return [episode_metrics(e.length, e.episode_return, e.extras) for e in episodes]


class OnRLlibConfig(BaseConfig):
    """Its `derive` turns the hyperparameters into RLlib's own settings."""

    honoured_too = frozenset({"metrics_episode_collection_timeout_s", "ignore_env_runner_failures"})
    takes_vectors = False

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class)
        self.exploration_config = {"type": "StochasticSampling"}
        # New minibatches in every epoch; RLlib's loader for several GPUs cuts a batch up once.
        self.simple_optimizer = True
        self.env_runners(env_runner_cls=SeededRolloutWorker)
        self.fault_tolerance(
            delay_between_env_runner_restarts_s=1.0,
            num_consecutive_env_runner_failures_tolerance=3,
        )

    def validate(self) -> None:
        super().validate()
        if makes_vectors(self.env):
            raise ValueError(not_for_rllib(name_of(self.env)))


class OnRLlibAlgorithm(BaseAlgorithm):
    """A subclass puts it before RLlib's own algorithm in its bases."""

    def finish_setup(self) -> None:
        group = self.env_runner_group
        group.foreach_env_runner = _raising(group.foreach_env_runner)
        self._restarts_at_samples = 0

    @staticmethod
    def validate_env(env: Any, env_context: Any) -> None:
        if isinstance(env, EnvBatch):
            raise ValueError(not_for_rllib(env.where))
        BaseAlgorithm.validate_env(env, env_context)

    @property
    def updates(self) -> int:
        return int(self.get_policy().num_grad_updates)

    def training_step(self) -> dict[str, Any]:
        self.raise_if_stop_requested()
        before = self.env_steps
        try:
            results: dict[str, Any] = super().training_step()
        except ValueError as error:  # a distribution's, whose parameters have become NaN
            if all(p.isfinite().all() for p in self.get_policy().model.parameters()):
                raise
            raise self._refuse("loss", math.nan) from error
        if self.env_steps > before:
            self._restarts_at_samples = self.env_runner_group.num_remote_worker_restarts()
        else:
            self._raise_if_workers_keep_failing()
        for result in results.values():
            stats = result[LEARNER_STATS_KEY]
            # Some are arrays of one number, and a few are arrays of many, which no table has.
            result[LEARNER_STATS_KEY] = {n: v.item() for n, v in _single_numbers(stats)}
            for name, value in result[LEARNER_STATS_KEY].items():
                # Other numbers may be infinite on purpose, such as an unused bound.
                if "loss" in name and not math.isfinite(value):
                    raise self._refuse(name, value)
        return results

    def _raise_if_workers_keep_failing(self) -> None:
        """RLlib alone restarts them a thousand times, and then goes on without any."""
        restarts = self.env_runner_group.num_remote_worker_restarts() - self._restarts_at_samples
        tolerated = self.config.num_consecutive_env_runner_failures_tolerance
        if restarts > tolerated * self.config.num_env_runners > 0:
            raise RuntimeError(
                f"{name_of(self.config.env)}: the rollout workers were restarted {restarts} times "
                "without an env step between (num_consecutive_env_runner_failures_tolerance="
                f"{tolerated}). Training stops here; the last checkpoint is untouched. The last "
                f"failure: {last_failure()}"
            )

    def _refuse(self, quantity: str, value: float) -> NonFiniteError:
        return self.non_finite(quantity, value, "Lower the learning rates, or set grad_clip.")


def _raising(foreach: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """`foreach`, which raises what ended training in a remote worker (`SeededRolloutWorker.apply`).

    RLlib's own training step asks the workers, and would take it for a batch.
    """

    @functools.wraps(foreach)
    def raising(*arguments: Any, **options: Any) -> list[Any]:
        results = foreach(*arguments, **options)
        for result in results:
            if isinstance(result, ENDS_TRAINING):
                raise result
        return results

    return raising


def _single_numbers(stats: dict[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    arrays = ((name, np.asarray(value)) for name, value in stats.items())
    return ((name, array) for name, array in arrays if array.size == 1)
