"""What a run is beside RLlib's own state: ledger, replay, rollout workers in mid-episode."""

import functools
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from torch import Tensor

from qvpo_rllib.checkpoints import metadata as names
from qvpo_rllib.checkpoints import worker_state
from qvpo_rllib.checkpoints.metadata import Metadata
from qvpo_rllib.checkpoints.replay_files import ReplayFiles, Segment, check_segments, read_segments
from qvpo_rllib.checkpoints.staging import committed
from qvpo_rllib.core.options import Options
from qvpo_rllib.core.replay import ReplayBuffer, Transitions, UpdateLedger

logger = logging.getLogger(__name__)

CAPTURE_TIMEOUT_S = 60.0


@dataclass
class RunParts:
    """The living parts of a run that `write` saves and `RunState.restore_into` restores."""

    ledger: UpdateLedger
    replay: ReplayBuffer
    replay_files: ReplayFiles
    workers: EnvRunnerGroup
    warned_of_new_episodes: bool = False

    def write(self, directory: Path, metadata: Metadata, *, with_replay: bool) -> Metadata:
        """Writes environments and replay beside RLlib's files in `directory`.

        Returns `metadata` with what it says of them added; the caller writes it, last.
        """
        (directory / names.ENVIRONMENTS_DIRECTORY).mkdir()
        # A worker that is dead or hangs is not waited for: it starts anew when the run goes on.
        captured = self.workers.foreach_env_runner(
            worker_state.capture,
            local_env_runner=self.workers.num_remote_env_runners() == 0,
            timeout_seconds=CAPTURE_TIMEOUT_S,
        )
        for worker in captured:
            _worker_file(directory, worker.worker_index).write_bytes(worker.state)
        self._warn_of_new_episodes([text for w in captured for text in w.not_captured])
        state = names.encode_replay_state(self.replay.state_dict())
        segments = None
        if with_replay:
            segments = self._write_replay(directory)
        return replace(
            metadata,
            ledger=self.ledger.state_dict(),
            workers=[worker.worker_index for worker in captured],
            replay={**state, "segments": segments and [s.to_dict() for s in segments]},
        )

    def _write_replay(self, directory: Path) -> list[Segment]:
        files = directory / names.REPLAY_DIRECTORY
        segments = self.replay_files.write(files, self.replay)
        self.replay_files.link_from(files, segments)
        if self.replay.improved_action is not None:
            improved = self.replay.improved_actions().cpu().numpy()
            np.save(directory / names.IMPROVED_ACTIONS_FILE, improved)
        if self.replay.successor is not None:
            steps = self.replay.steps_to_successors().cpu().numpy()
            np.save(directory / names.SUCCESSORS_FILE, steps)
        return segments

    def _warn_of_new_episodes(self, texts: list[str]) -> None:
        if texts and not self.warned_of_new_episodes:
            self.warned_of_new_episodes = True
            logger.warning(
                "The state of %d environments cannot be captured: when a run goes on from a "
                "checkpoint they start a new episode. %s",
                len(texts),
                texts[0],
            )


@dataclass(frozen=True)
class RunState:
    """A checkpoint that has been checked and can be put into a run."""

    directory: Path
    metadata: Metadata
    segments: list[Segment] | None  # None: the checkpoint has no replay
    transitions: list[Transitions]  # memory-mapped, oldest first
    improved_actions: Tensor | None  # oldest first
    steps_to_successors: Tensor | None  # oldest first
    workers: dict[int, bytes]  # by worker index

    @classmethod
    def read(
        cls, directory: Path, own: Metadata | None = None, kind: type[Options] = Options
    ) -> "RunState":
        """Checks every file of the checkpoint in `directory`, and changes nothing.

        Args:
            own: of the run that is to go on from it; None: of any.
            kind: of that run's options.

        Raises:
            ValueError: no checkpoint, of another format, environment or shape, or damaged.
        """
        metadata = Metadata.read(directory)
        if own is not None:
            metadata.check_fits(own, directory, kind)
        metadata.check_files(directory)
        replay = metadata.replay
        segments, transitions = None, []
        if replay["segments"] is not None:
            segments = [Segment(**segment) for segment in replay["segments"]]
            files = directory / names.REPLAY_DIRECTORY
            check_segments(files, segments)
            oldest = max(0, replay["num_added"] - replay["capacity"])
            transitions = read_segments(files, segments, oldest)
        improved, steps = (
            torch.from_numpy(np.load(directory / name, allow_pickle=False))
            if name in metadata.files
            else None
            for name in (names.IMPROVED_ACTIONS_FILE, names.SUCCESSORS_FILE)
        )
        workers = {i: _worker_file(directory, i).read_bytes() for i in metadata.workers}
        return cls(directory, metadata, segments, transitions, improved, steps, workers)

    def restore_into(self, parts: RunParts, own: Metadata) -> None:
        """Restores ledger, replay and workers. RLlib has restored the rest.

        Without a replay in the checkpoint the ledger owes one warm-up first.

        Args:
            own: of the run that goes on, whose options and environment may have changed.
        """
        self._restore_ledger(parts.ledger, own)
        self._restore_replay(parts)
        texts = self._restore_workers(parts, own)
        if texts:
            logger.warning(
                "%d environments or workers start new episodes instead of going on in mid-episode. "
                "%s",
                len(texts),
                texts[0],
            )

    def _restore_ledger(self, ledger: UpdateLedger, own: Metadata) -> None:
        ledger.load_state_dict(self.metadata.ledger)
        changed = any(
            self.metadata.hyperparameters[name] != own.hyperparameters[name]
            for name in ("update_ratio", "warmup_steps")
        )
        if self.segments is None:
            ledger.rebase(refill=True)
        elif changed:
            ledger.rebase(refill=False)

    def _restore_replay(self, parts: RunParts) -> None:
        state = names.decode_replay_state(self.metadata.replay)
        parts.replay_files.reset()
        if self.segments is None:
            parts.replay.load({**state, "num_added": 0}, [])
            return
        parts.replay.load(state, self.transitions)
        if self.improved_actions is not None:
            parts.replay.set_improved_actions(self.improved_actions)
        if self.steps_to_successors is not None and parts.replay.successor is not None:
            parts.replay.set_steps_to_successors(self.steps_to_successors)
        if state["capacity"] == parts.replay.capacity:
            parts.replay_files.link_from(self.directory / names.REPLAY_DIRECTORY, self.segments)

    def _restore_workers(self, parts: RunParts, own: Metadata) -> list[str]:
        """Gives the workers that fit their own streams and episodes back.

        Every worker has got new streams before. Returns a text for each that keeps them.
        """
        if self.metadata.seed != own.seed:
            return []  # a change of seed asks for other episodes
        if self.metadata.env_config != own.env_config:
            return ["The environment's arguments have changed"]
        group, env_steps = parts.workers, parts.ledger.ingested
        remote = group.num_remote_env_runners() > 0
        indices = group.healthy_worker_ids() if remote else [0]
        texts = [f"Worker {i} is new" for i in indices if i not in self.workers]
        known = [i for i in indices if i in self.workers]
        if not known:
            return texts
        calls = [
            functools.partial(worker_state.restore, packed=self.workers[i], env_steps=env_steps)
            for i in known
        ]
        if remote:
            results = group.foreach_env_runner(
                calls, remote_worker_ids=known, local_env_runner=False
            )
        else:
            results = [call(group.local_env_runner) for call in calls]
        return texts + [text for result in results for text in result]


def check_whole(directory: Path) -> None:
    """Raises `ValueError` unless every file of the checkpoint in `directory` is whole."""
    RunState.read(committed(directory))


def _worker_file(directory: Path, index: int) -> Path:
    return directory / names.ENVIRONMENTS_DIRECTORY / f"worker-{index}.zst"
