"""`qvpo bench runtime`: where the time of training goes, in one process and beside workers."""

import functools
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qvpo_rllib.bench.options import ENGINES, Row, add_sampling, positive
from qvpo_rllib.bench.sizes import TASKS, hyperparameters

if TYPE_CHECKING:
    from qvpo_rllib.algorithms.qvpo import QVPO

HELP = (
    "where the time goes: in one process, and with workers beside a stand-in for the learner that "
    "takes 1 ms per update"
)
COLUMNS = {
    "mode": "mode",
    "workers": "workers",
    "num_envs": "environments",
    "env_steps_per_s": "env steps/s",
    "updates_per_s": "updates/s",
    "update_share": "updating",
    "environment_share": "environment",
    "action_share": "choosing",
    "waiting_share": "collecting",
    "other_share": "other",
    "staleness_max": "staleness",
    "limit": "limit",
}
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


def add_arguments(parser: ArgumentParser) -> None:
    add_sampling(parser)
    parser.add_argument("--num-envs", type=positive, default=8, metavar="N", help="per worker")
    parser.add_argument("--num-env-runners", nargs="+", type=positive, default=[1], metavar="N")
    parser.add_argument("--mode", nargs="+", default=["async", "sync"], choices=("async", "sync"))
    parser.add_argument(
        "--engine",
        default="auto",
        choices=ENGINES,
        help="of the learner in one process (default auto)",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row (default 10)")


def run(options: Namespace) -> Iterator[Row]:
    """Yields `rounds` on a Ray of its own."""
    import ray

    from qvpo_rllib.ray_session import start_ray

    if not 0 < options.seconds <= 3600:
        raise ValueError(f"--seconds {options.seconds:g} is not allowed: from 0 to 3600.")
    start_ray(max(options.num_env_runners) + 1)
    try:
        yield from rounds(options)
    finally:
        ray.shutdown()


def rounds(options: Namespace) -> Iterator[Row]:
    """Yields rows in the order of `repeats` rounds that visit every kind in turn.

    "local": environments and the real learner in this process. "sync" and "async": remote workers
    and a stand-in for the learner that sleeps a millisecond for each update, as one would that
    waits for a GPU. Shares are of the wall-clock time after the warm-up.
    """
    kinds = [("local", 0)] + [(mode, n) for n in options.num_env_runners for mode in options.mode]
    for _ in range(options.repeats):
        for mode, n in kinds:
            row = {"mode": mode, "workers": n, "num_envs": options.num_envs}
            yield row | _measure(mode, n, options)


def _measure(mode: str, num_workers: int, options: Namespace) -> Row:
    from qvpo_rllib.algorithms.qvpo import QVPOConfig

    local, task, num_envs = mode == "local", TASKS[options.task], options.num_envs
    hp = hyperparameters(
        options.setting,
        task,
        warmup_steps=WARMUP_STEPS,
        replay_capacity=100_000,
        engine=options.engine if local else "native",  # workers act by it; the stand-in has none
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
        return _shares(algorithm, clock, options.seconds)
    finally:
        algorithm.stop()


def _instrument(algorithm: "QVPO", *, stand_in: bool) -> Clock:
    clock = Clock()
    if stand_in:
        learner = algorithm.learner

        def sleep(replay: Any, num_updates: int) -> None:
            time.sleep(STAND_IN_S * num_updates)
            learner.num_updates += num_updates

        learner.train, learner.read_metrics, learner.pop_metrics = sleep, lambda: _losses, dict
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


def _losses() -> dict[str, float]:
    return {"critic_loss": 0.0, "actor_loss": 0.0}


def _shares(algorithm: "QVPO", clock: Clock, seconds: float) -> Row:
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
        "limit": _limit(share),
    }


def _limit(share: dict[str, float]) -> str:
    """Returns what takes most: a part of the one process, or the learner's or the workers' side."""
    if "environment" in share:
        return max(("update", "environment", "action"), key=lambda name: share[name])
    return "learner" if share["update"] > share["collect"] else "workers"
