"""Requests of many clients computed together, without one changing another's bits."""

import asyncio
import contextlib
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
    """One thread computes; what arrives meanwhile waits and is computed together next.

    No request waits for company: an idle thread starts at once. Its own generator draws each
    request's noise, so that neither batch nor order changes a seeded request.
    """

    def __init__(self) -> None:
        self._pending: deque[_Job] = deque()
        self._pending_samples = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qvpo-act")
        self._task: asyncio.Task[None] | None = None

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
        if self._task is None:
            self._task = loop.create_task(self._work())
        return await job.future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._pending:
                batch = self._take()
                if not batch:
                    continue
                try:
                    results = await loop.run_in_executor(self._thread, _compute, batch)
                except Exception as error:
                    results = [error] * len(batch)
                for job, result in zip(batch, results, strict=True):
                    if job.future.done():  # its client is gone
                        continue
                    if isinstance(result, Result):
                        job.future.set_result(result)
                    else:
                        job.future.set_exception(result)
        finally:
            self._task = None

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
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._task is not None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed
                self._task.cancel()


def _compute(batch: list[_Job]) -> list[Result | Exception]:
    """Returns each job's result, or the error that its own observations caused."""
    started = time.perf_counter()
    policy, k = batch[0].policy, batch[0].k
    noise = []
    for job in batch:
        generator = Generator()
        if job.seed is None:
            generator.seed()
        else:
            generator.manual_seed(job.seed)
        noise.append(policy.draw_noise(len(job.obs), k, generator))
    actions, finite = policy.act_with_noise(
        torch.cat([job.obs for job in batch]), torch.cat(noise, dim=1)
    )
    in_box = policy.scale.to_env(np.where(finite[:, None], actions, 0))
    computing_s = time.perf_counter() - started
    results: list[Result | Exception] = []
    start = 0
    for job in batch:
        rows = slice(start, start + len(job.obs))
        start = rows.stop
        if finite[rows].all():
            results.append(Result(in_box[rows], started - job.arrived, computing_s))
        else:
            row = int(np.flatnonzero(~finite[rows])[0])
            results.append(NonFiniteActionError(row))
    return results
