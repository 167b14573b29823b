"""`qvpo export`."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a checkpoint's policy as a bundle that holds no code",
        description="Write a checkpoint's policy as a bundle: policy.safetensors (actor and "
        "critics) and policy.json (everything else), which load without Ray, Gymnasium or pickle. "
        "Reading the checkpoint runs code: export only your own.",
        allow_abbrev=False,
    )
    export.add_argument(
        "checkpoint", type=Path, help="a checkpoint directory, or a run directory (its best)"
    )
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
    print(
        f"{options.out}: {description.name}@{description.version}, {description.env}, "
        f"{description.source['env_steps']:,} env steps\n"
        f"  serve it with   qvpo serve {options.out}\n"
        f"  evaluate it with   qvpo evaluate {options.out}"
    )
    return 0
