"""`qvpo bench …`. The parts `learner`, `act` and `replay` need torch and NumPy alone."""

import argparse
from pathlib import Path
from typing import Any

from qvpo_rllib.bench import serve
from qvpo_rllib.core.hyperparameters import QVPOHyperparameters
from qvpo_rllib.core.options import options_of

ENGINES: tuple[str, ...] = options_of(QVPOHyperparameters)["engine"].metadata["choices"]
LEARNER_COLUMNS = {
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
ACT_COLUMNS = {
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
REPLAY_COLUMNS = {
    "task": "task",
    "operation": "operation",
    "transitions": "transitions",
    "call_us": "µs per call",
    "straightforward_us": "straightforward µs",
    "speedup": "times as fast",
}
SNAPSHOT_COLUMNS = {
    "task": "task",
    "operation": "operation",
    "transitions": "transitions",
    "megabytes": "MB",
    "seconds": "seconds",
    "memory_share": "memory/announced",
}

ROLLOUT_COLUMNS = {
    "task": "task",
    "num_envs": "environments",
    "environment_per_s": "environments alone, steps/s",
    "columnar_per_s": "columnar worker, steps/s",
    "stock_per_s": "stock worker, steps/s",
    "speedup": "times as fast",
    "acting_per_s": "best of K_b, steps/s",
    "limit": "most time",
}
RUNTIME_COLUMNS = {
    "mode": "mode",
    "workers": "workers",
    "num_envs": "environments",
    "env_steps_per_s": "env steps/s",
    "updates_per_s": "updates/s",
    "update_share": "updating",
    "environment_share": "environment",
    "action_share": "choosing",
    "waiting_share": "collecting",
    "other_share": "other",
    "staleness_max": "staleness",
    "limit": "limit",
}
RIVAL_COLUMNS = {
    "setting": "setting",
    "task": "task",
    "algorithm": "algorithm",
    "update_ms": "ms per update",
    "updates_per_s": "updates/s",
    "learning_h": "h of updates, 1e6 env steps",
    "explore_ms": "ms per action, training",
    "evaluate_ms": "ms per action, evaluation",
}


def add(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="time the parts on this machine: updates, acting, replay, rollouts, server",
        description="Time the parts on this machine, side by side with a straightforward "
        "implementation of the same. Figures are medians over rounds that visit both in turn, with "
        "the smallest and the largest round in brackets. The matrix-product bound is the share of "
        "the time that the needed products alone would take at this machine's own rate.",
        allow_abbrev=False,
    )
    parts = bench.add_subparsers(dest="part", required=True, metavar="PART")
    learner = _part(parts, "learner", "one update of actor, critics and targets", _learner)
    _add_settings(learner)
    learner.add_argument(
        "--precision",
        nargs="+",
        default=["fp32"],
        choices=("fp32", "tf32", "bf16"),
        help="of the products that draw action samples (default fp32)",
    )
    act = _part(parts, "act", "the best of K actions, on one thread", _act)
    _add_settings(act)
    act.add_argument(
        "--observations", nargs="+", type=_positive, default=[1, 8, 32, 64], metavar="N"
    )
    act.add_argument("--k", nargs="+", type=_positive, default=[4, 32], metavar="K")
    replay = _part(parts, "replay", "adding to the replay and sampling from it", _replay)
    replay.add_argument("--capacity", type=_positive, default=100_000, metavar="N")
    snapshot = _part(parts, "snapshot", "the replay to disk and back", _snapshot)
    snapshot.add_argument("--capacity", type=_positive, default=1_000_000, metavar="N")
    snapshot.add_argument(
        "--increment", type=_positive, default=50_000, metavar="N", help="new transitions"
    )
    snapshot.add_argument("--directory", type=Path, metavar="DIR", help="on the disk to measure")
    serve.add(parts)
    _add_rollout(parts)
    _add_runtime(parts)
    rivals = _part(parts, "rivals", "an update and an action of each algorithm", _rivals)
    _add_setting(rivals)


def _add_rollout(parts: Any) -> None:
    rollout = _sampling_part(
        parts,
        "rollout",
        "env steps of a rollout worker beside RLlib's stock worker, random actions",
        _rollout,
    )
    rollout.add_argument("--num-envs", nargs="+", type=_positive, default=[1, 8, 64], metavar="N")


def _add_runtime(parts: Any) -> None:
    runtime = _sampling_part(
        parts,
        "runtime",
        "where the time goes: in one process, and with workers beside a stand-in for the learner "
        "that takes 1 ms per update",
        _runtime,
    )
    runtime.add_argument("--num-envs", type=_positive, default=8, metavar="N", help="per worker")
    runtime.add_argument("--num-env-runners", nargs="+", type=_positive, default=[1], metavar="N")
    runtime.add_argument("--mode", nargs="+", default=["async", "sync"], choices=("async", "sync"))
    runtime.add_argument(
        "--engine",
        default="auto",
        choices=ENGINES,
        help="of the learner in one process (default auto)",
    )
    runtime.add_argument("--seconds", type=float, default=10.0, help="of each row (default 10)")


def _sampling_part(parts: Any, name: str, meaning: str, run: Any) -> argparse.ArgumentParser:
    from qvpo_rllib.bench.sizes import SETTINGS, TASKS

    parser: argparse.ArgumentParser = parts.add_parser(name, help=meaning, allow_abbrev=False)
    parser.add_argument("--task", default="hopper", choices=list(TASKS), help="default hopper")
    parser.add_argument(
        "--setting", default="light", choices=list(SETTINGS), help="sizes (default light)"
    )
    parser.add_argument("--repeats", type=_positive, default=3, metavar="N", help="default 3")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def _part(parts: Any, name: str, meaning: str, run: Any) -> argparse.ArgumentParser:
    from qvpo_rllib.bench.sizes import TASKS

    parser: argparse.ArgumentParser = parts.add_parser(name, help=meaning, allow_abbrev=False)
    parser.add_argument(
        "--task",
        nargs="+",
        default=list(TASKS),
        choices=list(TASKS),
        help="observation and action sizes of these tasks (default: all)",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="CPU threads (default: all cores; act: 1)",
    )
    parser.add_argument("--repeats", type=_positive, default=7, metavar="N", help="default 7")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def _add_setting(parser: argparse.ArgumentParser) -> None:
    from qvpo_rllib.bench.sizes import SETTINGS

    parser.add_argument(
        "--setting",
        nargs="+",
        default=list(SETTINGS),
        choices=list(SETTINGS),
        help="the paper's sizes, or the light preset's (default: both)",
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    _add_setting(parser)
    parser.add_argument(
        "--engine",
        nargs="+",
        default=["auto"],
        choices=ENGINES,
        help="default auto",
    )


def _learner(options: argparse.Namespace) -> int:
    from qvpo_rllib.bench import learner

    device = _prepare(options, threads=None)
    rows = learner.run(
        tasks=options.task,
        settings=options.setting,
        engines=options.engine,
        precisions=options.precision,
        device=device,
        repeats=options.repeats,
    )
    return _show(rows, LEARNER_COLUMNS, options, device)


def _act(options: argparse.Namespace) -> int:
    from qvpo_rllib.bench import act

    device = _prepare(options, threads=1)
    rows = act.run(
        tasks=options.task,
        settings=options.setting,
        engines=options.engine,
        batch_sizes=options.observations,
        ks=options.k,
        device=device,
        repeats=options.repeats,
    )
    return _show(rows, ACT_COLUMNS, options, device)


def _replay(options: argparse.Namespace) -> int:
    from qvpo_rllib.bench import replay

    device = _prepare(options, threads=None)
    rows = replay.run(
        tasks=options.task, capacity=options.capacity, device=device, repeats=options.repeats
    )
    return _show(rows, REPLAY_COLUMNS, options, device)


def _rollout(options: argparse.Namespace) -> int:
    import torch

    from qvpo_rllib.bench import rollout

    torch.set_num_threads(1)
    rows = rollout.run(
        task=options.task,
        num_envs=options.num_envs,
        setting=options.setting,
        repeats=options.repeats,
    )
    return _show(rows, ROLLOUT_COLUMNS, options, torch.device("cpu"))


def _runtime(options: argparse.Namespace) -> int:
    import ray
    import torch

    from qvpo_rllib.bench import runtime
    from qvpo_rllib.ray_session import start_ray

    if not 0 < options.seconds <= 3600:
        raise ValueError(f"--seconds {options.seconds:g} is not allowed: from 0 to 3600.")
    torch.set_num_threads(1)
    start_ray(max(options.num_env_runners) + 1)
    try:
        rows = runtime.run(
            task=options.task,
            setting=options.setting,
            num_envs=options.num_envs,
            num_workers=options.num_env_runners,
            modes=options.mode,
            engine=options.engine,
            seconds=options.seconds,
            repeats=options.repeats,
        )
        return _show(rows, RUNTIME_COLUMNS, options, torch.device("cpu"))
    finally:
        ray.shutdown()


def _rivals(options: argparse.Namespace) -> int:
    from qvpo_rllib.bench import rivals

    device = _prepare(options, threads=1)
    if device.type != "cpu":
        raise ValueError(f"--device {options.device} is not supported here: use cpu.")
    rows = rivals.run(tasks=options.task, settings=options.setting, repeats=options.repeats)
    return _show(rows, RIVAL_COLUMNS, options, device)


def _snapshot(options: argparse.Namespace) -> int:
    from qvpo_rllib.bench import snapshot

    device = _prepare(options, threads=None)
    rows = snapshot.run(
        tasks=options.task,
        capacity=options.capacity,
        increment=options.increment,
        directory=options.directory,
        repeats=options.repeats,
    )
    return _show(rows, SNAPSHOT_COLUMNS, options, device)


def _prepare(options: argparse.Namespace, threads: int | None) -> Any:
    import os

    import torch

    if options.device not in ("cpu", "cuda"):
        raise ValueError(f"--device {options.device!r} does not exist: use cpu or cuda.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda: PyTorch {torch.__version__} finds no CUDA device here. Use --device "
            "cpu, or a machine and a PyTorch build with CUDA."
        )
    torch.set_num_threads(options.threads or threads or len(os.sched_getaffinity(0)))
    return torch.device(options.device)


def _show(rows: Any, columns: dict[str, str], options: argparse.Namespace, device: Any) -> int:
    from qvpo_rllib.bench import report

    if options.json:
        report.print_json(rows, device)
        return 0
    about = report.machine(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    report.print_table(rows, columns)
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: 1 or more")
    return number
