"""`qvpo bench peers`: an env step of training with `light`, against Stable-Baselines3's SAC."""

import importlib.util
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import Any

from qvpo_rllib.bench.options import ENGINES, Row, positive
from qvpo_rllib.bench.sizes import TASKS, hyperparameters

HELP = "an env step of training with `light`, beside Stable-Baselines3's SAC"
COLUMNS = {
    "threads": "threads",
    "policy_interval": "policy interval",
    "ours_ms": "ms per env step",
    "sac_ms": "SB3's SAC, ms per env step",
    "ratio": "times SB3's",
}
PACKAGE = "stable_baselines3"
WARMUP_STEPS = 300  # of either, before its first update


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--threads", dest="thread_counts", nargs="+", type=positive, default=[1, 2], metavar="N",
        help="CPU threads, a row each (default 1 2)",
    )  # fmt: skip
    parser.add_argument(
        "--policy-interval", type=positive, nargs="+", metavar="N",
        help="values of the option, a row each (default: the preset's)",
    )  # fmt: skip
    parser.add_argument("--engine", choices=ENGINES, help="default: the preset's")
    parser.add_argument("--env-steps", type=positive, default=100, metavar="N", help="of a round")
    parser.add_argument("--repeats", type=positive, default=7, metavar="N", help="default 7")


def run(options: Namespace) -> Iterator[Row]:
    """Yields a row per number of threads and interval.

    Both train on HalfCheetah-v5 in this process: environment, replay, acting and updates, in rounds
    that visit SAC and every interval in turn. SAC has SB3's defaults: one environment, an update of
    a batch of 256 for each env step, two hidden layers of 256.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError(f"bench peers needs {PACKAGE}: pip install 'qvpo_rllib[peers]'.")
    import ray
    import torch

    from qvpo_rllib.bench.timing import Times, ratio
    from qvpo_rllib.ray_session import start_ray

    start_ray(1)
    try:
        for threads in options.thread_counts:
            torch.set_num_threads(threads)
            calls: dict[Any, Callable[[], int]] = {"sac": _sac(options.env_steps)}
            for interval in options.policy_interval or [None]:
                ours, interval = _ours(options.env_steps, options.engine, interval)
                calls[interval] = ours
            rounds: dict[Any, list[float]] = {name: [] for name in calls}
            for _ in range(options.repeats):
                for name, call in calls.items():
                    start = time.perf_counter()
                    steps = call()
                    rounds[name].append((time.perf_counter() - start) / steps)
            sac = Times(rounds.pop("sac"))
            for interval, seconds in rounds.items():
                yield {
                    "threads": threads,
                    "policy_interval": interval,
                    **Times(seconds).columns("ours_ms", 1e3),
                    **sac.columns("sac_ms", 1e3),
                    **ratio(Times(seconds), sac).columns("ratio"),
                }
    finally:
        ray.shutdown()


def _sac(env_steps: int) -> Callable[[], int]:
    from stable_baselines3 import SAC

    sac = SAC("MlpPolicy", TASKS["halfcheetah"].env, learning_starts=WARMUP_STEPS, seed=0,
              buffer_size=100_000, device="cpu")  # fmt: skip
    sac.learn(WARMUP_STEPS + 20)

    def train() -> int:
        sac.learn(env_steps, reset_num_timesteps=False)
        return env_steps

    return train


def _ours(
    env_steps: int, engine: str | None, interval: int | None
) -> tuple[Callable[[], int], int]:
    """Returns a call that trains and returns the env steps it took, and the policy's interval."""
    from qvpo_rllib.algorithms.qvpo import QVPOConfig

    task = TASKS["halfcheetah"]
    given = {"engine": engine, "policy_interval": interval}
    hp = hyperparameters("light", task, warmup_steps=WARMUP_STEPS,
                         **{k: v for k, v in given.items() if v is not None})  # fmt: skip
    config = QVPOConfig().environment(task.env).training(**hp.to_dict())
    config.env_runners(num_env_runners=0, num_envs_per_env_runner=1)
    config.reporting(min_sample_timesteps_per_iteration=env_steps)
    config.evaluation(evaluation_interval=None).debugging(seed=0, log_level="ERROR")
    algorithm = config.build_algo()
    while algorithm.ledger.done < 20:  # past the warm-up, and compiled
        algorithm.train()

    def train() -> int:
        before = algorithm.ledger.ingested
        algorithm.train()
        return int(algorithm.ledger.ingested - before)

    return train, hp.policy_interval
