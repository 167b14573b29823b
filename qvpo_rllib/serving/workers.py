"""Processes that compute, so that a killed one costs no request: another one computes it again."""

import multiprocessing
import pickle
import queue
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from qvpo_rllib.serving.batcher import Actions, Seeded, compute
from qvpo_rllib.serving.policy import ServedPolicy

# Forked from a process that has imported everything and has no threads: ready in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["__main__", "qvpo_rllib.serving.api", __name__])
ATTEMPTS = 3  # at a batch whose process died, lest one that kills them do so for ever
TIMEOUT_S = 60.0  # of a batch, after which its process counts as hung


class Workers:
    """`batcher.compute` in `num` processes, for as many threads at once."""

    def __init__(self, num: int) -> None:
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(num):
            self._idle.put(_Worker())

    def __call__(self, policy: ServedPolicy, k: int, requests: Sequence[Seeded]) -> Actions:
        worker = self._idle.get()
        try:
            for _ in range(ATTEMPTS - 1):
                try:
                    return worker.compute(policy, k, requests)
                except (EOFError, OSError):
                    worker.start()
            return worker.compute(policy, k, requests)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process at a time; it ends when this end of its pipe is closed."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._pipe, theirs = PROCESSES.Pipe()
        self._sent: WeakValueDictionary[int, ServedPolicy] = WeakValueDictionary()
        self._process = PROCESSES.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def compute(self, policy: ServedPolicy, k: int, requests: Sequence[Seeded]) -> Actions:
        """As `batcher.compute`. Raises `EOFError` or `OSError` if the process has died."""
        key = id(policy)
        fresh = None if key in self._sent else policy
        self._sent[key] = policy
        # Not `send`, with which PyTorch would share the memory of every tensor.
        self._pipe.send_bytes(pickle.dumps((list(self._sent), key, fresh, k, requests)))
        if not self._pipe.poll(TIMEOUT_S):
            self._process.kill()
        result: Actions | Exception = pickle.loads(self._pipe.recv_bytes())
        if isinstance(result, Exception):
            raise result
        return result


def name_process(name: str) -> None:
    """Shows this process as `name` in `ps` and `top`, where all forks would look alike."""
    Path("/proc/self/comm").write_text(name)


def _work(pipe: Connection) -> None:
    name_process("qvpo-worker")
    # The server that asks for work says when it ends, whoever else a signal was for.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    policies: dict[int, ServedPolicy] = {}
    while True:
        try:
            kept, key, fresh, k, requests = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        policies = {held: policies[held] for held in kept if held in policies}
        if fresh is not None:
            policies[key] = fresh
        try:
            result: Actions | Exception = compute(policies[key], k, requests)
        except Exception as error:
            result = RuntimeError(f"computing failed: {error}")
        pipe.send_bytes(pickle.dumps(result))
