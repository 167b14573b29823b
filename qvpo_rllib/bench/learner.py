"""`qvpo bench learner`: updates per second, against the straightforward implementation."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from qvpo_rllib.bench.sizes import TASKS, Task, hyperparameters, update_flops
from qvpo_rllib.bench.straightforward import Straightforward
from qvpo_rllib.bench.timing import matrix_product, measure, ratio
from qvpo_rllib.core.hyperparameters import QVPOHyperparameters
from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks
from qvpo_rllib.core.replay import ReplayBuffer, Transitions

REPLAY_SIZE = 10_000


def run(
    *,
    tasks: Sequence[str],
    settings: Sequence[str],
    engines: Sequence[str],
    precisions: Sequence[str],
    device: torch.device,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """A row per combination: medians over the rounds, with the smallest and the largest.

    Times include drawing the batches from the replay and the noise. `speedup` is the
    straightforward version's time over the engine's, `matmul_bound` the share of the time that the
    update's FLOPs would take at the machine's own matrix-product rate.
    """
    for setting in settings:
        for name in tasks:
            for engine in engines:
                for precision in precisions:
                    hp = hyperparameters(
                        setting, TASKS[name], engine=engine, sampling_precision=precision
                    )
                    row = {"setting": setting, "task": name}
                    yield row | _row(TASKS[name], hp, device, repeats)


def _row(task: Task, hp: QVPOHyperparameters, device: torch.device, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    networks = QVPONetworks(task.obs_dim, task.act_dim, hp).to(device)
    straightforward = Straightforward(networks, hp)
    learner = QVPOLearner(networks, hp, seed=0, device=device)
    replay = filled_replay(task, device)

    def straightforward_update() -> object:
        batches = replay.sample(hp.batch_size), replay.sample(hp.batch_size)
        return straightforward.update(*batches, learner.draw_update_noise(hp.batch_size))

    product, product_flops = matrix_product(device)
    times = measure(
        {
            "update": lambda: learner.train(replay, 1),
            "straightforward": straightforward_update,
            "product": product,
        },
        repeats=repeats,
        device=device,
    )
    flops = update_flops(task, hp)
    speedup = ratio(times["straightforward"], times["update"])
    bound = ratio(times["product"], times["update"])
    return {
        "engine": learner.engine,
        "precision": hp.sampling_precision,
        "update_ms": 1e3 * times["update"].median,
        "update_ms_range": [1e3 * t for t in times["update"].spread],
        "updates_per_s": 1 / times["update"].median,
        "straightforward_ms": 1e3 * times["straightforward"].median,
        "speedup": speedup.median,
        "speedup_range": list(speedup.spread),
        "matmul_gflop_per_s": product_flops / times["product"].median / 1e9,
        "gflop": flops / 1e9,
        "matmul_bound": bound.median * flops / product_flops,
        "matmul_bound_range": [b * flops / product_flops for b in bound.spread],
    }


def filled_replay(
    task: Task, device: torch.device, *, improves_actions: bool = False
) -> ReplayBuffer:
    """Random transitions of the task's size."""
    replay = ReplayBuffer(
        REPLAY_SIZE,
        task.obs_dim,
        task.act_dim,
        seed=0,
        device=device,
        improves_actions=improves_actions,
    )
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(REPLAY_SIZE, *shape, generator=generator)

    replay.add(
        Transitions(
            obs=normal(task.obs_dim),
            action=normal(task.act_dim).tanh(),
            reward=normal(),
            next_obs=normal(task.obs_dim),
            terminal=(normal() > 2).float(),
        )
    )
    return replay
