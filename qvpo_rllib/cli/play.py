"""`qvpo evaluate`, `record`, `export`, `replay export`: what a trained policy is used for."""

import argparse
import contextlib
import importlib
import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

A_CHECKPOINT = "a checkpoint directory, or a run directory (its best)"
A_POLICY = "a checkpoint directory, a run directory (its best) or a bundle"


def add(commands: Any) -> None:
    _add_evaluate(commands)
    _add_record(commands)
    _add_export(commands)
    _add_replay(commands)


def _add_episodes(parser: argparse.ArgumentParser, default: int) -> None:
    """Adds how many episodes are played, and how."""
    parser.add_argument(
        "--episodes", type=int, default=default, metavar="N", help=f"default {default}"
    )
    parser.add_argument("--k", type=int, metavar="K", help="default: the checkpoint's k_eval")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="module of the environment, or of a wrapper, of a bundle or server, imported only if "
        "it is named here; repeatable",
    )


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="play episodes with a checkpoint's, a bundle's or a server's policy",
        description="Play whole episodes with a policy: the best of K actions in each state, "
        "scaled as in training. Loading a checkpoint runs code: load only your own. A bundle of "
        "qvpo export runs none, and --server asks a server for every action.",
        allow_abbrev=False,
    )
    evaluate.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        help=A_POLICY,
    )
    evaluate.add_argument(
        "--server", metavar="URL", help="ask this server instead, such as http://127.0.0.1:8000"
    )
    evaluate.add_argument("--model", metavar="NAME", help="with --server: name or name@version")
    evaluate.add_argument("--env", metavar="ID", help="with --server (default: the model's own)")
    _add_episodes(evaluate, 10)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from qvpo_rllib.play.evaluation import evaluate_checkpoint, evaluate_server

    settings = {name: getattr(options, name) for name in ("episodes", "k", "seed", "modules")}
    _check_source(options)
    if options.server is not None:
        result = evaluate_server(options.server, options.model, options.env, **settings)
    else:
        result = evaluate_checkpoint(options.checkpoint, **settings)
    if options.json:
        print(json.dumps(result.to_dict()))
        return 0
    print(f"{result.env}, {result.how}, seed {result.seed}")
    for number, episode in enumerate(result.episodes):
        print(
            f"  episode {number:3d}   return {episode.episode_return:10.1f}   "
            f"length {episode.length:5d}"
        )
    print(f"mean {result.mean:.1f}   std {result.std:.1f}   ({len(result.episodes)} episodes)")
    return 0


def _check_source(options: argparse.Namespace) -> None:
    if (options.checkpoint is None) == (options.server is None):
        raise ValueError(
            "Give either a checkpoint, run or bundle, or --server URL with --model NAME."
        )
    if options.server is not None and options.model is None:
        raise ValueError("--server needs --model NAME: GET URL/v1/models lists them.")
    if options.server is None and (options.model or options.env):
        raise ValueError("--model and --env are for --server; a checkpoint names its own.")


def _add_record(commands: Any) -> None:
    record = commands.add_parser(
        "record",
        help="record a checkpoint's policy on video, without a display",
        description="Play episodes with a checkpoint's policy as `qvpo evaluate` does and write "
        "them to a video, the return drawn on it. Needs pip install 'qvpo_rllib[video]' and EGL "
        "or OSMesa. Loading a checkpoint runs code: load only your own.",
        allow_abbrev=False,
    )
    record.add_argument("checkpoint", type=Path, help=A_POLICY)
    _add_episodes(record, 1)
    record.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the video, .mp4 or .gif (default video-<time>.mp4 here)",
    )
    record.set_defaults(run=_record)


def _record(options: argparse.Namespace) -> int:
    from qvpo_rllib.cli.terminal import progress_line
    from qvpo_rllib.play.renderer import VARIABLE, choose_renderer

    # Before anything imports MuJoCo, which reads it once.
    os.environ[VARIABLE] = choose_renderer()
    # Before RLlib, which imports dm_control where it is installed, and that starts EGL: Mesa's LLVM
    # and then Triton's, which PyTorch's compiler brings in, end the process.
    with contextlib.suppress(ImportError):
        importlib.import_module("triton")
    from qvpo_rllib.play.recording import record_checkpoint

    out = options.out or Path(f"video-{time.strftime('%Y%m%d-%H%M%S')}.mp4")
    with progress_line(max(1, options.episodes), "episodes") as line:
        result, num_frames = record_checkpoint(
            options.checkpoint,
            out,
            episodes=options.episodes,
            k=options.k,
            seed=options.seed,
            modules=options.modules,
            report=lambda episode, so_far: line.advance(episode, f"return {so_far:.1f}"),
        )
    for number, episode in enumerate(result.episodes):
        print(f"  episode {number}   return {episode.episode_return:.1f}   length {episode.length}")
    print(
        f"{out}: {num_frames} frames of {result.env}, {result.how}, seed {result.seed}, "
        f"rendered with {os.environ[VARIABLE]}"
    )
    return 0


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a checkpoint's policy as a bundle that holds no code",
        description="Write a checkpoint's policy as a bundle: policy.safetensors (actor and "
        "critics) and policy.json (everything else), which load without Ray, Gymnasium or pickle. "
        "Reading the checkpoint runs code: export only your own.",
        allow_abbrev=False,
    )
    export.add_argument("checkpoint", type=Path, help=A_CHECKPOINT)
    export.add_argument("out", type=Path, help="the bundle's directory; must not exist yet")
    export.add_argument(
        "--name", metavar="NAME", help="name to be served under (default: the environment's id)"
    )
    export.add_argument(
        "--version",
        metavar="V",
        help="version to be served under (default: 12 digits of the parameters' SHA-256)",
    )
    export.add_argument(
        "--onnx", action="store_true", help="also write policy.onnx (needs qvpo_rllib[onnx])"
    )
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from qvpo_rllib.play.export import export_checkpoint

    description = export_checkpoint(
        options.checkpoint,
        options.out,
        name=options.name,
        version=options.version,
        onnx=options.onnx,
    )
    out = shlex.quote(str(options.out))
    print(
        f"{options.out}: {description.name}@{description.version}, {description.env}, "
        f"{description.source['env_steps']:,} env steps\n"
        f"  serve it with   qvpo serve {out}\n"
        f"  evaluate it with   qvpo evaluate {out}"
    )
    return 0


def _add_replay(commands: Any) -> None:
    replay = commands.add_parser(
        "replay", help="a run's replay as a data set", description="A run's replay as a data set."
    )
    parts = replay.add_subparsers(dest="part", required=True, metavar="PART")
    export = parts.add_parser(
        "export",
        help="as Parquet, for offline learning and analysis",
        description="Write the replay of a run's last checkpoint as a Parquet data set that "
        "RLlib's offline API and Ray Data read. Nothing is unpickled.",
        allow_abbrev=False,
    )
    export.add_argument(
        "path", type=Path, metavar="RUN", help="a run directory of qvpo train, or a checkpoint"
    )
    export.add_argument("out", type=Path, metavar="OUT", help="a directory that does not exist yet")
    export.set_defaults(run=_export_replay)


def _export_replay(options: argparse.Namespace) -> int:
    from qvpo_rllib.play.replay_export import export_replay

    done = export_replay(options.path, options.out)
    print(
        f"{done.transitions:,} transitions of {done.env}, {done.num_bytes:,} bytes: "
        f"{done.directory}"
    )
    return 0
