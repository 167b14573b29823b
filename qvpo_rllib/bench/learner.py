"""`qvpo bench learner`: updates per second, against the straightforward implementation."""

import itertools
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qvpo_rllib.bench.options import Row, add_device, add_engines, add_settings, add_tasks
from qvpo_rllib.bench.sizes import TASKS, Task, hyperparameters, update_flops
from qvpo_rllib.core.hyperparameters import QVPOHyperparameters

if TYPE_CHECKING:
    import torch

    from qvpo_rllib.core.replay import ReplayBuffer, Transitions

HELP = "one update of actor, critics and targets"
COLUMNS = {
    "setting": "setting",
    "task": "task",
    "engine": "engine",
    "precision": "precision",
    "update_ms": "ms per update",
    "updates_per_s": "updates/s",
    "straightforward_ms": "straightforward ms",
    "speedup": "times as fast",
    "matmul_bound": "matrix-product bound",
}
REPLAY_SIZE = 10_000


def add_arguments(parser: ArgumentParser) -> None:
    add_tasks(parser)
    add_device(parser)
    add_settings(parser)
    add_engines(parser)
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["fp32"],
        choices=("fp32", "tf32", "bf16"),
        help="of the products that draw action samples (default fp32)",
    )


def run(options: Namespace) -> Iterator[Row]:
    """Yields a row per combination of options; see `timing.compare` for the columns.

    Times include drawing the batches from the replay and the noise.
    """
    for setting, task, engine, precision in itertools.product(
        options.setting, options.task, options.engine, options.precision
    ):
        hp = hyperparameters(setting, TASKS[task], engine=engine, sampling_precision=precision)
        row = _row(TASKS[task], hp, options.device, options.repeats)
        yield {"setting": setting, "task": task} | row


def _row(task: Task, hp: QVPOHyperparameters, device_name: str, repeats: int) -> Row:
    import torch

    from qvpo_rllib.bench.straightforward import Straightforward
    from qvpo_rllib.bench.timing import compare
    from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks

    device = torch.device(device_name)
    torch.manual_seed(0)
    networks = QVPONetworks(task.obs_dim, task.act_dim, hp).to(device)
    straightforward = Straightforward(networks, hp)
    learner = QVPOLearner(networks, hp, seed=0, device=device)
    replay = filled_replay(task, device)

    def straightforward_update() -> object:
        batches = replay.sample(hp.batch_size), replay.sample(hp.batch_size)
        return straightforward.update(*batches, learner.draw_update_noise(hp.batch_size))

    row = compare(
        "update",
        lambda: learner.train(replay, 1),
        straightforward_update,
        update_flops(task, hp),
        repeats=repeats,
        device=device,
    )
    row |= {"engine": learner.engine, "precision": hp.sampling_precision}
    return row | {"updates_per_s": 1e3 / row["update_ms"]}


def filled_replay(
    task: Task, device: "torch.device", *, improves_actions: bool = False
) -> "ReplayBuffer":
    """Returns a full replay of random transitions of the task's size."""
    import torch

    from qvpo_rllib.core.replay import ReplayBuffer

    replay = ReplayBuffer(
        REPLAY_SIZE,
        task.obs_dim,
        task.act_dim,
        seed=0,
        device=device,
        improves_actions=improves_actions,
    )
    replay.add(random_transitions(task, REPLAY_SIZE, torch.Generator().manual_seed(0)))
    return replay


def random_transitions(task: Task, count: int, generator: "torch.Generator") -> "Transitions":
    """Returns `count` transitions of the task's size, of which about two in a hundred are terminal.

    Observations and rewards are standard normal; actions lie in (-1, 1).
    """
    import torch

    from qvpo_rllib.core.replay import Transitions

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator)

    return Transitions(
        obs=normal(task.obs_dim),
        action=normal(task.act_dim).tanh(),
        reward=normal(),
        next_obs=normal(task.obs_dim),
        terminal=(normal() > 2).float(),
    )
