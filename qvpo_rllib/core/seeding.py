"""The independent streams of random numbers that a run spawns from its one seed.

RLlib adds small integers to a seed, so that neighbouring seeds share environments. Here
`numpy.random.SeedSequence` hashes the run's seed together with a key that names the stream, so any
two of (seed, purpose, indices) are independent.
"""

import enum

import numpy as np
import torch


class Stream(enum.IntEnum):
    """The purpose of a stream of random numbers. The values are part of every run's identity."""

    NETWORKS = 0
    LEARNER = 1
    REPLAY = 2
    ENVIRONMENT = 3  # indices: env steps at the last start, worker, environment
    ACTION = 4  # indices: env steps at the last start, worker, 1 for evaluation workers
    WARMUP = 5  # indices: env steps at the last start, worker
    EVALUATION = 6  # indices: env steps at the time, then the worker for the diffusion noise
    EPISODES = 7  # numbers, not seeds, of training's; indices: env steps at the last start, worker


def sequence(seed: int | None, stream: Stream, *indices: int) -> np.random.SeedSequence:
    """Returns a stream's seed sequence; for a run without a seed, fresh entropy each time."""
    if seed is None:
        return np.random.SeedSequence()
    return np.random.SeedSequence(seed, spawn_key=(int(stream), *indices))


def spawn_seed(seed: int | None, stream: Stream, *indices: int) -> int:
    """Returns a 63-bit seed for torch."""
    return _seed_of(sequence(seed, stream, *indices))


def environment_seed(
    seed: int | None, env_steps: int, worker: int, environment: int, again: int = 0
) -> int:
    """Returns a 32-bit seed for `reset`: environments hand it to generators that take no more.

    Args:
        env_steps: of the run at its last start.
        again: how often the environment has been replaced since.
    """
    indices = (env_steps, worker, environment, *([again] if again else []))
    return int(sequence(seed, Stream.ENVIRONMENT, *indices).generate_state(1, np.uint32)[0])


def episode_seeds(seed: int | None, env_steps: int, num_episodes: int) -> list[int]:
    """Returns a seed for each evaluation episode, the same whichever worker plays it."""
    parent = sequence(seed, Stream.EVALUATION, env_steps)
    return [int(s) for s in parent.generate_state(num_episodes, np.uint32)]


def restore_generator(generator: torch.Generator, state: torch.Tensor) -> None:
    """Restores a saved state; a state of another kind of device seeds the generator instead.

    A CUDA generator's state does not fit a CPU's. The stream then differs from the saved run's, but
    still follows from it.
    """
    state = state.cpu()
    if state.shape == generator.get_state().shape:
        generator.set_state(state)
        return
    words = np.frombuffer(state.numpy().tobytes(), dtype=np.uint32)
    generator.manual_seed(_seed_of(np.random.SeedSequence(words.tolist())))


def _seed_of(source: np.random.SeedSequence) -> int:
    low, high = source.generate_state(2, np.uint32)
    return int(low) | (int(high) & 0x7FFFFFFF) << 32
