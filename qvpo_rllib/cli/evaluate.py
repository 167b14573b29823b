"""`qvpo evaluate`."""

import argparse
import json
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="play episodes with a checkpoint's policy",
        description="Play whole episodes with a checkpoint's policy: the best of K actions in each "
        "state, scaled as in training. Loading a checkpoint runs code: load only your own.",
        allow_abbrev=False,
    )
    evaluate.add_argument(
        "checkpoint", type=Path, help="a checkpoint directory, or a run directory (its best)"
    )
    evaluate.add_argument("--episodes", type=int, default=10, metavar="N", help="default 10")
    evaluate.add_argument("--k", type=int, metavar="K", help="default: the checkpoint's k_eval")
    evaluate.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from qvpo_rllib.experiments.evaluation import evaluate_checkpoint

    result = evaluate_checkpoint(
        options.checkpoint, episodes=options.episodes, k=options.k, seed=options.seed
    )
    if options.json:
        print(json.dumps(result.to_dict()))
        return 0
    print(f"{result.env}, best of K = {result.k} actions, seed {result.seed}")
    for number, episode in enumerate(result.episodes):
        print(
            f"  episode {number:3d}   return {episode.episode_return:10.1f}   "
            f"length {episode.length:5d}"
        )
    print(f"mean {result.mean:.1f}   std {result.std:.1f}   ({len(result.episodes)} episodes)")
    return 0
