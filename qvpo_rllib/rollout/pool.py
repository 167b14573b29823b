"""The driver's side of remote rollout workers: requests, answers, losses, restarts.

RLlib's actor manager waits for all workers where one would do, does not say which request failed,
and waits for restarted workers. The pool never waits longer than it is told to.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import NamedTuple, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from qvpo_rllib.core.errors import ENDS_TRAINING
from qvpo_rllib.rollout.worker import Fragment

logger = logging.getLogger(__name__)

PROBE_INTERVAL_S = 0.5  # between two questions to a lost worker whether it is back


class SamplingConfig(Protocol):
    """The part of a configuration that sampling reads; RLlib and the options document it."""

    env: object
    num_envs_per_env_runner: int
    sampling_mode: str
    max_staleness: int | None
    sample_timeout_s: float
    delay_between_env_runner_restarts_s: float
    num_consecutive_env_runner_failures_tolerance: int
    env_runner_restore_timeout_s: float

    def get_rollout_fragment_length(self, worker_index: int = 0) -> int: ...


class Request(NamedTuple):
    """A request for a fragment."""

    worker: int
    env_steps: int
    # Updates done when the weights to act with were read; None for uniformly random actions.
    weights_version: int | None


class Answer(NamedTuple):
    """A fragment that arrived."""

    request: Request
    fragment: Fragment


@dataclass
class _Worker:
    """The driver's view of one worker. Its answers come in the order of the requests."""

    index: int
    actor: ActorHandle
    asked: deque[tuple[ray.ObjectRef, Request]] = field(default_factory=deque)
    waiting_since: float = 0.0  # the clock when its oldest request could begin
    failures: int = 0  # since its last fragment
    stream: int | None = None  # of its random numbers, once it has restarted
    weights_id: int | None = None  # of the weights that it has
    process: str = ""  # the one that answered last
    down_since: float | None = None
    killed: bool = False  # by the pool: only another process counts as back
    probe: ray.ObjectRef | None = None
    next_probe: float = 0.0
    dead: str = ""  # why it will never come back


class WorkerPool:
    """Sends requests to workers and takes their answers; restarts workers that fail.

    It returns each answer once. If a worker dies, raises or takes too long, the pool counts all
    that it still owes as lost and ignores what its process answers later. The worker's next process
    starts from random streams of its own, so that no episode is collected twice.

    Args:
        manager: RLlib's of the remote workers, which is told who is healthy.
        env_steps: returns the env steps taken in so far, which name a restarted worker's streams.
    """

    def __init__(
        self,
        manager: FaultTolerantActorManager,
        config: SamplingConfig,
        env_steps: Callable[[], int],
    ) -> None:
        self.config = config
        self.faults = Faults()
        self.recreated: list[int] = []  # workers that came back; whoever reads it empties it
        self._manager = manager
        self._env_steps = env_steps
        actors = self._manager.actors()
        self._workers = {i: _Worker(i, actor) for i, actor in actors.items()}

    @property
    def indices(self) -> list[int]:
        """The workers that are up or may come back."""
        return [i for i, worker in self._workers.items() if not worker.dead]

    def is_up(self, index: int) -> bool:
        """Returns whether a worker takes requests."""
        worker = self._workers[index]
        return worker.down_since is None and not worker.dead

    def num_asked(self, index: int | None = None) -> int:
        """Returns the number of requests without an answer, of one worker or of all."""
        workers = self._workers.values() if index is None else [self._workers[index]]
        return sum(len(worker.asked) for worker in workers)

    def ask(self, request: Request, weights: ray.ObjectRef | None, weights_id: int) -> None:
        """Asks a worker for a fragment; the weights travel with it unless the worker has them."""
        worker = self._workers[request.worker]
        if worker.weights_id == weights_id:
            weights = None
        elif weights is not None:
            worker.weights_id = weights_id
        if not worker.asked:
            worker.waiting_since = time.monotonic()
        answer = worker.actor.collect_fragment.remote(
            weights, random_actions=request.weights_version is None, stream=worker.stream
        )
        worker.asked.append((answer, request))

    def receive(self, timeout_s: float) -> list[Answer]:
        """Returns the answers that have arrived; if none has, waits up to `timeout_s` for one.

        Raises:
            NonFiniteError, UnusableOutcome: a worker met one, and would again.
            RuntimeError: a worker failed too often in a row, or none has been up for too long.
        """
        self._restart_slow_workers()
        self._send_probes()
        waiting = {w.asked[0][0]: w for w in self._workers.values() if w.asked}
        waiting |= {w.probe: w for w in self._workers.values() if w.probe is not None}
        if not waiting:
            time.sleep(min(timeout_s, PROBE_INTERVAL_S))
            return []
        ready, _ = ray.wait(
            list(waiting), num_returns=1 if timeout_s else len(waiting), timeout=timeout_s
        )
        answers = []
        for ref in ready:
            worker = waiting[ref]
            if ref == worker.probe:
                self._take_probe(worker)
            else:
                answer = self._take_answer(worker)
                answers += [] if answer is None else [answer]
        return answers

    def reset(self) -> None:
        """Ignores everything in flight: a checkpoint's state has replaced the run's."""
        for worker in self._workers.values():
            worker.asked.clear()
            worker.stream = worker.weights_id = None

    def kill_hung(self, patience_s: float) -> None:
        """Kills workers for good that do not answer all that they owe within `patience_s`."""
        deadline = time.monotonic() + patience_s
        refs = {w.asked[-1][0]: w for w in self._workers.values() if w.asked}
        while refs and time.monotonic() < deadline:
            ready, _ = ray.wait(list(refs), timeout=deadline - time.monotonic())
            for ref in ready:
                del refs[ref]
        for worker in refs.values():
            ray.kill(worker.actor)
        self.reset()

    def _take_answer(self, worker: _Worker) -> Answer | None:
        ref, request = worker.asked[0]
        try:
            fragment = ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, ENDS_TRAINING):
                raise type(error.cause)(str(error.cause)) from None
            self.faults.env_errors += 1
            self._lose(worker, str(error), kill=True)
            return None
        except RayError as error:
            self.faults.workers_lost += 1
            self._lose(worker, _first_line(error), kill=False)
            if isinstance(error, ActorDiedError):
                self._bury(worker, error)
            return None
        worker.asked.popleft()
        worker.waiting_since = time.monotonic()
        worker.failures = 0
        worker.process = fragment.process
        return Answer(request, fragment)

    def _restart_slow_workers(self) -> None:
        limit, now = self.config.sample_timeout_s, time.monotonic()
        late = {
            worker.asked[0][0]: worker
            for worker in self._workers.values()
            if worker.asked and now - worker.waiting_since > limit
        }
        if not late:
            return
        # What has arrived was in time: the learner did not look, during an evaluation for instance.
        _, missing = ray.wait(list(late), num_returns=len(late), timeout=0, fetch_local=False)
        for ref in missing:
            self.faults.timeouts += 1
            reason = f"no fragment within sample_timeout_s={limit:g}"
            self._lose(late[ref], reason, kill=True)

    def _lose(self, worker: _Worker, reason: str, *, kill: bool) -> None:
        """Counts all that a worker still owes as lost; probes then wait for its next process."""
        self.faults.fragments_lost += len(worker.asked)
        self.faults.env_steps_lost += sum(request.env_steps for _, request in worker.asked)
        worker.asked.clear()
        worker.failures += 1
        if kill:
            ray.kill(worker.actor, no_restart=False)
        tolerated = self.config.num_consecutive_env_runner_failures_tolerance
        if worker.failures > tolerated:
            raise RuntimeError(
                f"{self.config.env}: rollout worker {worker.index} failed {worker.failures} times "
                "without a fragment between (num_consecutive_env_runner_failures_tolerance="
                f"{tolerated}). Training stops here; the last checkpoint is untouched. The last "
                f"failure: {reason}"
            )
        logger.warning(
            "%s: rollout worker %d is lost and restarted: %s",
            self.config.env, worker.index, reason,
        )  # fmt: skip
        worker.stream = max(self._env_steps(), worker.stream or 0) + 1
        worker.weights_id = None
        worker.killed = kill
        worker.down_since = time.monotonic()
        worker.next_probe = worker.down_since + self.config.delay_between_env_runner_restarts_s
        self._manager.set_actor_state(worker.index, healthy=False)

    def _send_probes(self) -> None:
        now = time.monotonic()
        down = [w for w in self._workers.values() if w.down_since is not None and not w.dead]
        for worker in down:
            if worker.probe is None and now >= worker.next_probe:
                worker.probe = worker.actor.process_id.remote()
        if down and not any(map(self.is_up, self._workers)):
            limit = self.config.env_runner_restore_timeout_s
            if now - max(w.down_since for w in down if w.down_since is not None) > limit:
                raise RuntimeError(
                    f"{self.config.env}: all rollout workers are lost and none has come back "
                    f"within env_runner_restore_timeout_s={limit:g}. The last checkpoint is "
                    "untouched."
                )

    def _take_probe(self, worker: _Worker) -> None:
        ref, worker.probe = worker.probe, None
        worker.next_probe = time.monotonic() + PROBE_INTERVAL_S
        try:
            process = ray.get(ref)
        except ActorDiedError as error:
            self._bury(worker, error)
            return
        except RayError:
            return  # still restarting
        if worker.killed and process == worker.process:
            return  # it is the old process, which has not ended yet
        worker.process, worker.killed, worker.down_since = process, False, None
        self.faults.restarts += 1
        self.recreated.append(worker.index)
        self._manager.set_actor_state(worker.index, healthy=True)

    def _bury(self, worker: _Worker, error: Exception) -> None:
        worker.dead = str(error)
        logger.error(
            "%s: rollout worker %d will not come back: %s",
            self.config.env, worker.index, worker.dead,
        )  # fmt: skip
        if not self.indices:
            raise RuntimeError(
                f"{self.config.env}: rollout worker {worker.index}, the last one, cannot be "
                f"restarted. The last checkpoint is untouched. {worker.dead}"
            )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@dataclass
class Faults:
    """Counts since the algorithm was built.

    A lost fragment was asked for and never taken in, so the environments did at most
    `env_steps_lost` in vain.
    """

    workers_lost: int = 0  # processes that died, or whose node did
    env_errors: int = 0  # exceptions of an environment
    timeouts: int = 0  # answers that took longer than `sample_timeout_s`
    restarts: int = 0  # workers that came back
    fragments_lost: int = 0
    env_steps_lost: int = 0
    fragments_stale: int = 0  # dropped because of `max_staleness`
    env_steps_stale: int = 0

    def to_dict(self) -> dict[str, int]:
        """Returns the counts by name, for the results."""
        return asdict(self)
