"""`qvpo bench act`: selecting the best of K actions, as a rollout worker does."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from qvpo_rllib.bench.sizes import TASKS, Task, acting_flops, hyperparameters
from qvpo_rllib.bench.straightforward import Straightforward
from qvpo_rllib.bench.timing import matrix_product, measure, ratio
from qvpo_rllib.core.engine import acting_engine, kernels_of
from qvpo_rllib.core.hyperparameters import QVPOHyperparameters
from qvpo_rllib.core.qvpo import QVPONetworks
from qvpo_rllib.core.sampler import ActionSelector, draw_noise


def run(
    *,
    tasks: Sequence[str],
    settings: Sequence[str],
    engines: Sequence[str],
    batch_sizes: Sequence[int],
    ks: Sequence[int],
    device: torch.device,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """A row per combination. Times include drawing the noise; see `learner.run` for the columns.

    The weights stay as they are from call to call, as between two of a worker's weight updates.
    """
    for setting in settings:
        for name in tasks:
            for engine in engines:
                hp = hyperparameters(setting, TASKS[name], engine=engine)
                for k in ks:
                    for batch_size in batch_sizes:
                        row = {"setting": setting, "task": name}
                        yield row | _row(TASKS[name], hp, batch_size, k, device, repeats)


def _row(
    task: Task,
    hp: QVPOHyperparameters,
    batch_size: int,
    k: int,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    torch.manual_seed(0)
    networks = QVPONetworks(task.obs_dim, task.act_dim, hp).to(device)
    straightforward = Straightforward(networks, hp)
    engine = acting_engine(hp.engine, device)
    kernels = kernels_of(engine, device).sampler
    selector = ActionSelector(networks.actor, networks.critic, networks.schedule, kernels)
    obs = torch.randn(batch_size, task.obs_dim, device=device)
    generator = torch.Generator(device=device).manual_seed(0)

    def noise() -> torch.Tensor:
        return draw_noise(hp.diffusion_steps, batch_size, k, task.act_dim, generator, device)

    product, product_flops = matrix_product(device)
    times = measure(
        {
            "act": lambda: selector.act(obs, noise()),
            "straightforward": lambda: straightforward.select(
                straightforward.actor, straightforward.critic, obs, noise()
            ),
            "product": product,
        },
        repeats=repeats,
        device=device,
    )
    flops = acting_flops(task, hp, batch_size, k)
    speedup = ratio(times["straightforward"], times["act"])
    bound = ratio(times["product"], times["act"])
    return {
        "engine": engine,
        "observations": batch_size,
        "k": k,
        "act_ms": 1e3 * times["act"].median,
        "act_ms_range": [1e3 * t for t in times["act"].spread],
        "straightforward_ms": 1e3 * times["straightforward"].median,
        "speedup": speedup.median,
        "speedup_range": list(speedup.spread),
        "matmul_bound": bound.median * flops / product_flops,
        "matmul_bound_range": [b * flops / product_flops for b in bound.spread],
    }
