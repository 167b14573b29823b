"""`qvpo bench rollout`: env steps of the columnar worker beside RLlib's stock `RolloutWorker`."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from qvpo_rllib.bench.options import Row, add_sampling, positive
from qvpo_rllib.bench.sizes import TASKS, Task, hyperparameters

if TYPE_CHECKING:
    import gymnasium as gym
    from ray.rllib.evaluation.rollout_worker import RolloutWorker

    from qvpo_rllib.bench.timing import Times
    from qvpo_rllib.rollout.worker import ColumnarRolloutWorker

HELP = "env steps of a rollout worker beside RLlib's stock worker, random actions"
COLUMNS = {
    "task": "task",
    "num_envs": "environments",
    "environment_per_s": "environments alone, steps/s",
    "columnar_per_s": "columnar worker, steps/s",
    "stock_per_s": "stock worker, steps/s",
    "speedup": "times as fast",
    "acting_per_s": "best of K_b, steps/s",
    "limit": "most time",
}
FRAGMENT_STEPS = 1024  # env steps of a measured fragment


def add_arguments(parser: ArgumentParser) -> None:
    add_sampling(parser)
    parser.add_argument("--num-envs", nargs="+", type=positive, default=[1, 8, 64], metavar="N")


def run(options: Namespace) -> Iterator[Row]:
    """Yields a row per number of environments, all in this process; PyTorch on one thread.

    Rates are env steps/s: `environment`: the environments alone, stepped in a plain loop with
    actions drawn beforehand; `columnar` and `stock`: the two workers with random actions, the
    columnar one stepping environments in threads where that is faster (OMP_NUM_THREADS=1: never);
    `acting`: the columnar worker with the best of K_b actions.
    """
    for n in options.num_envs:
        row = _row(TASKS[options.task], n, options.setting, options.repeats)
        yield {"task": options.task, "num_envs": n} | row


def _row(task: Task, num_envs: int, setting: str, repeats: int) -> Row:
    import torch

    from qvpo_rllib.bench.timing import Times, measure, ratio

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
    row: Row = {"limit": _limit(times)}
    for name, found in times.items():
        rates = Times([length * num_envs / seconds for seconds in found.rounds])
        row |= rates.columns(f"{name}_per_s")
    row |= ratio(times["stock"], times["columnar"]).columns("speedup")
    return row | ratio(times["environment"], times["columnar"]).columns("environment_share")


def _limit(times: "dict[str, Times]") -> str:
    """Returns what takes most of a training step: environment, choosing actions, or the rest."""
    parts = {
        "environment": times["environment"].median,
        "columns": times["columnar"].median - times["environment"].median,
        "choosing actions": times["acting"].median - times["columnar"].median,
    }
    return max(parts, key=lambda name: parts[name])


def columnar_worker(
    task: Task, num_envs: int, length: int, setting: str
) -> "ColumnarRolloutWorker":
    """Returns this package's worker, without an algorithm around it."""
    from qvpo_rllib.algorithms.qvpo import QVPOConfig, QVPOTorchPolicy
    from qvpo_rllib.rollout.worker import ColumnarRolloutWorker

    options = hyperparameters(setting, task, engine="eager").to_dict()
    config = QVPOConfig().environment(task.env).training(**options).debugging(seed=0)
    config.env_runners(num_envs_per_env_runner=num_envs, rollout_fragment_length=length)
    return ColumnarRolloutWorker(
        env_creator=_creator(task), default_policy_class=QVPOTorchPolicy, config=config
    )


def stock_worker(task: Task, num_envs: int, length: int) -> "RolloutWorker":
    """Returns RLlib's worker with its own policy of random actions."""
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
    from ray.rllib.evaluation.rollout_worker import RolloutWorker

    from qvpo_rllib.runtime.ray_private import random_policy

    config = AlgorithmConfig().environment(task.env).debugging(seed=0).framework("torch")
    config.enable_rl_module_and_learner = config.enable_env_runner_and_connector_v2 = False
    config.env_runners(num_envs_per_env_runner=num_envs, rollout_fragment_length=length)
    return RolloutWorker(
        env_creator=_creator(task), default_policy_class=random_policy(), config=config
    )


def environments_alone(task: Task, num_envs: int, length: int) -> Callable[[], object]:
    """Returns a call that steps and resets the same environments with ready actions."""
    import gymnasium as gym
    import numpy as np

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


def _creator(task: Task) -> "Callable[[Any], gym.Env[Any, Any]]":
    import gymnasium as gym

    return lambda context: gym.make(task.env)
