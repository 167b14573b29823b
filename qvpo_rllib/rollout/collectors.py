"""The sources of a learner's env steps: this process, workers in step, or workers beside it."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable

import numpy as np
import ray
from numpy.typing import NDArray
from ray.rllib.evaluation.metrics import RolloutMetrics
from ray.rllib.policy.sample_batch import SampleBatch
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from qvpo_rllib.core.replay import UpdateLedger
from qvpo_rllib.rollout.pool import Answer, Faults, Request, SamplingConfig, WorkerPool
from qvpo_rllib.rollout.worker import ColumnarRolloutWorker

GetWeights = Callable[[], dict[str, NDArray[np.float32]]]

WAIT_S = 0.1  # at most, until the next look at time-outs and at Ctrl-C
# Fragments of each worker that are in flight or have arrived and wait: with two, a worker starts
# on the next one while the last one travels.
FRAGMENTS_PER_WORKER = 2
# Updates after which the behaviour weights are read from the learner again.
UPDATES_PER_READ = 8


class Collector:
    """Base of the sources of env steps, and the source that `training_step` sees.

    Attributes:
        faults: counts of what went wrong in remote workers.
        episodes: those of remote workers that have ended since they were last taken; assign to it
            to restore them. RLlib asks the local worker itself for its episodes.
    """

    def __init__(self, ledger: UpdateLedger) -> None:
        self.faults = Faults()
        self.episodes: list[RolloutMetrics] = []
        self._ledger = ledger
        self._staleness: list[int] = []

    def collect(self) -> list[SampleBatch]:
        """Waits for the next transitions and returns them; take them in before the next call.

        Raises:
            KeyboardInterrupt: the run was interrupted meanwhile.
        """
        raise NotImplementedError

    def drain(self) -> list[SampleBatch]:
        """Waits for everything in flight and returns what arrived, in order.

        Workers are idle afterwards, until the next `collect`. Fragments of workers that die
        meanwhile are lost, and counted as usual.
        """
        return []

    def reset(self) -> None:
        """Drops everything in flight: a checkpoint's state has replaced the run's."""
        self.episodes = []
        self._staleness = []

    def close(self) -> None:
        """Kills workers that hang, so that stopping the others does not wait for them."""

    def pop_recreated(self) -> list[int]:
        """Returns the indices of the workers that have come back since the last call."""
        return []

    def pop_staleness(self) -> dict[str, float]:
        """Returns `staleness_mean` and `staleness_max` of what was collected since the last call.

        The staleness of a fragment is the number of updates done between reading the weights that
        it acted with and taking it in. Random actions have none.
        """
        values, self._staleness = self._staleness or [0], []
        return {"staleness_mean": sum(values) / len(values), "staleness_max": float(max(values))}


def make_collector(
    workers: FaultTolerantActorManager,
    local_worker: ColumnarRolloutWorker,
    config: SamplingConfig,
    ledger: UpdateLedger,
    get_weights: GetWeights,
    interrupted: Callable[[], bool],
) -> Collector:
    """Returns the collector that `config` asks for.

    Args:
        workers: the remote workers, as RLlib manages them.
        local_worker: collects where there are none.
        ledger: of the run; it is read, never written.
        get_weights: returns copies of the behaviour policy's weights.
        interrupted: whether to stop waiting, with `KeyboardInterrupt`.
    """
    if workers.num_actors() == 0:
        return LocalCollector(local_worker, ledger)
    kind = AsyncCollector if config.sampling_mode == "async" else SyncCollector
    return kind(workers, config, ledger, get_weights, interrupted)


class LocalCollector(Collector):
    """Collects a fragment in this process, acting with the learner's own weights."""

    def __init__(self, worker: ColumnarRolloutWorker, ledger: UpdateLedger) -> None:
        super().__init__(ledger)
        self._worker = worker

    def collect(self) -> list[SampleBatch]:
        return [self._worker.collect(random_actions=self._ledger.warming_up)]


class _RemoteCollector(Collector):
    """Base of the two ways to use remote workers."""

    def __init__(
        self,
        workers: FaultTolerantActorManager,
        config: SamplingConfig,
        ledger: UpdateLedger,
        get_weights: GetWeights,
        interrupted: Callable[[], bool],
    ) -> None:
        super().__init__(ledger)
        self.pool = WorkerPool(workers, config, lambda: ledger.ingested)
        self.faults = self.pool.faults
        self._config, self._get_weights, self._interrupted = config, get_weights, interrupted
        self._steps = config.get_rollout_fragment_length() * config.num_envs_per_env_runner
        self._weights_version = 0
        self._weights_id = 0
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.pool.reset()
        self._weights: ray.ObjectRef | None = None

    def pop_recreated(self) -> list[int]:
        recreated, self.pool.recreated = self.pool.recreated, []
        return recreated

    def close(self) -> None:
        self.pool.kill_hung(patience_s=1.0)

    def _accept(self, answer: Answer) -> list[SampleBatch]:
        """Records `answer` and returns its fragment, or nothing if it is too old to be taken in."""
        self.episodes += answer.fragment.episodes
        if answer.request.weights_version is not None:
            self._staleness.append(self._ledger.done - answer.request.weights_version)
        return [answer.fragment.batch]

    def _read_weights(self, max_age: float) -> None:
        """Puts the learner's weights into the object store, unless those there are new enough.

        Args:
            max_age: the largest number of updates since they were read.
        """
        if self._weights is None or self._ledger.done - self._weights_version > max_age:
            self._weights = ray.put(self._get_weights())
            self._weights_version = self._ledger.done
            self._weights_id += 1

    def _ask(self, worker: int, *, random_actions: bool) -> None:
        version = None if random_actions else self._weights_version
        request = Request(worker, self._steps, version)
        self.pool.ask(request, None if random_actions else self._weights, self._weights_id)


class SyncCollector(_RemoteCollector):
    """Collects a fragment of every worker, in their order, all with the learner's present weights.

    If a fragment is lost, the worker's next process is asked for it again, so that every round has
    the same size. A worker that cannot come back ends the run.
    """

    def collect(self) -> list[SampleBatch]:
        random_actions = self._ledger.warming_up
        if not random_actions:
            self._read_weights(max_age=0)
        workers = self.pool.indices
        while len(self._round) < len(workers):
            for worker in workers:
                if worker not in self._round and not self.pool.num_asked(worker):
                    self._ask_again_or_wait(worker, random_actions)
            self._take(self.pool.receive(WAIT_S))
        return self._end_round()

    def drain(self) -> list[SampleBatch]:
        while self.pool.num_asked():
            self._take(self.pool.receive(WAIT_S))
        return self._end_round()

    def reset(self) -> None:
        super().reset()
        self._round: dict[int, Answer] = {}

    def _ask_again_or_wait(self, worker: int, random_actions: bool) -> None:
        if self.pool.is_up(worker):
            self._ask(worker, random_actions=random_actions)
        elif self._interrupted():
            raise KeyboardInterrupt
        elif worker not in self.pool.indices:
            raise RuntimeError(
                f"Rollout worker {worker} cannot be restarted, and synchronous sampling needs them "
                "all. The last checkpoint is untouched."
            )

    def _take(self, answers: list[Answer]) -> None:
        self._round |= {answer.request.worker: answer for answer in answers}

    def _end_round(self) -> list[SampleBatch]:
        answers, self._round = self._round, {}
        return [batch for worker in sorted(answers) for batch in self._accept(answers[worker])]


class AsyncCollector(_RemoteCollector):
    """Collects the oldest fragment that has arrived, one at a time, while the workers go on.

    Each worker has at most `FRAGMENTS_PER_WORKER` fragments in flight or waiting; it is asked for
    the next one when one of them is taken in. So workers wait only if the learner is behind by all
    of these, and the learner only if none has arrived. A lost fragment is not asked for again, and
    the other workers go on.
    """

    @property
    def _max_staleness(self) -> float:
        limit = self._config.max_staleness
        return math.inf if limit is None else limit

    def collect(self) -> list[SampleBatch]:
        while True:
            self._receive(0)
            self._refill()
            while not self._arrived:
                self._receive(WAIT_S)
                self._refill()
            batches = self._accept(self._arrived.popleft())
            if batches:
                return batches

    def drain(self) -> list[SampleBatch]:
        while self.pool.num_asked():
            self._arrived += self.pool.receive(WAIT_S)
        drained = []
        while self._arrived:
            drained += self._accept(self._arrived.popleft())
        return drained

    def reset(self) -> None:
        super().reset()
        self._arrived: deque[Answer] = deque()

    def _receive(self, timeout_s: float) -> None:
        if self._interrupted():
            raise KeyboardInterrupt
        self._arrived += self.pool.receive(timeout_s)

    def _accept(self, answer: Answer) -> list[SampleBatch]:
        version = answer.request.weights_version
        if version is not None and self._ledger.done - version > self._max_staleness:
            self.episodes += answer.fragment.episodes
            self.faults.fragments_stale += 1
            self.faults.env_steps_stale += answer.request.env_steps
            return []
        return super()._accept(answer)

    def _refill(self) -> None:
        """Asks every worker for as much as it may have underway, the least busy ones first."""
        waiting = {index: self.pool.num_asked(index) for index in self.pool.indices}
        for answer in self._arrived:
            waiting[answer.request.worker] = waiting.get(answer.request.worker, 0) + 1
        for level in range(FRAGMENTS_PER_WORKER):
            for index in self.pool.indices:
                if waiting[index] == level and self.pool.is_up(index):
                    if not self._request(index):
                        return
                    waiting[index] += 1

    def _request(self, worker: int) -> bool:
        """Asks for a fragment, unless it could be too stale when its turn comes.

        Returns:
            Whether it asked.
        """
        underway = (self.pool.num_asked() + len(self._arrived)) * self._steps
        ledger = dataclasses.replace(self._ledger, ingested=self._ledger.ingested + underway)
        if ledger.warming_up:
            self._ask(worker, random_actions=True)
            return True
        # The fragments before it make `owed` updates due.
        allowed_age = self._max_staleness - ledger.owed
        if allowed_age < 0:
            return False
        self._read_weights(max_age=min(UPDATES_PER_READ, allowed_age))
        self._ask(worker, random_actions=False)
        return True
