"""What a QVPO checkpoint holds beside RLlib's own files, and the checks before one is loaded.

    qvpo.json      format, package version, environment, shapes, hyperparameters, ledger
    replay.arrow   the replay's transitions, oldest first (Arrow IPC, memory-mapped on load)

RLlib's `algorithm_state.pkl` and `policies/` are pickles: loading them runs code. `qvpo.json` is
read first, so that a foreign checkpoint is refused before anything is unpickled or touched.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from qvpo_rllib.core.replay import ReplayBuffer, Transitions

FORMAT = 1
METADATA_FILE = "qvpo.json"
REPLAY_FILE = "replay.arrow"
ROWS_PER_BATCH = 65_536


def write_metadata(directory: Path, metadata: dict[str, Any]) -> None:
    """Writes `qvpo.json`, atomically."""
    temporary = directory / f".{METADATA_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps({"format": FORMAT, **metadata}, indent=2) + "\n")
    os.replace(temporary, directory / METADATA_FILE)


def read_metadata(directory: Path) -> dict[str, Any]:
    """Reads `qvpo.json`. Raises `ValueError` if `directory` is no checkpoint of this format."""
    if not directory.is_dir():
        raise ValueError(f"There is no checkpoint directory {str(directory)!r}.")
    file = directory / METADATA_FILE
    if not file.is_file():
        raise ValueError(
            f"{str(directory)!r} is not a QVPO checkpoint: it has no {METADATA_FILE}. Give the "
            "directory of `algo.save()`, or a run's checkpoints/last or checkpoints/best."
        )
    try:
        metadata: dict[str, Any] = json.loads(file.read_text())
        found = metadata["format"]
        for name in ("env", "shapes", "hyperparameters", "ledger", "replay"):
            metadata[name]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}); use another checkpoint.") from error
    if found != FORMAT:
        raise ValueError(
            f"{str(directory)!r} is of checkpoint format {found!r}, written by qvpo_rllib "
            f"{metadata.get('package_version')}; this version reads format {FORMAT}. Install a "
            "matching version of qvpo_rllib."
        )
    return metadata


def check_compatible(found: dict[str, Any], own: dict[str, Any], directory: Path) -> None:
    """Raises `ValueError` if checkpoint `found` does not fit the algorithm `own`."""
    fixed = ("hidden", "diffusion_steps", "noise_schedule")
    pairs = [("env", found["env"], own["env"]), ("shapes", found["shapes"], own["shapes"])]
    pairs += [(n, found["hyperparameters"][n], own["hyperparameters"][n]) for n in fixed]
    for name, theirs, ours in pairs:
        if theirs != ours:
            raise ValueError(
                f"The checkpoint {str(directory)!r} was made with {name}={theirs!r}, but this run "
                f"has {name}={ours!r}. Use the same value, or another checkpoint; nothing was "
                "changed."
            )


def save_replay(file: Path, replay: ReplayBuffer) -> None:
    """Writes the held transitions, oldest first, as an Arrow IPC file, a part at a time."""
    widths = {n: c.shape[1:] for n, c in replay.columns._asdict().items()}
    schema = pa.schema([(n, _arrow_type(tuple(w))) for n, w in widths.items()])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for segment in replay.segments():
            for start in range(0, segment.reward.shape[0], ROWS_PER_BATCH):
                part = [c[start : start + ROWS_PER_BATCH].cpu().numpy() for c in segment]
                writer.write_batch(pa.record_batch([_arrow_array(c) for c in part], schema=schema))


def load_replay(file: Path) -> Transitions:
    """The transitions in a file of `save_replay`, memory-mapped. Raises `ValueError` if damaged."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        if table.schema.names != list(Transitions._fields):
            raise pa.ArrowInvalid(f"its columns are {table.schema.names}")
        columns = [table.column(n).combine_chunks() for n in Transitions._fields]
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"The replay {str(file)!r} is damaged ({error}); use another checkpoint."
        ) from error
    return Transitions(*(torch.from_numpy(_numpy(c)) for c in columns))


def _arrow_type(width: tuple[int, ...]) -> pa.DataType:
    return pa.list_(pa.float32(), width[0]) if width else pa.float32()


def _arrow_array(column: np.ndarray) -> pa.Array:
    if column.ndim == 1:
        return pa.array(column)
    return pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), column.shape[1])


def _numpy(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else column.combine_chunks()
    if pa.types.is_fixed_size_list(column.type):
        flat = column.flatten().to_numpy(zero_copy_only=True)
        return np.array(flat.reshape(-1, column.type.list_size))
    return np.array(column.to_numpy(zero_copy_only=True))


def encode_replay_state(state: dict[str, Any]) -> dict[str, Any]:
    """`ReplayBuffer.state_dict()` as JSON."""
    return {**state, "generator": state["generator"].numpy().tobytes().hex()}


def decode_replay_state(state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `encode_replay_state`."""
    raw = np.frombuffer(bytes.fromhex(state["generator"]), dtype=np.uint8).copy()
    return {**state, "generator": torch.from_numpy(raw)}
