"""`qvpo bench rollout`: env steps of the columnar worker beside RLlib's stock `RolloutWorker`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from qvpo_rllib.algorithms.qvpo import QVPOConfig, QVPOTorchPolicy
from qvpo_rllib.bench.sizes import TASKS, Task, hyperparameters
from qvpo_rllib.bench.timing import Times, measure, ratio
from qvpo_rllib.rollout.worker import ColumnarRolloutWorker

FRAGMENT_STEPS = 1024  # env steps of a measured fragment


def run(
    *, task: str, num_envs: Sequence[int], setting: str, repeats: int
) -> Iterator[dict[str, Any]]:
    """A row per number of environments, all in this process; PyTorch on one thread.

    Rates are env steps/s: `environment`: the environments alone, stepped in a plain loop with
    actions drawn beforehand; `columnar` and `stock`: the two workers with random actions, the
    columnar one stepping environments in threads where that is faster (OMP_NUM_THREADS=1: never);
    `acting`: the columnar worker with the best of K_b actions.
    """
    for n in num_envs:
        yield {"task": task, "num_envs": n} | _row(TASKS[task], n, setting, repeats)


def _row(task: Task, num_envs: int, setting: str, repeats: int) -> dict[str, Any]:
    length = max(1, FRAGMENT_STEPS // num_envs)
    columnar = columnar_worker(task, num_envs, length, setting)
    stock = stock_worker(task, num_envs, length)
    times = measure(
        {
            "environment": environments_alone(task, num_envs, length),
            "columnar": lambda: columnar.collect(random_actions=True),
            "stock": stock.sample,
            "acting": columnar.collect,
        },
        repeats=repeats,
        device=torch.device("cpu"),
    )
    columnar.stop()
    stock.stop()
    steps = length * num_envs
    speedup = ratio(times["stock"], times["columnar"])
    share = ratio(times["environment"], times["columnar"])
    return {
        **{f"{name}_per_s": steps / t.median for name, t in times.items()},
        **{f"{name}_per_s_range": _rates(steps, t) for name, t in times.items()},
        "speedup": speedup.median,
        "speedup_range": list(speedup.spread),
        "environment_share": share.median,
        "environment_share_range": list(share.spread),
        "limit": _limit(times),
    }


def _limit(times: dict[str, Times]) -> str:
    """What takes the most of a step of training: the environment, choosing actions, or the rest."""
    parts = {
        "environment": times["environment"].median,
        "columns": times["columnar"].median - times["environment"].median,
        "choosing actions": times["acting"].median - times["columnar"].median,
    }
    return max(parts, key=lambda name: parts[name])


def _rates(steps: int, times: Times) -> list[float]:
    fastest, slowest = times.spread
    return [steps / slowest, steps / fastest]


def columnar_worker(task: Task, num_envs: int, length: int, setting: str) -> ColumnarRolloutWorker:
    """This package's worker, without an algorithm around it."""
    options = hyperparameters(setting, task, engine="eager").to_dict()
    config = QVPOConfig().environment(task.env).training(**options).debugging(seed=0)
    config.env_runners(num_envs_per_env_runner=num_envs, rollout_fragment_length=length)
    return ColumnarRolloutWorker(
        env_creator=_creator(task), default_policy_class=QVPOTorchPolicy, config=config
    )


def stock_worker(task: Task, num_envs: int, length: int) -> Any:
    """RLlib's worker with its own policy of random actions."""
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
    from ray.rllib.evaluation.rollout_worker import RolloutWorker
    from ray.rllib.examples._old_api_stack.policy.random_policy import RandomPolicy

    config = AlgorithmConfig().environment(task.env).debugging(seed=0).framework("torch")
    config.enable_rl_module_and_learner = config.enable_env_runner_and_connector_v2 = False
    config.env_runners(num_envs_per_env_runner=num_envs, rollout_fragment_length=length)
    return RolloutWorker(
        env_creator=_creator(task), default_policy_class=RandomPolicy, config=config
    )


def environments_alone(task: Task, num_envs: int, length: int) -> Callable[[], object]:
    """Steps and resets of the same environments with ready actions, and nothing else."""
    envs = [gym.make(task.env) for _ in range(num_envs)]
    space = envs[0].action_space
    assert isinstance(space, gym.spaces.Box)
    actions = np.random.default_rng(0).uniform(space.low, space.high, (length, *space.shape))
    for i, env in enumerate(envs):
        env.reset(seed=i)

    def step_all() -> None:
        for action in actions:
            for env in envs:
                _, _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    env.reset()

    return step_all


def _creator(task: Task) -> Callable[[Any], gym.Env[Any, Any]]:
    return lambda context: gym.make(task.env)
