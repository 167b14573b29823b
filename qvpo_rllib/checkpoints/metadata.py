"""What a checkpoint holds beside RLlib's own files, and the checks before one is loaded.

    qvpo.json            format, versions, environment, shapes, hyperparameters, ledger, and length
                         and digest of every other file; written last
    replay/*.arrow       the replay's transitions (`replay_files`)
    improved_actions.npy of an algorithm that improves actions in the replay, oldest first
    steps_to_successors.npy with n_step > 1: how far behind each transition its next step is
    environments/*.zst   a rollout worker's environments and streams (`worker_state`)

RLlib's `algorithm_state.pkl` and `policies/` are pickles, and so is what `environments/` holds:
loading them runs code. `qvpo.json` is read first, so that a foreign or damaged checkpoint is
refused before anything is unpickled or touched.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import xxhash

from qvpo_rllib.core.options import Options, completed
from qvpo_rllib.files import FileRecord, check_file, record_of, write_atomically
from qvpo_rllib.version import __version__

FORMAT = 2
METADATA_FILE = "qvpo.json"
REPLAY_DIRECTORY = "replay"
IMPROVED_ACTIONS_FILE = "improved_actions.npy"
SUCCESSORS_FILE = "steps_to_successors.npy"
BESIDE_REPLAY = (IMPROVED_ACTIONS_FILE, SUCCESSORS_FILE)
ENVIRONMENTS_DIRECTORY = "environments"
POLICIES_DIRECTORY = "policies"


def plain(value: Any) -> Any:
    """Returns `value` as it comes back from JSON. Raises `TypeError` if JSON cannot hold it."""
    return json.loads(json.dumps(value))


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The content of `qvpo.json`, all of it as JSON has it.

    Attributes:
        algorithm: whose checkpoint it is, "QVPO" or another.
        env_config: arguments of the environment, as `encode_env_config` gives them.
        shapes: numbers of observations and of action dimensions.
        action_box: lower and upper bounds of the actions.
        observation_parts: of a Dict or Tuple observation, in the vector's order
            (`ObservationParts.to_json`); None if it was a vector already.
        seed: of the run.
        fixed_by_checkpoint: hyperparameters that must stay as they are when a run goes on.
        ledger: env steps taken in ("ingested"), updates done ("done") and, with a replay, the rest
            of `UpdateLedger.state_dict`.
        replay: `ReplayBuffer.state_dict`, encoded, and its `segments`, None if none were saved.
        workers: indices of the rollout workers whose state was saved.
        files: by name: length and digest of all other files, but the replay's.
    """

    algorithm: str
    env: str
    env_config: dict[str, Any]
    shapes: list[int]
    action_box: list[list[float]]
    seed: int | None
    hyperparameters: dict[str, Any]
    fixed_by_checkpoint: list[str]
    ledger: dict[str, int]
    observation_parts: list[dict[str, Any]] | None = None
    replay: dict[str, Any] = field(default_factory=lambda: {"segments": None})
    workers: list[int] = field(default_factory=list)
    files: dict[str, list[Any]] = field(default_factory=dict)
    package_version: str = __version__
    ray_version: str = ray.__version__
    torch_version: str = str(torch.__version__)

    @classmethod
    def read(cls, directory: Path) -> "Metadata":
        """Returns the metadata of the checkpoint in `directory`.

        Raises:
            ValueError: `directory` is no checkpoint, or its `qvpo.json` is damaged or of another
                format.
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
            content = json.loads(file.read_text())
            stated, found = content.pop("digest"), content["format"]
            if found != FORMAT:
                raise ValueError(
                    f"{str(directory)!r} is of checkpoint format {found!r}, written by qvpo_rllib "
                    f"{content.get('package_version')}; this version reads format {FORMAT}. "
                    "Install a matching version of qvpo_rllib."
                )
            if stated != _digest(content):
                raise ValueError(
                    f"{str(file)!r} is damaged: its content does not have the digest that it "
                    "states; use another checkpoint."
                )
            del content["format"]
            return cls(**content)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{str(file)!r} is damaged ({e}); use another checkpoint.") from e

    def write(self, directory: Path) -> None:
        """Writes `qvpo.json`, atomically and last: it lists the directory's other files."""
        names = {str(p.relative_to(directory)): p for p in directory.rglob("*") if p.is_file()}
        files = {
            name: list(record_of(path))
            for name, path in sorted(names.items())
            # The replay's segments describe themselves.
            if name != METADATA_FILE and not name.startswith(REPLAY_DIRECTORY)
        }
        replace(self, files=files)._put(directory)

    def _put(self, directory: Path) -> None:
        content = plain({"format": FORMAT, **asdict(self)})
        text = json.dumps(content | {"digest": _digest(content)}, indent=2) + "\n"
        write_atomically(directory / METADATA_FILE, text.encode())

    def check_files(self, directory: Path, under: str = "") -> None:
        """Raises `ValueError` unless every file that is listed is whole.

        Args:
            under: look at the files of this subdirectory alone.
        """
        for name, record in self.files.items():
            if name.startswith(under):
                check_file(directory / name, FileRecord(*record))

    def check_fits(self, own: "Metadata", directory: Path, kind: type[Options]) -> None:
        """Raises `ValueError` if the run `own`, with options of `kind`, cannot go on from here."""
        names = ("algorithm", "env", "shapes", "observation_parts")
        pairs = [(n, getattr(self, n), getattr(own, n)) for n in names]
        made_with, ours_now = (completed(m.hyperparameters, kind) for m in (self, own))
        pairs += [(n, made_with[n], ours_now[n]) for n in own.fixed_by_checkpoint]
        for name, theirs, ours in pairs:
            if theirs != ours:
                raise ValueError(
                    f"The checkpoint {str(directory)!r} was made with {name}={theirs!r}, but this "
                    f"run has {name}={ours!r}. Use the same value, or another checkpoint; nothing "
                    "was changed."
                )


def drop_replay(directory: Path) -> None:
    """Takes the replay out of a checkpoint: what is left acts, and trains after a new warm-up."""
    metadata = Metadata.read(directory)
    if metadata.replay["segments"] is None:
        return
    files = {n: record for n, record in metadata.files.items() if n not in BESIDE_REPLAY}
    replace(metadata, replay={**metadata.replay, "segments": None}, files=files)._put(directory)
    shutil.rmtree(directory / REPLAY_DIRECTORY, ignore_errors=True)
    for name in BESIDE_REPLAY:
        (directory / name).unlink(missing_ok=True)


def encode_replay_state(state: dict[str, Any]) -> dict[str, Any]:
    """Returns `ReplayBuffer.state_dict()` as JSON has it."""
    return {**state, "generator": state["generator"].numpy().tobytes().hex()}


def decode_replay_state(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the inverse of `encode_replay_state`."""
    raw = np.frombuffer(bytes.fromhex(state["generator"]), dtype=np.uint8).copy()
    return {**state, "generator": torch.from_numpy(raw)}


def _digest(content: dict[str, Any]) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))
