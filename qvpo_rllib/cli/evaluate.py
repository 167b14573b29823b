"""`qvpo evaluate`."""

import argparse
import json
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
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
        help="a checkpoint directory, a run directory (its best) or a bundle",
    )
    evaluate.add_argument(
        "--server", metavar="URL", help="ask this server instead, such as http://127.0.0.2:8000"
    )
    evaluate.add_argument("--model", metavar="NAME", help="with --server: name or name@version")
    evaluate.add_argument("--env", metavar="ID", help="with --server (default: the model's own)")
    evaluate.add_argument("--episodes", type=int, default=10, metavar="N", help="default 10")
    evaluate.add_argument("--k", type=int, metavar="K", help="default: the checkpoint's k_eval")
    evaluate.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from qvpo_rllib.play.evaluation import evaluate_checkpoint, evaluate_server

    settings = {"episodes": options.episodes, "k": options.k, "seed": options.seed}
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
