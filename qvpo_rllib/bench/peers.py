"""`qvpo bench peers`: an env step of training with `light`, against Stable-Baselines3's SAC."""

import importlib.util
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping

from qvpo_rllib.bench.options import Row, add_set, positive
from qvpo_rllib.bench.sizes import TASKS, hyperparameters
from qvpo_rllib.core.options import OptionValue

HELP = "an env step of training with `light`, beside Stable-Baselines3's SAC"
COLUMNS = {
    "threads": "threads",
    "options": "options",
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
    parser.add_argument("--env-steps", type=positive, default=100, metavar="N", help="of a round")
    parser.add_argument("--repeats", type=positive, default=7, metavar="N", help="default 7")
    add_set(parser)


def run(options: Namespace) -> Iterator[Row]:
    """Yields a row per number of threads; with --set a second one each, with these options.

    Both train on HalfCheetah-v5 in this process: environment, replay, acting and updates, in rounds
    that visit SAC and every row in turn. SAC has SB3's defaults: one environment, an update of a
    batch of 256 for each env step, two hidden layers of 256.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError(f"bench peers needs {PACKAGE}: pip install 'qvpo_rllib[peers]'.")
    import ray
    import torch

    from qvpo_rllib.bench.timing import Times, ratio
    from qvpo_rllib.ray_session import start_ray

    start_ray(1)
    try:
        changes = [{}, dict(options.settings)] if options.settings else [{}]
        for threads in options.thread_counts:
            torch.set_num_threads(threads)
            calls = [_sac(options.env_steps)]
            calls += [_ours(options.env_steps, changed) for changed in changes]
            rounds: list[list[float]] = [[] for _ in calls]
            for _ in range(options.repeats):
                for call, seconds in zip(calls, rounds, strict=True):
                    start = time.perf_counter()
                    steps = call()
                    seconds.append((time.perf_counter() - start) / steps)
            sac, *ours = map(Times, rounds)
            for changed, times in zip(changes, ours, strict=True):
                yield {
                    "threads": threads,
                    "options": " ".join("=".join(pair) for pair in changed.items()),
                    **times.columns("ours_ms", 1e3),
                    **sac.columns("sac_ms", 1e3),
                    **ratio(times, sac).columns("ratio"),
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


def _ours(env_steps: int, changed: Mapping[str, str]) -> Callable[[], int]:
    from qvpo_rllib.algorithms.qvpo import QVPOConfig

    task = TASKS["halfcheetah"]
    values: dict[str, OptionValue] = {"warmup_steps": WARMUP_STEPS, **changed}
    hp = hyperparameters("light", task, **values)
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

    return train
