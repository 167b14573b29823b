"""Processes that compute, so that a killed one costs no request: another one computes it again."""

import contextlib
import pickle
import queue
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from qvpo_rllib.serving.batcher import Actions, Seeded, compute
from qvpo_rllib.serving.policy import ServedPolicy

ATTEMPTS = 3  # at a batch whose process died, lest one that kills them do so for ever
TIMEOUT_S = 60.0  # of a batch, and for a process to compute it


class Workers:
    """`batcher.compute` in other processes, for as many threads at once as there are of them.

    Args:
        supply: a socket by which `server.py` sends the pipe of every process that it starts.
        at_end: called when nobody can send any more.
    """

    def __init__(self, supply: socket.socket, at_end: Callable[[], None]) -> None:
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        threading.Thread(target=self._take, args=(supply, at_end), daemon=True).start()

    def __call__(self, policy: ServedPolicy, k: int, requests: Sequence[Seeded]) -> Actions:
        for _ in range(ATTEMPTS):
            while (worker := self._idle.get(timeout=TIMEOUT_S)).has_ended():
                pass
            try:
                result = worker.compute(policy, k, requests)
            except (EOFError, OSError):
                continue  # it died; its successor comes to the queue
            self._idle.put(worker)
            if isinstance(result, Exception):
                raise result
            return result
        raise RuntimeError(f"{ATTEMPTS} processes died while they computed a batch")

    def _take(self, supply: socket.socket, at_end: Callable[[], None]) -> None:
        while pipes := socket.recv_fds(supply, 1, 1)[1]:
            self._idle.put(_Worker(Connection(pipes[0])))
        at_end()


class _Worker:
    """The pipe of a process, which ends when this end is closed."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._sent: WeakValueDictionary[int, ServedPolicy] = WeakValueDictionary()

    def has_ended(self) -> bool:
        """Whether an idle process has died: it sends nothing unasked but the end."""
        return self._pipe.poll()

    def compute(
        self, policy: ServedPolicy, k: int, requests: Sequence[Seeded]
    ) -> Actions | Exception:
        """As `batcher.compute`. Raises `EOFError` or `OSError` if the process died or hangs."""
        key = id(policy)
        fresh = None if key in self._sent else policy
        self._sent[key] = policy
        # Not `send`, with which PyTorch would share the memory of every tensor.
        self._pipe.send_bytes(pickle.dumps((list(self._sent), key, fresh, k, requests)))
        if not self._pipe.poll(TIMEOUT_S):
            raise TimeoutError
        result: Actions | Exception = pickle.loads(self._pipe.recv_bytes())
        return result


def name_process(name: str) -> None:
    """Shows this process as `name` in `ps` and `top`, where all forks would look alike."""
    with contextlib.suppress(OSError):  # Linux alone has it
        Path("/proc/self/comm").write_text(name)


def work(pipe: Connection) -> None:
    """Computes what comes, until the other end is closed."""
    name_process("qvpo-worker")
    for number in (signal.SIGINT, signal.SIGTERM):  # which a terminal sends to everybody
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
