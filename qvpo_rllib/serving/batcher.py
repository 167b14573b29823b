"""Requests of many clients computed together, without one changing another's bits."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from qvpo_rllib.serving.policy import NonFiniteActionError, ServedPolicy

# A sample is one of the k actions drawn for an observation.
MAX_BATCH_SAMPLES = 1_024  # of requests computed together
MAX_PENDING_SAMPLES = 16_384
MAX_PENDING_REQUESTS = 256


class OverloadedError(Exception):
    """The queue is full; try again later."""


# A request's observations [B, O] float32, and the seed of its noise; None for fresh noise.
Seeded = tuple[NDArray[np.float32], int | None]
# Actions [sum of B, A] in the environment's box, and whether they and their Q are finite.
Actions = tuple[NDArray[np.floating], NDArray[np.bool_]]
Compute = Callable[[ServedPolicy, int, Sequence[Seeded]], Actions]


def compute(policy: ServedPolicy, k: int, requests: Sequence[Seeded]) -> Actions:
    """Returns the best of k actions for all observations of all requests, in their order.

    A generator of its own draws each request's noise, so that neither batch nor order changes a
    seeded request.
    """
    noise = []
    for obs, seed in requests:
        generator = Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        noise.append(policy.draw_noise(len(obs), k, generator))
    all_obs = torch.from_numpy(np.concatenate([obs for obs, _ in requests]))
    actions, finite = policy.act_with_noise(all_obs, torch.cat(noise, dim=1))
    return policy.scale.to_env(np.where(finite[:, None], actions, 0)), finite


@dataclass(frozen=True)
class Result:
    """A request's actions [B, A] in the environment's box, and its times in seconds."""

    actions: NDArray[np.floating]
    queued_s: float
    computing_s: float


@dataclass
class _Job:
    policy: ServedPolicy
    obs: Tensor  # [B, O]
    k: int
    seed: int | None
    future: asyncio.Future[Result]
    arrived: float

    @property
    def samples(self) -> int:
        return self.obs.shape[0] * self.k


class Batcher:
    """What arrives while all threads compute waits, and is computed together next.

    No request waits for company: an idle thread starts at once.

    Args:
        function: what computes a batch, called from `num_threads` threads.
    """

    def __init__(self, function: Compute = compute, num_threads: int = 1) -> None:
        self._function, self._num_threads = function, num_threads
        self._pending: deque[_Job] = deque()
        self._pending_samples = 0
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="qvpo-act")
        self._tasks: set[asyncio.Task[None]] = set()

    async def act(self, policy: ServedPolicy, obs: Tensor, k: int, seed: int | None) -> Result:
        """Returns actions for checked observations [B, O].

        Raises:
            OverloadedError: too much is waiting already.
            NonFiniteActionError: the networks have no finite action for one of them.
        """
        loop = asyncio.get_running_loop()
        job = _Job(policy, obs, k, seed, loop.create_future(), time.perf_counter())
        full = len(self._pending) >= MAX_PENDING_REQUESTS
        if full or self._pending_samples + job.samples > MAX_PENDING_SAMPLES:
            raise OverloadedError
        self._pending.append(job)
        self._pending_samples += job.samples
        if len(self._tasks) < self._num_threads:
            task = loop.create_task(self._work())
            self._tasks.add(task)
        return await job.future

    async def _work(self) -> None:
        try:
            while self._pending:
                if batch := self._take():
                    await self._do(batch)
        finally:
            self._tasks.discard(cast(asyncio.Task[None], asyncio.current_task()))

    async def _do(self, batch: list[_Job]) -> None:
        """Gives each job its result, or the error that its own observations caused."""
        requests = [(job.obs.numpy(), job.seed) for job in batch]
        started = time.perf_counter()
        failure: Exception | None = None
        try:
            actions, finite = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._function, batch[0].policy, batch[0].k, requests
            )
        except Exception as error:
            failure = error
        computing_s = time.perf_counter() - started
        start = 0
        for job in batch:
            rows = slice(start, start + len(job.obs))
            start = rows.stop
            if job.future.done():  # its client is gone
                continue
            if failure is not None:
                job.future.set_exception(failure)
            elif finite[rows].all():
                job.future.set_result(Result(actions[rows], started - job.arrived, computing_s))
            else:
                row = int(np.flatnonzero(~finite[rows])[0])
                job.future.set_exception(NonFiniteActionError(row))

    def _take(self) -> list[_Job]:
        """Returns the oldest job and those that fit it; the others keep their places."""
        batch: list[_Job] = []
        left: deque[_Job] = deque()
        samples = 0
        for job in self._pending:
            if job.future.done():
                self._pending_samples -= job.samples
                continue
            fits = not batch or (
                job.policy is batch[0].policy
                and job.k == batch[0].k
                and samples + job.samples <= MAX_BATCH_SAMPLES
            )
            if fits:
                batch.append(job)
                samples += job.samples
            else:
                left.append(job)
        self._pending = left
        self._pending_samples -= samples
        return batch

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for task in self._tasks:
            with contextlib.suppress(RuntimeError):  # the loop may be closed
                task.cancel()
