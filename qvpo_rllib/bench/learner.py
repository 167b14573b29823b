"""`qvpo bench learner`: updates per second, against the straightforward implementation."""

import itertools
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qvpo_rllib.bench.options import (
    Row,
    add_device,
    add_engines,
    add_set,
    add_settings,
    add_tasks,
)
from qvpo_rllib.bench.sizes import TASKS, Task, hyperparameters, update_flops
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters

if TYPE_CHECKING:
    import torch

    from qvpo_rllib.core.replay import ReplayBuffer, Transitions

HELP = "one update of actor, critics and targets"
COLUMNS = {
    "setting": "setting",
    "task": "task",
    "engine": "engine",
    "precision": "precision",
    "ranking": "ranking",
    "options": "options",
    "update_ms": "ms per update",
    "updates_per_s": "updates/s",
    "straightforward_ms": "straightforward ms",
    "speedup": "times as fast",
    "matmul_bound": "matrix-product bound",
}
REPLAY_SIZE = 10_000
UPDATES_PER_CALL = 64  # eight graphs of eight


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
    parser.add_argument(
        "--ranking",
        nargs="+",
        default=["fp32"],
        choices=("fp32", "tf32"),
        help="of the products that rank them (default fp32)",
    )
    add_set(parser)


def run(options: Namespace) -> Iterator[Row]:
    """Yields a row per combination of options; see `timing.compare` for the columns.

    Times include drawing the batches from the replay and the noise. On a GPU a call is
    `UPDATES_PER_CALL` updates, after both graphs have been captured. With --set each row without
    it is followed by one with it; the straightforward implementation follows the options that it
    has, and has twins, single-step targets and so on in both.
    """
    changes = [{}, dict(options.settings)] if options.settings else [{}]
    rows = []  # all are checked before the first is timed
    for setting, task, engine, precision, ranking, changed in itertools.product(
        options.setting, options.task, options.engine, options.precision, options.ranking, changes
    ):
        values = {
            "engine": engine,
            "sampling_precision": precision,
            "ranking_precision": ranking,
            **changed,
        }
        words = " ".join("=".join(pair) for pair in changed.items())
        labels = {"setting": setting, "task": task, "options": words}
        rows.append((labels, TASKS[task], hyperparameters(setting, TASKS[task], **values)))
    for labels, sizes, hp in rows:
        yield labels | _row(sizes, hp, options.device, options.repeats)


def _row(task: Task, hp: QVPOHyperparameters, device_name: str, repeats: int) -> Row:
    import torch

    from qvpo_rllib.bench.straightforward import Straightforward, as_followed
    from qvpo_rllib.bench.timing import compare
    from qvpo_rllib.core.engine import FALLBACKS, UPDATES_BEFORE_CAPTURE, UPDATES_PER_GRAPH
    from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks

    device = torch.device(device_name)
    torch.manual_seed(0)
    networks = QVPONetworks(task.obs_dim, task.act_dim, hp).to(device)
    plain = as_followed(hp)
    plain_networks = QVPONetworks(task.obs_dim, task.act_dim, plain).to(device)
    straightforward = Straightforward(plain_networks, plain)
    draws = QVPOLearner(plain_networks, plain, seed=0, device=device)
    learner = QVPOLearner(networks, hp, seed=0, device=device)
    replay = filled_replay(task, device, follows_episodes=hp.n_step > 1)

    def straightforward_update() -> object:
        batches = replay.sample(hp.batch_size), replay.sample(hp.batch_size)
        return straightforward.update(*batches, draws.draw_update_noise(hp.batch_size))

    per_call = UPDATES_PER_CALL if device.type == "cuda" else 1
    if per_call > 1:
        learner.train(replay, UPDATES_BEFORE_CAPTURE + UPDATES_PER_GRAPH + 1)
    row = compare(
        "update",
        lambda: learner.train(replay, per_call),
        straightforward_update,
        update_flops(task, hp),
        repeats=repeats,
        device=device,
        per_call=per_call,
        precision=hp.sampling_precision,
    )
    row |= {
        "engine": learner.engine,
        "precision": hp.sampling_precision,
        "ranking": hp.ranking_precision,
        "fused": learner.fused is not None,
        "fell_back": dict(FALLBACKS),
        "updates_per_s": 1e3 / row["update_ms"],
    }
    if per_call > 1:
        graphs = learner.engine == "cuda_graph"
        row["graph_of"] = UPDATES_PER_GRAPH if graphs else None
        row["kernels_per_update"] = _kernels(lambda: learner.train(replay, per_call)) / per_call
    learner.close()
    draws.close()
    return row


def _kernels(call: Callable[[], object]) -> int:
    """Returns how many kernels and copies the GPU does in `call`, those of replayed graphs too."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(e.device_type.name == "CUDA" for e in profiler.events() or ())


def filled_replay(
    task: Task,
    device: "torch.device",
    *,
    improves_actions: bool = False,
    follows_episodes: bool = False,
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
        follows_episodes=follows_episodes,
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
