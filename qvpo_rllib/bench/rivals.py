"""`qvpo bench rivals`: an update and an action of every algorithm of Table 1, side by side."""

import functools
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from qvpo_rllib.algorithms import ALGORITHMS
from qvpo_rllib.bench.learner import filled_replay
from qvpo_rllib.bench.options import Row, add_settings, add_tasks
from qvpo_rllib.bench.sizes import SETTINGS, TASKS, Task

if TYPE_CHECKING:
    from ray.rllib.policy.sample_batch import SampleBatch

HELP = "an update and an action of each algorithm"
COLUMNS = {
    "setting": "setting",
    "task": "task",
    "algorithm": "algorithm",
    "update_ms": "ms per update",
    "updates_per_s": "updates/s",
    "learning_h": "h of updates, 1e6 env steps",
    "explore_ms": "ms per action, training",
    "evaluate_ms": "ms per action, evaluation",
}
# As in the paper's Table 4: the diffusion policies take as many steps.
SAME_CHAIN = {"paper": {"diffusion_steps": 20}, "light": {"diffusion_steps": 5}}
MILLION_STEPS_H = 1e6 / 3600


def add_arguments(parser: ArgumentParser) -> None:
    add_tasks(parser, threads=1)
    add_settings(parser)


def run(options: Namespace) -> Iterator[Row]:
    """Yields a row per task, setting and algorithm, on the CPU: medians, smallest, largest round.

    All algorithms of a task and setting take turns in each round. Times include drawing batches
    and noise. An action is one observation's, as in training and as in evaluation. `learning_h` is
    the time of the updates that 1e6 env steps ask for, in hours: neither environments nor acting.
    """
    for setting in options.setting:
        for name in options.task:
            for row in _rows(TASKS[name], setting, options.repeats):
                yield {"setting": setting, "task": name} | row


def _rows(task: Task, setting: str, repeats: int) -> Iterator[Row]:
    import numpy as np
    import torch

    from qvpo_rllib.bench.timing import measure

    calls: dict[str, Callable[[], object]] = {}
    updates_per_step = {}
    for name in ALGORITHMS:
        config = _config(name, task, setting)
        policy = _policy(name, task, config)
        obs = np.zeros((1, task.obs_dim), np.float32)
        calls[f"{name} update"] = _update(name, policy, task, config)
        calls[f"{name} explore"] = functools.partial(policy.act, obs, explore=True)
        calls[f"{name} evaluate"] = functools.partial(policy.act, obs)
        updates_per_step[name] = _updates_per_step(config)
    times = measure(calls, repeats=repeats, device=torch.device("cpu"))
    for name in ALGORITHMS:
        seconds = times[f"{name} update"].median
        yield {
            "algorithm": ALGORITHMS[name].label,
            "updates_per_s": 1 / seconds,
            "updates_per_step": updates_per_step[name],
            "learning_h": seconds * updates_per_step[name] * MILLION_STEPS_H,
            **times[f"{name} update"].columns("update_ms", 1e3),
            **times[f"{name} explore"].columns("explore_ms", 1e3),
            **times[f"{name} evaluate"].columns("evaluate_ms", 1e3),
        }


def _config(name: str, task: Task, setting: str) -> Any:
    entry = ALGORITHMS[name]
    options = dict(entry.hyperparameters.presets[SETTINGS[setting]])
    if hasattr(entry.hyperparameters, "diffusion_steps"):
        options |= SAME_CHAIN[setting]
    if name == "qvpo":
        options["engine"] = "native"
    config = entry.load().get_default_config().environment(task.env).training(**options)
    config.debugging(seed=0)
    config.validate()
    return config


def _policy(name: str, task: Task, config: Any) -> Any:
    """Returns a policy with its learner, for spaces of the task's size."""
    import gymnasium as gym
    import numpy as np

    values = config.to_dict() | {"worker_index": 0, "in_evaluation": False}
    obs_space = gym.spaces.Box(-np.inf, np.inf, (task.obs_dim,), np.float32)
    act_space = gym.spaces.Box(-1.0, 1.0, (task.act_dim,), np.float32)
    kind = ALGORITHMS[name].load().get_default_policy_class(config)
    return kind(obs_space, act_space, values)


def _updates_per_step(config: Any) -> float:
    hp = config.hyperparameters()
    if hasattr(hp, "num_epochs"):
        return float(hp.num_epochs / hp.minibatch_size)
    return float(hp.update_ratio)


def _update(name: str, policy: Any, task: Task, config: Any) -> Callable[[], object]:
    """Returns what one gradient step of a training run calls."""
    hp = config.hyperparameters()
    if name in ("ppo", "spo"):
        batch = _on_policy_batch(policy, task, hp.minibatch_size)
        return lambda: policy.learn_on_batch(batch)
    if name == "sac":
        from qvpo_rllib.algorithms.columnar_buffer import ColumnarBuffer

        buffer = ColumnarBuffer(hp.replay_capacity, hp.batch_size, 0, False)
        buffer.replay = filled_replay(task, policy.device)

        def update() -> None:
            policy.learn_on_batch(buffer.sample(1).policy_batches["default_policy"])
            policy.update_target()

        return update
    replay = filled_replay(task, policy.device, improves_actions=True)
    return lambda: policy.learner.train(replay, 1)


def _on_policy_batch(policy: Any, task: Task, size: int) -> "SampleBatch":
    """Returns random observations with the policy's own actions and random advantages."""
    import numpy as np
    from ray.rllib.evaluation.postprocessing import Postprocessing
    from ray.rllib.policy.sample_batch import SampleBatch

    generator = np.random.default_rng(0)
    obs = generator.standard_normal((size, task.obs_dim)).astype(np.float32)
    actions, _, extras = policy.compute_actions(obs)
    columns = {
        SampleBatch.OBS: obs,
        SampleBatch.ACTIONS: actions,
        Postprocessing.ADVANTAGES: generator.standard_normal(size).astype(np.float32),
        Postprocessing.VALUE_TARGETS: generator.standard_normal(size).astype(np.float32),
    }
    return SampleBatch(columns | extras)
