"""What a run is beside RLlib's own state: ledger, replay, rollout workers in mid-episode."""

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qvpo_rllib.checkpoints import metadata as checkpoint
from qvpo_rllib.checkpoints import worker_state
from qvpo_rllib.checkpoints.replay_files import Segment, check_segments, read_segments
from qvpo_rllib.core.replay import Transitions

if TYPE_CHECKING:
    from qvpo_rllib.runtime.algorithm import OffPolicyAlgorithm

logger = logging.getLogger(__name__)

CAPTURE_TIMEOUT_S = 60.0


def write(algorithm: "OffPolicyAlgorithm", directory: Path) -> list[Segment] | None:
    """Writes environments, replay and `qvpo.json` beside RLlib's files in `directory`.

    Returns the replay's segments, or None if checkpoints hold no replay.
    """
    environments = directory / checkpoint.ENVIRONMENTS_DIRECTORY
    environments.mkdir()
    group = algorithm.env_runner_group
    # A worker that is dead or hangs is not waited for: it starts anew when the run goes on.
    captured = group.foreach_env_runner(
        worker_state.capture,
        local_env_runner=group.num_remote_env_runners() == 0,
        timeout_seconds=CAPTURE_TIMEOUT_S,
    )
    for worker in captured:
        _worker_file(directory, worker.worker_index).write_bytes(worker.state)
    texts = [text for worker in captured for text in worker.not_captured]
    if texts and not algorithm.told_of_new_episodes:
        algorithm.told_of_new_episodes = True
        logger.warning(
            "The state of %d environments cannot be captured: when a run goes on from a checkpoint "
            "they start a new episode. %s",
            len(texts),
            texts[0],
        )
    metadata = algorithm.metadata() | {"workers": [worker.worker_index for worker in captured]}
    segments = None
    if algorithm.config.replay_in_checkpoints:
        replay = directory / checkpoint.REPLAY_DIRECTORY
        segments = algorithm.replay_files.write(replay, algorithm.replay)
        metadata["replay"]["segments"] = [s.to_dict() for s in segments]
        if algorithm.replay.improved_action is not None:
            file = directory / checkpoint.IMPROVED_ACTIONS_FILE
            np.save(file, algorithm.replay.improved_actions().cpu().numpy())
    checkpoint.write_metadata(directory, metadata)
    return segments


@dataclass(frozen=True)
class RunState:
    """A checkpoint that has been checked and can be put into an algorithm."""

    directory: Path
    metadata: dict[str, Any]
    segments: list[Segment] | None  # None: the checkpoint has no replay
    transitions: list[Transitions]  # memory-mapped, oldest first
    improved_actions: Tensor | None  # oldest first
    workers: dict[int, bytes]  # by worker index

    @classmethod
    def read(cls, directory: Path, own: dict[str, Any] | None = None) -> "RunState":
        """Checks every file of the checkpoint in `directory`; touches no algorithm.

        Args:
            own: `metadata()` of the algorithm that is to go on from it; None: of any.

        Raises:
            ValueError: no checkpoint, of another format, environment or shape, or damaged.
        """
        metadata = checkpoint.read_metadata(directory)
        if own is not None:
            checkpoint.check_compatible(metadata, own, directory)
        checkpoint.check_files(directory, metadata)
        replay = metadata["replay"]
        segments, transitions = None, []
        if replay["segments"] is not None:
            segments = [Segment(**segment) for segment in replay["segments"]]
            files = directory / checkpoint.REPLAY_DIRECTORY
            check_segments(files, segments)
            oldest = max(0, replay["num_added"] - replay["capacity"])
            transitions = read_segments(files, segments, oldest)
        improved = None
        if checkpoint.IMPROVED_ACTIONS_FILE in metadata["files"]:
            file = directory / checkpoint.IMPROVED_ACTIONS_FILE
            improved = torch.from_numpy(np.load(file, allow_pickle=False))
        workers = {
            index: file.read_bytes()
            for index in metadata["workers"]
            for file in [_worker_file(directory, index)]
        }
        return cls(directory, metadata, segments, transitions, improved, workers)

    def restore_into(self, algorithm: "OffPolicyAlgorithm") -> None:
        """Ledger, replay and workers; RLlib has restored the rest."""
        self._put_ledger(algorithm)
        self._put_replay(algorithm)
        texts = self._put_workers(algorithm)
        if texts:
            logger.warning(
                "%d environments or workers start new episodes instead of going on in mid-episode. "
                "%s",
                len(texts),
                texts[0],
            )

    def _put_ledger(self, algorithm: "OffPolicyAlgorithm") -> None:
        ledger, hp = algorithm.ledger, algorithm.hp
        ledger.load_state_dict(self.metadata["ledger"])
        theirs = [self.metadata["hyperparameters"][n] for n in ("update_ratio", "warmup_steps")]
        if theirs != [hp.update_ratio, hp.warmup_steps]:
            ledger.rebase(refill=False)

    def _put_replay(self, algorithm: "OffPolicyAlgorithm") -> None:
        state = checkpoint.decode_replay_state(self.metadata["replay"])
        if self.segments is None:
            algorithm.replay.load({**state, "num_added": 0}, [])
            algorithm.replay_files.reset()
            algorithm.refill_replay()
            return
        algorithm.replay.load(state, self.transitions)
        if self.improved_actions is not None:
            algorithm.replay.set_improved_actions(self.improved_actions)
        algorithm.replay_missing = False
        if state["capacity"] == algorithm.replay.capacity:
            files = self.directory / checkpoint.REPLAY_DIRECTORY
            algorithm.replay_files.link_from(files, self.segments)
        else:
            algorithm.replay_files.reset()

    def _put_workers(self, algorithm: "OffPolicyAlgorithm") -> list[str]:
        """`__setstate__` has given every worker new streams: those that fit get their own back."""
        own = algorithm.metadata()
        if self.metadata["seed"] != own["seed"]:
            return []  # a change of seed asks for other episodes
        if self.metadata["env_config"] != own["env_config"]:
            return ["The environment's arguments have changed"]
        group, env_steps = algorithm.env_runner_group, algorithm.ledger.ingested
        indices = group.healthy_worker_ids() if group.num_remote_env_runners() else [0]
        texts = [f"Worker {i} is new" for i in indices if i not in self.workers]
        known = [i for i in indices if i in self.workers]
        if not known:
            return texts
        calls = [
            functools.partial(worker_state.restore, packed=self.workers[i], env_steps=env_steps)
            for i in known
        ]
        if indices == [0]:
            results = [call(algorithm.env_runner) for call in calls]
        else:
            results = group.foreach_env_runner(
                calls, remote_worker_ids=known, local_env_runner=False
            )
        return texts + [text for result in results for text in result]


def _worker_file(directory: Path, index: int) -> Path:
    return directory / checkpoint.ENVIRONMENTS_DIRECTORY / f"worker-{index}.zst"
