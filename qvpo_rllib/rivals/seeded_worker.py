"""RLlib's rollout worker with this project's streams of random numbers."""

from typing import Any

import numpy as np
import torch
from ray.rllib.evaluation.rollout_worker import RolloutWorker

from qvpo_rllib.core.seeding import Stream, spawn_seed


class SeededRolloutWorker(RolloutWorker):  # type: ignore[misc]
    """RLlib adds small integers to a run's seed, so that neighbouring seeds share environments.

    Here every environment has a stream of its own, and so have the actions of remote workers.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.restart_streams(0)

    def restart_streams(self, env_steps: int) -> None:
        """New streams for this worker; those of a run that goes on depend on its `env_steps`."""
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
