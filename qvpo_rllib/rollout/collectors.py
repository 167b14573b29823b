"""Where the learner's env steps come from: this process, workers in step, or workers beside it."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import ray
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.evaluation.metrics import RolloutMetrics
from ray.rllib.policy.sample_batch import SampleBatch

from qvpo_rllib.core.replay import UpdateLedger
from qvpo_rllib.rollout.pool import Answer, Faults, Request, WorkerPool
from qvpo_rllib.runtime.config import OffPolicyConfig

WAIT_S = 0.1  # at most, until the next look at time-outs and at Ctrl-C
# Fragments of each worker that are in flight or have arrived and wait: with two, a worker starts
# on the next one while the last one travels.
FRAGMENTS_PER_WORKER = 2
# Updates after which the behaviour weights are read from the learner again.
UPDATES_PER_READ = 8


class Collector(Protocol):
    """What `OffPolicyAlgorithm.training_step` needs to know of sampling."""

    faults: Faults

    def collect(self) -> list[SampleBatch]:
        """The next transitions, to be taken in before the next call; waits for them."""
        ...

    def drain(self) -> list[SampleBatch]:
        """Brings everything in flight to rest and returns what arrived, in order.

        Workers are idle afterwards, until the next `collect`. Fragments of workers that die
        meanwhile are lost, and counted as usual.
        """
        ...

    def reset(self) -> None:
        """Drops whatever is in flight: the run's state has been replaced by a checkpoint's."""
        ...

    def close(self) -> None:
        """Ends workers that hang, so that stopping the others does not wait for them."""
        ...

    def pop_episodes(self) -> list[RolloutMetrics]:
        """Episodes of remote workers that have ended since the last call."""
        ...

    def put_back_episodes(self, episodes: list[RolloutMetrics]) -> None:
        """What `pop_episodes` gave is to be given again."""
        ...

    def pop_staleness(self) -> dict[str, float]:
        """`staleness_mean` and `staleness_max` of what was collected since the last call.

        The staleness of a fragment is the number of updates done between reading the weights that
        it acted with and taking it in. Random actions have none.
        """
        ...


def make_collector(
    group: EnvRunnerGroup,
    config: OffPolicyConfig,
    ledger: UpdateLedger,
    get_weights: Callable[[], dict[str, Any]],
    interrupted: Callable[[], bool],
) -> Collector:
    """The collector that `config` asks for.

    Args:
        group: the algorithm's workers.
        config: `sampling_mode`, `max_staleness` and what `WorkerPool` reads.
        ledger: of the run; read, never written.
        get_weights: the behaviour policy's weights, as copies.
        interrupted: whether to stop waiting, with `KeyboardInterrupt`.
    """
    if group.num_remote_env_runners() == 0:
        return LocalCollector(group.local_env_runner, ledger)
    kind = AsyncCollector if config.sampling_mode == "async" else SyncCollector
    return kind(group, config, ledger, get_weights, interrupted)


class LocalCollector:
    """A fragment of the environments in this process, acting with the learner's own weights."""

    def __init__(self, worker: Any, ledger: UpdateLedger) -> None:
        self.faults = Faults()
        self._worker, self._ledger = worker, ledger

    def collect(self) -> list[SampleBatch]:
        return [self._worker.collect(random_actions=self._ledger.warming_up)]

    def drain(self) -> list[SampleBatch]:
        return []

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass

    def pop_episodes(self) -> list[RolloutMetrics]:
        return []  # RLlib asks the worker itself

    def put_back_episodes(self, episodes: list[RolloutMetrics]) -> None:
        pass

    def pop_staleness(self) -> dict[str, float]:
        return {"staleness_mean": 0.0, "staleness_max": 0.0}


class _RemoteCollector:
    """What the two ways to use remote workers share."""

    def __init__(
        self,
        group: EnvRunnerGroup,
        config: OffPolicyConfig,
        ledger: UpdateLedger,
        get_weights: Callable[[], dict[str, Any]],
        interrupted: Callable[[], bool],
    ) -> None:
        self.pool = WorkerPool(group, config, lambda: ledger.ingested)
        self.faults = self.pool.faults
        self._ledger, self._get_weights, self._interrupted = ledger, get_weights, interrupted
        self._steps = config.get_rollout_fragment_length() * config.num_envs_per_env_runner
        self._weights: ray.ObjectRef | None = None
        self._weights_version = 0
        self._weights_id = 0
        self._episodes: list[RolloutMetrics] = []
        self._staleness: list[int] = []

    def reset(self) -> None:
        self.pool.reset()
        self._episodes.clear()
        self._staleness.clear()
        self._weights = None

    def close(self) -> None:
        self.pool.kill_hung(patience_s=1.0)

    def pop_episodes(self) -> list[RolloutMetrics]:
        episodes, self._episodes = self._episodes, []
        return episodes

    def put_back_episodes(self, episodes: list[RolloutMetrics]) -> None:
        self._episodes = [*episodes, *self._episodes]

    def pop_staleness(self) -> dict[str, float]:
        values, self._staleness = self._staleness or [0], []
        return {
            "staleness_mean": sum(values) / len(values),
            "staleness_max": float(max(values)),
        }

    def _accept(self, answer: Answer) -> list[SampleBatch]:
        """The fragment of `answer`, on record, or nothing if it is too old to be taken in."""
        self._episodes += answer.fragment.episodes
        if answer.request.weights_version is not None:
            self._staleness.append(self._ledger.done - answer.request.weights_version)
        return [answer.fragment.batch]

    def _read_weights(self, max_age: float) -> None:
        """Puts the learner's weights into the object store unless they are there already."""
        if self._weights is None or self._ledger.done - self._weights_version > max_age:
            self._weights = ray.put(self._get_weights())
            self._weights_version = self._ledger.done
            self._weights_id += 1

    def _ask(self, worker: int, *, random_actions: bool) -> None:
        version = None if random_actions else self._weights_version
        request = Request(worker, self._steps, version)
        self.pool.ask(request, None if random_actions else self._weights, self._weights_id)


class SyncCollector(_RemoteCollector):
    """A fragment from every worker, all with the learner's present weights, in their order.

    A fragment that is lost is asked for again, from the worker's next process, so that every round
    has the same size. A worker that cannot come back ends the run.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._round: dict[int, Answer] = {}

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
        self._round.clear()

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
    """One fragment at a time, the oldest that has arrived, while the workers go on.

    Each worker has at most `FRAGMENTS_PER_WORKER` fragments in flight or waiting; it is asked for
    the next one when one of them is taken in. So workers wait only if the learner is behind by all
    of these, and the learner only if none has arrived. A fragment that is lost is not asked for
    again: the other workers go on.
    """

    def __init__(self, group: EnvRunnerGroup, config: OffPolicyConfig, *args: Any) -> None:
        super().__init__(group, config, *args)
        limit = config.max_staleness
        self._max_staleness = math.inf if limit is None else limit
        self._arrived: deque[Answer] = deque()

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
        self._arrived.clear()

    def _receive(self, timeout_s: float) -> None:
        if self._interrupted():
            raise KeyboardInterrupt
        self._arrived += self.pool.receive(timeout_s)

    def _accept(self, answer: Answer) -> list[SampleBatch]:
        version = answer.request.weights_version
        if version is not None and self._ledger.done - version > self._max_staleness:
            self._episodes += answer.fragment.episodes
            self.faults.fragments_stale += 1
            self.faults.env_steps_stale += answer.request.env_steps
            return []
        return super()._accept(answer)

    def _refill(self) -> None:
        """Asks every worker for as much as may be underway, the least busy ones first."""
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
        """Asks for a fragment, unless it might be too stale by the time that it is its turn."""
        underway = (self.pool.num_asked() + len(self._arrived)) * self._steps
        ledger = dataclasses.replace(self._ledger, ingested=self._ledger.ingested + underway)
        if ledger.warming_up:
            self._ask(worker, random_actions=True)
            return True
        # The updates that all those before it make due.
        allowed_age = self._max_staleness - ledger.owed
        if allowed_age < 0:
            return False
        self._read_weights(max_age=min(UPDATES_PER_READ, allowed_age))
        self._ask(worker, random_actions=False)
        return True
