"""Writes the checkpoints of Ray Tune's trials to where they stay.

Tune's own `Trainable.save` writes a checkpoint to a temporary directory and copies all of it to the
trial's: a replay of gigabytes twice each time, though little of it is new. `save_in_place` writes
to the trial's directory itself, and links what the checkpoint before it has (`replay_files`).
"""

from pathlib import Path
from typing import Any

from pyarrow.fs import LocalFileSystem
from ray.train._internal.checkpoint_manager import _TrainingResult
from ray.tune import Checkpoint


def is_local(storage: Any) -> bool:
    """Returns whether a trainable can write its storage's files itself; None is no storage."""
    return storage is not None and isinstance(storage.storage_filesystem, LocalFileSystem)


def save_in_place(algorithm: Any) -> Any:
    """Saves as `Trainable.save()` does, by `algorithm.save_checkpoint` alone, and returns the same.

    Raises:
        RuntimeError: from Tune: the storage's directory is not the one of the driver's machine.
    """
    storage, metrics = algorithm._storage, dict(algorithm._last_result or {})
    storage._check_validation_file()
    storage._update_checkpoint_index(metrics)
    directory = Path(storage.checkpoint_fs_path)
    algorithm.save_checkpoint(str(directory))
    storage.persist_artifacts(force=storage.sync_config.sync_artifacts_on_checkpoint)
    saved = Checkpoint(str(directory), storage.storage_filesystem)
    return _TrainingResult(checkpoint=saved, metrics=metrics)
