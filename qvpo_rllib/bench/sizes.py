"""The problem sizes that are timed, and the arithmetic they need.

FLOPs count matrix products alone, a multiplication and an addition each, and only those that are
needed: what the observation and the diffusion step share is multiplied once.
"""

import itertools
from typing import NamedTuple

from qvpo_rllib.core.options import OptionValue
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters


class Task(NamedTuple):
    env: str
    obs_dim: int
    act_dim: int


TASKS = {
    "hopper": Task("Hopper-v5", 11, 3),
    "halfcheetah": Task("HalfCheetah-v5", 17, 6),
    "ant": Task("Ant-v5", 105, 8),
    "humanoid": Task("Humanoid-v5", 348, 17),
}
# "paper" is the package's default: the paper's sizes on the authors' three hidden layers.
SETTINGS = {"paper": "default", "light": "light"}


def hyperparameters(setting: str, task: Task, **options: OptionValue) -> QVPOHyperparameters:
    """Returns the hyperparameters of a setting for a task, with some options changed."""
    return QVPOHyperparameters.resolve(SETTINGS[setting], options, task.env)


def hidden_flops(hidden: tuple[int, ...], out: int) -> int:
    """Returns the FLOPs of the layers behind the first, for one row."""
    return sum(2 * i * o for i, o in itertools.pairwise((*hidden, out)))


def critic_outputs(hp: QVPOHyperparameters) -> int:
    """Returns how many numbers each of the critics gives for a row."""
    return hp.num_quantiles if hp.critic == "quantile" else 1


def sampling_flops(task: Task, hp: QVPOHyperparameters, num_states: int, num_samples: int) -> int:
    """Returns the FLOPs of drawing N actions for each of B states."""
    width = hp.hidden[0]
    row = 2 * task.act_dim * width + hidden_flops(hp.hidden, task.act_dim)
    return (
        hp.diffusion_steps * num_states * num_samples * row + 2 * num_states * task.obs_dim * width
    )


def ranking_flops(task: Task, hp: QVPOHyperparameters, num_states: int, num_samples: int) -> int:
    """Returns the FLOPs of both critics on N actions for each of B states."""
    width = hp.hidden[0]
    row = 2 * task.act_dim * width + hidden_flops(hp.hidden, critic_outputs(hp))
    return 2 * (num_states * num_samples * row + 2 * num_states * task.obs_dim * width)


def acting_flops(task: Task, hp: QVPOHyperparameters, num_states: int, k: int) -> int:
    """Returns the FLOPs of choosing the best of K actions for each of B states."""
    ranking = ranking_flops(task, hp, num_states, k) if k > 1 else 0
    return sampling_flops(task, hp, num_states, k) + ranking


def gradient_flops(task: Task, hp: QVPOHyperparameters) -> int:
    """Returns the FLOPs of moving an update's chosen samples by the critics' gradient."""
    rows, width = hp.batch_size * hp.num_trained_samples, hp.hidden[0]
    row = 2 * task.act_dim * width + hidden_flops(hp.hidden, critic_outputs(hp))
    climbing = 2 * (2 * rows * hp.gradient_steps * row + 2 * rows * task.obs_dim * width)
    return climbing + ranking_flops(task, hp, hp.batch_size, hp.num_trained_samples)


def update_flops(task: Task, hp: QVPOHyperparameters) -> int:
    """Returns the FLOPs of one update: samples, their ranking, both fits forward and backward.

    Guidance and the entropy in the target are not counted.
    """
    assert hp.k_target is not None
    batch, width = hp.batch_size, hp.hidden[0]
    drawing = sum(
        sampling_flops(task, hp, batch, n) + ranking_flops(task, hp, batch, n)
        for n in (hp.k_target, hp.num_policy_samples)
    )
    # A fit multiplies three times: forward, by the weights' and by the input's gradient; the first
    # layer's input needs none.
    critic_first = 2 * (task.obs_dim + task.act_dim) * width
    critic_fit = 2 * batch * (2 * critic_first + 3 * hidden_flops(hp.hidden, critic_outputs(hp)))
    rows = batch * (hp.num_trained_samples + hp.num_uniform_samples)
    actor_fit = rows * (2 * 2 * task.act_dim * width + 3 * hidden_flops(hp.hidden, task.act_dim))
    actor_fit += 2 * batch * 2 * task.obs_dim * width
    refinement = gradient_flops(task, hp) if hp.target_refinement == "gradient" else 0
    return drawing + refinement + critic_fit + actor_fit
