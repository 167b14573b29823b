"""`qvpo record`."""

import argparse
import os
import time
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    record = commands.add_parser(
        "record",
        help="record a checkpoint's policy on video, without a display",
        description="Play episodes with a checkpoint's policy as `qvpo evaluate` does and write "
        "them to a video, the return drawn on it. Needs pip install 'qvpo_rllib[video]' and EGL "
        "or OSMesa. Loading a checkpoint runs code: load only your own.",
        allow_abbrev=False,
    )
    record.add_argument(
        "checkpoint", type=Path, help="a checkpoint directory, or a run directory (its best)"
    )
    record.add_argument("--episodes", type=int, default=1, metavar="N", help="default 1")
    record.add_argument("--k", type=int, metavar="K", help="default: the checkpoint's k_eval")
    record.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
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
    from qvpo_rllib.play.recording import record_checkpoint

    out = options.out or Path(f"video-{time.strftime('%Y%m%d-%H%M%S')}.mp4")
    with progress_line(max(1, options.episodes), "episodes") as line:

        def report(episode: int, episode_return: float) -> None:
            line.advance(episode, f"return {episode_return:.1f}")

        result, num_frames = record_checkpoint(
            options.checkpoint,
            out,
            episodes=options.episodes,
            k=options.k,
            seed=options.seed,
            report=report,
        )
    for number, episode in enumerate(result.episodes):
        print(f"  episode {number}   return {episode.episode_return:.1f}   length {episode.length}")
    print(
        f"{out}: {num_frames} frames of {result.env}, {result.how}, seed {result.seed}, "
        f"rendered with {os.environ[VARIABLE]}"
    )
    return 0
