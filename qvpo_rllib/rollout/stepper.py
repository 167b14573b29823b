"""Steps many environments, in threads where that is faster."""

import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

from qvpo_rllib.core.errors import RAISED_BY_ENVIRONMENT

# What `env.step` returned, or the exception that it raised.
Outcome = tuple[Any, Any, Any, Any, Any] | BaseException

# Whether threads pay depends on the environment and on what else the machine does at the time. So
# of every `PERIOD` rounds this many are timed without threads, and as many with them.
PERIOD = 2000
TIMED_ROUNDS = 16


class EnvStepper:
    """Steps all of a worker's environments, each with its own action.

    MuJoCo computes outside of Python's lock, so its environments can step side by side on free
    cores. The outcomes are the same either way: an environment has its own state, and only one
    thread at a time touches it. The calling thread steps environments of other kinds alone, since
    their libraries may not allow calls from several.

    Args:
        num_threads: the largest number at a time, the calling one included.
    """

    def __init__(self, envs: Sequence[gym.Env[Any, Any]], num_threads: int) -> None:
        self.envs = envs
        self._rounds = 0
        self._times: dict[bool, list[float]] = {False: [], True: []}
        self._threads_are_faster = False
        self._helpers: list[_Helper] = []
        can_share = all(isinstance(env.unwrapped, MujocoEnv) for env in envs)
        number = max(1, min(num_threads, len(envs))) if can_share else 1
        self._parts = _parts(len(envs), number)
        if number > 1:
            self._helpers = [_Helper(partial(self._step, part)) for part in self._parts[1:]]

    def step(self, actions: NDArray[np.floating]) -> list[Outcome]:
        """Steps every environment by its row of actions [E, A], in the environments' own units."""
        if not self._helpers:
            return self._step(range(len(self.envs)), actions)
        position = self._rounds % PERIOD
        self._rounds += 1
        if position >= 2 * TIMED_ROUNDS:
            return self._round(actions, threads=self._threads_are_faster)
        threads = position % 2 == 1
        start = time.perf_counter()
        outcomes = self._round(actions, threads)
        self._times[threads].append(time.perf_counter() - start)
        if position == 2 * TIMED_ROUNDS - 1:
            alone, shared = (statistics.median(self._times[t]) for t in (False, True))
            self._threads_are_faster = shared < alone
            self._times = {False: [], True: []}
        return outcomes

    def stop(self) -> None:
        """Ends the threads."""
        for helper in self._helpers:
            helper.stop()
        self._helpers = []

    def _round(self, actions: NDArray[np.floating], threads: bool) -> list[Outcome]:
        if not threads:
            return self._step(range(len(self.envs)), actions)
        for helper in self._helpers:
            helper.start(actions)
        try:
            outcomes = self._step(self._parts[0], actions)
        finally:  # else an interrupted round would leave its outcomes to the next one
            others = [outcome for helper in self._helpers for outcome in helper.result()]
        return outcomes + others

    def _step(self, part: range, actions: NDArray[np.floating]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for i in part:
            try:
                outcomes.append(self.envs[i].step(actions[i]))
            except RAISED_BY_ENVIRONMENT as error:
                outcomes.append(error)
        return outcomes


class _Helper:
    """A thread that calls a function with each array of actions that it is given."""

    def __init__(self, function: Callable[[NDArray[np.floating]], list[Outcome]]) -> None:
        self._inbox: SimpleQueue[NDArray[np.floating] | None] = SimpleQueue()
        self._outbox: SimpleQueue[list[Outcome]] = SimpleQueue()
        self._function = function
        threading.Thread(target=self._run, name="env-stepper", daemon=True).start()

    def start(self, actions: NDArray[np.floating]) -> None:
        self._inbox.put(actions)

    def result(self) -> list[Outcome]:
        return self._outbox.get()

    def stop(self) -> None:
        self._inbox.put(None)

    def _run(self) -> None:
        while (actions := self._inbox.get()) is not None:
            self._outbox.put(self._function(actions))


def allowed_threads() -> int:
    """Returns OMP_NUM_THREADS, which Ray sets to an actor's CPUs, else this process's cores."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(text)) if text.isdigit() else len(os.sched_getaffinity(0))


def _parts(number: int, parts: int) -> list[range]:
    """Returns 0 … number - 1 in consecutive parts, whose lengths differ by at most one."""
    edges = [number * part // parts for part in range(parts + 1)]
    return [range(start, end) for start, end in itertools.pairwise(edges)]
