"""`qvpo bench rivals`: an update and an action of QVPO and its off-policy rivals, side by side."""

from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from qvpo_rllib.bench.learner import filled_replay
from qvpo_rllib.bench.sizes import SETTINGS, TASKS, Task
from qvpo_rllib.bench.timing import measure
from qvpo_rllib.experiments.algorithms import ALGORITHMS

NAMES = ("qvpo", "dipo", "qsm", "td3")
# As in the paper's Table 4: the diffusion policies take as many steps.
SAME_CHAIN = {"paper": {"diffusion_steps": 20}, "light": {"diffusion_steps": 5}}


def run(*, tasks: Sequence[str], settings: Sequence[str], repeats: int) -> Iterator[dict[str, Any]]:
    """A row per task, setting and algorithm, on the CPU: medians, smallest and largest round.

    All algorithms of a task and setting take turns in each round. Times include drawing batches
    and noise. An action is one observation's, as in training and as in evaluation.
    """
    for setting in settings:
        for name in tasks:
            yield from _rows(name, setting, repeats)


def _rows(task: str, setting: str, repeats: int) -> Iterator[dict[str, Any]]:
    calls: dict[str, Any] = {}
    for name in NAMES:
        policy = _policy(name, TASKS[task], setting)
        replay = filled_replay(TASKS[task], policy.device, improves_actions=True)
        obs = np.zeros((1, policy.obs_dim), np.float32)
        calls[f"{name} update"] = lambda p=policy, r=replay: p.learner.train(r, 1)
        calls[f"{name} explore"] = lambda p=policy, o=obs: p.choose(o, explore=True)
        calls[f"{name} evaluate"] = lambda p=policy, o=obs: p.choose(o, explore=False)
    times = measure(calls, repeats=repeats, device=torch.device("cpu"))
    for name in NAMES:
        row: dict[str, Any] = {
            "setting": setting,
            "task": task,
            "algorithm": ALGORITHMS[name].label,
            "updates_per_s": 1 / times[f"{name} update"].median,
        }
        for what in ("update", "explore", "evaluate"):
            found = times[f"{name} {what}"]
            row[f"{what}_ms"] = 1e3 * found.median
            row[f"{what}_ms_range"] = [1e3 * t for t in found.spread]
        yield row


def _policy(name: str, task: Task, setting: str) -> Any:
    """A policy with its learner, for spaces of the task's size."""
    entry = ALGORITHMS[name]
    options = dict(entry.presets[SETTINGS[setting]])
    if "diffusion_steps" in entry.options({}):
        options |= SAME_CHAIN[setting]
    if name == "qvpo":
        options["engine"] = "native"
    config = entry.load().get_default_config().environment(task.env).training(**options)
    config.debugging(seed=0)
    values = config.to_dict() | {"worker_index": 0, "in_evaluation": False}
    obs_space = gym.spaces.Box(-np.inf, np.inf, (task.obs_dim,), np.float32)
    act_space = gym.spaces.Box(-1.0, 1.0, (task.act_dim,), np.float32)
    return entry.load().get_default_policy_class(config)(obs_space, act_space, values)
