"""A checkpoint's replay as a Parquet data set: the code behind `qvpo replay export`.

One row is a transition, oldest first; the columns have the names of RLlib's offline API:

    obs, new_obs   [O] float32; at a time limit too, new_obs is the episode's own last observation
    actions        [A] float32, in the environment's box
    rewards        float32
    terminateds    true where the return ends
    truncateds     false: transitions of several environments are interleaved, so each row stands
                   for itself
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qvpo_rllib.checkpoints.metadata import REPLAY_DIRECTORY, Metadata
from qvpo_rllib.checkpoints.named import find
from qvpo_rllib.checkpoints.replay_files import Segment, check_segments, read_segments
from qvpo_rllib.checkpoints.staging import committed
from qvpo_rllib.core.action_scale import ActionScale
from qvpo_rllib.core.replay import Transitions
from qvpo_rllib.files import OutputDirectory


@dataclass(frozen=True)
class Export:
    """The data set that was written."""

    directory: Path
    env: str
    transitions: int
    num_bytes: int


def export_replay(path: Path, out: Path) -> Export:
    """Writes the replay of a run's last checkpoint, or of the checkpoint at `path`, to `out`.

    One file for each segment of the replay, so that memory holds one at a time. Nothing is
    unpickled.

    Raises:
        ValueError: no checkpoint or a damaged one, one without a replay, or `out` holds something.
    """
    path = path.expanduser().resolve()
    directory = committed(find(path, "last") or path)
    metadata = Metadata.read(directory)
    replay = metadata.replay
    if not replay["segments"]:
        what = "no replay" if replay["segments"] is None else "an empty replay"
        raise ValueError(
            f"The checkpoint {str(directory)!r} has {what}: there is nothing to export. A run's "
            "checkpoints/last has one, unless it was trained with replay_in_checkpoints=False; "
            "checkpoints/best has none."
        )
    segments = [Segment(**segment) for segment in replay["segments"]]
    files = directory / REPLAY_DIRECTORY
    check_segments(files, segments)
    parts = read_segments(files, segments, max(0, replay["num_added"] - replay["capacity"]))
    scale = ActionScale(*(np.array(bound, np.float32) for bound in metadata.action_box))
    held = num_bytes = 0
    with OutputDirectory(out) as output:
        for i, part in enumerate(parts):
            file = output.path / f"part-{i:05d}.parquet"
            pq.write_table(_table(part, scale), file)
            held += part.reward.shape[0]
            num_bytes += file.stat().st_size
    return Export(output.path, metadata.env, held, num_bytes)


def _table(part: Transitions, scale: ActionScale) -> pa.Table:
    """Returns transitions as the rows of a table."""
    columns = {name: column.numpy() for name, column in part._asdict().items()}
    terminateds = columns["terminal"] != 0
    return pa.table(
        {
            "obs": _vectors(columns["obs"]),
            "actions": _vectors(scale.to_env(columns["action"])),
            "rewards": pa.array(columns["reward"]),
            "new_obs": _vectors(columns["next_obs"]),
            "terminateds": pa.array(terminateds),
            "truncateds": pa.array(np.zeros_like(terminateds)),
        }
    )


def _vectors(rows: NDArray[np.floating]) -> pa.Array:
    """Returns Arrow's tensor type: Ray Data gives batches [B, O], other readers see lists."""
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(rows, np.float32))
