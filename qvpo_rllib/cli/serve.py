"""`qvpo serve`."""

import argparse
import functools
import shlex
import shutil
from pathlib import Path
from typing import Any

from qvpo_rllib.files import scratch_directory


def add(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve policies over HTTP",
        description="Serve bundles over HTTP: POST /v1/models/NAME/act. A bundle that is replaced "
        "while the server runs is taken up without a failed request.",
        allow_abbrev=False,
    )
    serve.add_argument(
        "bundles",
        type=Path,
        nargs="+",
        metavar="BUNDLE",
        help="directories of qvpo export; with --trust-checkpoint also checkpoints or runs",
    )
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1, which only this machine reaches); "
        "there is no authentication",
    )
    serve.add_argument("--port", type=int, default=8000, help="default 8000")
    serve.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="processes that compute (default 1)"
    )
    serve.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="also take RLlib checkpoints; loading one runs code that is in it: only your own",
    )
    serve.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    try:
        from qvpo_rllib.serving.server import serve_until_stopped
    except ImportError as error:
        raise ValueError(
            f"Serving needs packages that are not installed ({error}): pip install "
            "'qvpo_rllib[serve]'."
        ) from error

    scratch = scratch_directory("qvpo-serve-")
    try:
        serve_until_stopped(
            [
                _as_bundle(path, options.trust_checkpoint, scratch / str(number))
                for number, path in enumerate(options.bundles)
            ],
            host=options.host,
            port=options.port,
            replicas=options.replicas,
            say=functools.partial(print, flush=True),
        )
    finally:
        shutil.rmtree(scratch)
    return 0


def _as_bundle(path: Path, trust: bool, scratch: Path) -> Path:
    """Returns `path`, or where a checkpoint became a bundle: replicas see no pickle."""
    from qvpo_rllib.serving.bundle import DESCRIPTION_FILE

    is_checkpoint = (path / "qvpo.json").exists() or (path / "checkpoints").is_dir()
    if not is_checkpoint or (path / DESCRIPTION_FILE).exists():
        return path
    if not trust:
        raise ValueError(
            f"{str(path)!r} is an RLlib checkpoint, and loading one runs code that is in it. "
            f"If it is your own, give --trust-checkpoint; else export it where it was made "
            f"(`qvpo export {shlex.quote(str(path))} OUT`) and serve the bundle."
        )
    from qvpo_rllib.play.export import export_checkpoint

    export_checkpoint(path, scratch)
    return scratch
