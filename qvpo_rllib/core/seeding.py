"""One seed for a run, and independent streams spawned from it for everything that is random.

Adding small integers to a seed, as RLlib does, makes neighbouring seeds share environments.
`numpy.random.SeedSequence` hashes the run's seed together with a key that says what the stream is
for, so any two (seed, purpose, indices) are independent.
"""

import enum

import numpy as np


class Stream(enum.IntEnum):
    """What a stream of random numbers is for. The numbers are part of every run's identity."""

    NETWORKS = 0
    LEARNER = 1
    REPLAY = 2
    ENVIRONMENT = 3  # indices: worker, environment
    ACTION = 4  # indices: worker, 1 for evaluation workers
    WARMUP = 5  # indices: worker
    EVALUATION = 6  # indices: env steps at the time


def sequence(seed: int | None, stream: Stream, *indices: int) -> np.random.SeedSequence:
    """The seed sequence of a stream; a run without a seed gets fresh entropy each time."""
    if seed is None:
        return np.random.SeedSequence()
    return np.random.SeedSequence(seed, spawn_key=(int(stream), *indices))


def spawn_seed(seed: int | None, stream: Stream, *indices: int) -> int:
    """A 63-bit seed for torch or Gymnasium."""
    low, high = sequence(seed, stream, *indices).generate_state(2, np.uint32)
    return int(low) | (int(high) & 0x7FFFFFFF) << 32


def episode_seeds(seed: int | None, env_steps: int, num_episodes: int) -> list[int]:
    """One environment seed per evaluation episode: the same whoever runs the episode."""
    parent = sequence(seed, Stream.EVALUATION, env_steps)
    return [int(s) for s in parent.generate_state(num_episodes, np.uint32)]
