"""`qvpo bench rivals`: an update and an action of every algorithm of Table 1, side by side."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.policy.sample_batch import SampleBatch

from qvpo_rllib.algorithms import ALGORITHMS
from qvpo_rllib.algorithms.columnar_buffer import ColumnarBuffer
from qvpo_rllib.bench.learner import filled_replay
from qvpo_rllib.bench.sizes import SETTINGS, TASKS, Task
from qvpo_rllib.bench.timing import measure

# As in the paper's Table 4: the diffusion policies take as many steps.
SAME_CHAIN = {"paper": {"diffusion_steps": 20}, "light": {"diffusion_steps": 5}}
MILLION_STEPS_H = 1e6 / 3600


def run(*, tasks: Sequence[str], settings: Sequence[str], repeats: int) -> Iterator[dict[str, Any]]:
    """A row per task, setting and algorithm, on the CPU: medians, smallest and largest round.

    All algorithms of a task and setting take turns in each round. Times include drawing batches
    and noise. An action is one observation's, as in training and as in evaluation. `learning_h` is
    the time of the updates that 1e6 env steps ask for, in hours: neither environments nor acting.
    """
    for setting in settings:
        for name in tasks:
            yield from _rows(TASKS[name], name, setting, repeats)


def _rows(task: Task, task_name: str, setting: str, repeats: int) -> Iterator[dict[str, Any]]:
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
        update = times[f"{name} update"]
        row: dict[str, Any] = {
            "setting": setting,
            "task": task_name,
            "algorithm": ALGORITHMS[name].label,
            "updates_per_s": 1 / update.median,
            "updates_per_step": updates_per_step[name],
            "learning_h": update.median * updates_per_step[name] * MILLION_STEPS_H,
        }
        for what in ("update", "explore", "evaluate"):
            found = times[f"{name} {what}"]
            row[f"{what}_ms"] = 1e3 * found.median
            row[f"{what}_ms_range"] = [1e3 * t for t in found.spread]
        yield row


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
    """A policy with its learner, for spaces of the task's size."""
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
    """What one gradient step of a training run calls."""
    hp = config.hyperparameters()
    if name in ("ppo", "spo"):
        batch = _on_policy_batch(policy, task, hp.minibatch_size)
        return lambda: policy.learn_on_batch(batch)
    if name == "sac":
        buffer = ColumnarBuffer(hp.replay_capacity, hp.batch_size, 0, False)
        buffer.replay = filled_replay(task, policy.device)

        def update() -> None:
            policy.learn_on_batch(buffer.sample(1).policy_batches["default_policy"])
            policy.update_target()

        return update
    replay = filled_replay(task, policy.device, improves_actions=True)
    return lambda: policy.learner.train(replay, 1)


def _on_policy_batch(policy: Any, task: Task, size: int) -> SampleBatch:
    """Random observations with the policy's own actions and random advantages."""
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
