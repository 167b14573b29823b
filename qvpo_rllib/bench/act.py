"""`qvpo bench act`: choosing the best of K actions, as a rollout worker does."""

import copy
import itertools
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from qvpo_rllib.bench.options import Row, add_device, add_engines, add_settings, add_tasks, positive
from qvpo_rllib.bench.sizes import TASKS, Task, acting_flops, hyperparameters
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters

HELP = "the best of K actions, on one thread"
COLUMNS = {
    "setting": "setting",
    "task": "task",
    "engine": "engine",
    "observations": "obs",
    "k": "K",
    "act_ms": "ms per call",
    "straightforward_ms": "straightforward ms",
    "speedup": "times as fast",
    "matmul_bound": "matrix-product bound",
}


def add_arguments(parser: ArgumentParser) -> None:
    add_tasks(parser, threads=1)
    add_device(parser)
    add_settings(parser)
    add_engines(parser)
    parser.add_argument(
        "--observations", nargs="+", type=positive, default=[1, 8, 32, 64], metavar="N"
    )
    parser.add_argument("--k", nargs="+", type=positive, default=[4, 32], metavar="K")


def run(options: Namespace) -> Iterator[Row]:
    """Yields a row per combination of options; see `timing.compare` for the columns.

    Times include drawing the noise. The weights stay as they are from call to call, as between two
    of a worker's weight updates. With --device cuda they change on the GPU before each call, and
    are copied from there, as in the learner's own process; the straightforward version acts on it.
    """
    for setting, task, engine, k, batch_size in itertools.product(
        options.setting, options.task, options.engine, options.k, options.observations
    ):
        hp = hyperparameters(setting, TASKS[task], engine=engine)
        row = _row(TASKS[task], hp, batch_size, k, options.device, options.repeats)
        yield {"setting": setting, "task": task} | row


def _row(
    task: Task, hp: QVPOHyperparameters, batch_size: int, k: int, device_name: str, repeats: int
) -> Row:
    import torch

    from qvpo_rllib.bench.straightforward import Straightforward, as_followed
    from qvpo_rllib.bench.timing import compare
    from qvpo_rllib.core.backends.acting_copy import ActingCopy
    from qvpo_rllib.core.engine import CPU, acting_engine, kernels_of
    from qvpo_rllib.core.qvpo import QVPONetworks
    from qvpo_rllib.core.sampler import ActionSelector, draw_noise

    device = torch.device(device_name)
    torch.manual_seed(0)
    networks = QVPONetworks(task.obs_dim, task.act_dim, hp).to(device)
    plain = as_followed(hp)
    straightforward = Straightforward(
        QVPONetworks(task.obs_dim, task.act_dim, plain).to(device), plain
    )
    engine = acting_engine(hp.engine)
    kernels = kernels_of(engine, CPU).sampler
    acting = copy.deepcopy(networks).to(CPU)
    follower = ActingCopy(networks, acting, ("actor.", "critic."))
    selector = ActionSelector(acting.actor, acting.critic, acting.schedule, kernels)
    obs = torch.randn(batch_size, task.obs_dim)
    generators = {d: torch.Generator(device=d).manual_seed(0) for d in (CPU, device)}
    updates = itertools.count()

    def noise(on: torch.device) -> torch.Tensor:
        return draw_noise(hp.diffusion_steps, batch_size, k, task.act_dim, generators[on], on)

    def act() -> object:
        follower.refresh(next(updates) if device.type == "cuda" else 0)
        return selector.act(obs, noise(CPU))

    def act_straightforwardly() -> object:
        actor, critic = straightforward.actor, straightforward.critic
        return straightforward.select(actor, critic, obs.to(device), noise(device)).cpu()

    compared = compare(
        "act",
        act,
        act_straightforwardly,
        acting_flops(task, hp, batch_size, k),
        repeats=repeats,
        device=device,
    )
    return {"engine": engine, "observations": batch_size, "k": k} | compared
