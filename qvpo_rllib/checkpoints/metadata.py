"""What a QVPO checkpoint holds beside RLlib's own files, and the checks before one is loaded.

    qvpo.json            format, package version, environment, shapes, hyperparameters, ledger,
                         and length and digest of every other file; written last
    replay/*.arrow       the replay's transitions (`replay_files`)
    improved_actions.npy of an algorithm that improves actions in the replay, oldest first
    environments/*.zst   a rollout worker's environments and streams (`worker_state`)

RLlib's `algorithm_state.pkl` and `policies/` are pickles, and so is what `environments/` holds:
loading them runs code. `qvpo.json` is read first, so that a foreign or damaged checkpoint is
refused before anything is unpickled or touched.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from qvpo_rllib.files import FileRecord, check_file, record_of

FORMAT = 2
METADATA_FILE = "qvpo.json"
REPLAY_DIRECTORY = "replay"
IMPROVED_ACTIONS_FILE = "improved_actions.npy"
ENVIRONMENTS_DIRECTORY = "environments"
POLICIES_DIRECTORY = "policies"


def write_metadata(directory: Path, metadata: dict[str, Any]) -> None:
    """Writes `qvpo.json`, atomically and last: it lists the directory's other files.

    The replay's files are not looked at: `metadata["replay"]["segments"]` describes them.
    """
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    names = {str(p.relative_to(directory)): p for p in files if p.name != METADATA_FILE}
    records = {n: record_of(p) for n, p in names.items() if not n.startswith(REPLAY_DIRECTORY)}
    _replace(directory, {**metadata, "format": FORMAT, "files": records})


def _replace(directory: Path, metadata: dict[str, Any]) -> None:
    metadata = json.loads(json.dumps(metadata))  # as it will come back: keys are texts
    temporary = directory / f".{METADATA_FILE}.{os.getpid()}"
    content = {**metadata, "digest": _digest(metadata)}
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, directory / METADATA_FILE)


def _digest(metadata: dict[str, Any]) -> str:
    rest = {name: value for name, value in metadata.items() if name != "digest"}
    return str(xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode()))


def read_metadata(directory: Path) -> dict[str, Any]:
    """Returns the content of `qvpo.json`.

    Raises:
        ValueError: `directory` is no checkpoint, its `qvpo.json` is damaged, or of another format.
    """
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
        for name in ("algorithm", "env", "shapes", "hyperparameters", "ledger", "replay"):
            metadata[name]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}); use another checkpoint.") from error
    if found != FORMAT:
        raise ValueError(
            f"{str(directory)!r} is of checkpoint format {found!r}, written by qvpo_rllib "
            f"{metadata.get('package_version')}; this version reads format {FORMAT}. Install "
            "a matching version of qvpo_rllib."
        )
    if metadata.get("digest") != _digest(metadata):
        raise ValueError(
            f"{str(file)!r} is damaged: its content does not have the digest that it states; use "
            "another checkpoint."
        )
    return metadata


def check_files(directory: Path, metadata: dict[str, Any], under: str = "") -> None:
    """Raises `ValueError` unless every file that `metadata` lists is whole.

    Args:
        under: look at the files of this subdirectory alone.
    """
    for name, record in metadata["files"].items():
        if name.startswith(under):
            check_file(directory / name, FileRecord(*record))


def drop_replay(directory: Path) -> None:
    """Takes the replay out of a checkpoint: what is left acts, and trains after a new warm-up."""
    metadata = read_metadata(directory)
    metadata["replay"]["segments"] = None
    metadata["files"].pop(IMPROVED_ACTIONS_FILE, None)
    _replace(directory, metadata)
    shutil.rmtree(directory / REPLAY_DIRECTORY, ignore_errors=True)
    (directory / IMPROVED_ACTIONS_FILE).unlink(missing_ok=True)


def check_compatible(found: dict[str, Any], own: dict[str, Any], directory: Path) -> None:
    """Raises `ValueError` if checkpoint `found` does not fit the algorithm `own`."""
    pairs = [(name, found[name], own[name]) for name in ("algorithm", "env", "shapes")]
    theirs_hp, own_hp = found["hyperparameters"], own["hyperparameters"]
    pairs += [(name, theirs_hp.get(name), own_hp[name]) for name in own["fixed_by_checkpoint"]]
    for name, theirs, ours in pairs:
        if theirs != ours:
            raise ValueError(
                f"The checkpoint {str(directory)!r} was made with {name}={theirs!r}, but this run "
                f"has {name}={ours!r}. Use the same value, or another checkpoint; nothing was "
                "changed."
            )


def encode_replay_state(state: dict[str, Any]) -> dict[str, Any]:
    """`ReplayBuffer.state_dict()` as JSON."""
    return {**state, "generator": state["generator"].numpy().tobytes().hex()}


def decode_replay_state(state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `encode_replay_state`."""
    raw = np.frombuffer(bytes.fromhex(state["generator"]), dtype=np.uint8).copy()
    return {**state, "generator": torch.from_numpy(raw)}
