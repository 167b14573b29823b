"""`qvpo bench runtime`: where the time of training goes, in one process and beside workers."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qvpo_rllib.algorithms.qvpo import QVPOConfig
from qvpo_rllib.bench.sizes import TASKS, Task, hyperparameters

STAND_IN_S = 0.001  # an update of the learner's stand-in
WARMUP_STEPS = 500


class Clock:
    """Adds up the time within wrapped calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Replaces a method of an object by one that is timed under `name`."""
        call = getattr(owner, method)

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

        setattr(owner, method, timed)


def run(
    *,
    task: str,
    setting: str,
    num_envs: int,
    num_workers: Sequence[int],
    modes: Sequence[str],
    engine: str,
    seconds: float,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """Rows in the order of `repeats` rounds that visit every kind in turn.

    "local": environments and the real learner in this process. "sync" and "async": remote workers
    and a stand-in for the learner that sleeps a millisecond for each update, as one would that
    waits for a GPU. Shares are of the wall-clock time after the warm-up.
    """
    kinds = [("local", 0)] + [(mode, n) for n in num_workers for mode in modes]
    for _ in range(repeats):
        for mode, n in kinds:
            row = {"mode": mode, "workers": n, "num_envs": num_envs}
            yield row | _measure(TASKS[task], setting, num_envs, mode, n, engine, seconds)


def _measure(
    task: Task,
    setting: str,
    num_envs: int,
    mode: str,
    num_workers: int,
    engine: str,
    seconds: float,
) -> dict[str, Any]:
    local = mode == "local"
    hp = hyperparameters(
        setting,
        task,
        warmup_steps=WARMUP_STEPS,
        replay_capacity=100_000,
        engine=engine if local else "native",  # workers act by it; the stand-in has none
        sampling_mode="sync" if local else mode,
    )
    config = QVPOConfig().environment(task.env).training(**hp.to_dict())
    config.env_runners(num_env_runners=num_workers, num_envs_per_env_runner=num_envs)
    config.reporting(min_sample_timesteps_per_iteration=200)
    config.evaluation(evaluation_interval=None).debugging(seed=0, log_level="ERROR")
    algorithm = config.build_algo()
    try:
        clock = _instrument(algorithm, stand_in=not local)
        while algorithm.ledger.done < 200:  # past the warm-up, and compiled
            algorithm.train()
        return _shares(algorithm, clock, seconds, _limit_of(mode))
    finally:
        algorithm.stop()


def _instrument(algorithm: Any, *, stand_in: bool) -> Clock:
    clock = Clock()
    if stand_in:
        learner = algorithm.learner

        def sleep(replay: Any, num_updates: int) -> None:
            time.sleep(STAND_IN_S * num_updates)
            learner.num_updates += num_updates

        learner.train, learner.metric_mean, learner.pop_metrics = sleep, _zero, dict
    clock.wrap(algorithm.learner, "train", "update")
    clock.wrap(algorithm.collector, "collect", "collect")
    worker = algorithm.env_runner
    if worker.envs:
        clock.wrap(worker.policy, "act", "action")
        # All environments' steps together: in threads, the sum of their times is more than passes.
        clock.wrap(worker.stepper, "step", "environment")
        for env in worker.envs:
            clock.wrap(env, "reset", "environment")
    return clock


def _zero(name: str) -> float:
    return 0.0


def _shares(
    algorithm: Any, clock: Clock, seconds: float, limit: Callable[[dict[str, float]], str]
) -> dict[str, Any]:
    clock.seconds.clear()
    steps, updates = algorithm.ledger.ingested, algorithm.ledger.done
    staleness = [0.0]
    start = time.perf_counter()
    while time.perf_counter() < start + seconds:
        result = algorithm.train()
        staleness.append(result["ledger"]["staleness_max"])
    elapsed = time.perf_counter() - start
    share = {name: value / elapsed for name, value in clock.seconds.items()}
    local = "environment" in share
    inside = share["update"] + share.get("environment", 0.0) + share.get("action", 0.0)
    return {
        "env_steps_per_s": (algorithm.ledger.ingested - steps) / elapsed,
        "updates_per_s": (algorithm.ledger.done - updates) / elapsed,
        "update_share": share["update"],
        "environment_share": share.get("environment", ""),
        "action_share": share.get("action", ""),
        "waiting_share": "" if local else share["collect"],
        "other_share": 1 - (inside if local else share["update"] + share["collect"]),
        "staleness_max": max(staleness),
        "limit": limit(share),
    }


def _limit_of(mode: str) -> Callable[[dict[str, float]], str]:
    if mode == "local":
        return lambda share: max(("update", "environment", "action"), key=lambda name: share[name])
    return lambda share: "learner" if share["update"] > share["collect"] else "workers"
