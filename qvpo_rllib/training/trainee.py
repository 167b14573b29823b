"""How a training run drives an algorithm: one class for RLlib's own, one for those of this package.

The training loop, its run directory and its status know nothing else of an algorithm.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvpo_rllib.checkpoints import metadata as checkpoint
from qvpo_rllib.checkpoints.run_state import RunState
from qvpo_rllib.checkpoints.staging import committed


class Trainee:
    """An algorithm of RLlib's own (`rivals.rllib_algorithm`)."""

    # Takes out of a checkpoint directory that is kept for its policy what only training needs.
    prune: Callable[[Path], None] | None = None

    def __init__(self, algorithm: Any) -> None:
        self.algorithm = algorithm

    @staticmethod
    def check(directory: Path) -> None:
        """Raises `ValueError` unless every file of the checkpoint is whole; needs no algorithm."""
        files = committed(directory)
        checkpoint.check_files(files, checkpoint.read_metadata(files))

    @property
    def env_steps(self) -> int:
        return int(self.algorithm.env_steps)

    @property
    def updates(self) -> int:
        """Gradient steps so far."""
        return int(self.algorithm.updates)

    @property
    def stop_requested(self) -> bool:
        return bool(self.algorithm.stop_requested)

    def request_stop(self) -> None:
        """Training ends between two training steps; may be called from a signal handler."""
        self.algorithm.stop_requested = True

    def drain(self) -> None:
        """Takes in what is still being sampled; may add env steps."""

    def save(self, directory: Path) -> None:
        self.algorithm.save_checkpoint(str(directory))

    def saved_in(self, directory: Path) -> None:
        """The checkpoint just saved has been moved to `directory`."""

    def restore(self, directory: Path) -> None:
        self.algorithm.restore(str(directory))


class OffPolicyTrainee(Trainee):
    """An algorithm on this package's replay and workers, such as QVPO."""

    prune = staticmethod(checkpoint.drop_replay)

    @staticmethod
    def check(directory: Path) -> None:
        RunState.read(committed(directory))

    @property
    def env_steps(self) -> int:
        return int(self.algorithm.ledger.ingested)

    @property
    def updates(self) -> int:
        return int(self.algorithm.ledger.done)

    def drain(self) -> None:
        self.algorithm.drain()

    def saved_in(self, directory: Path) -> None:
        self.algorithm.replay_files.moved(directory / checkpoint.REPLAY_DIRECTORY)
