"""`qvpo replay export`."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
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
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from qvpo_rllib.play.replay_export import export_replay

    done = export_replay(options.path, options.out)
    print(
        f"{done.transitions:,} transitions of {done.env}, {done.num_bytes:,} bytes: "
        f"{done.directory}"
    )
    return 0
