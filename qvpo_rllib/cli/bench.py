"""`qvpo bench`."""

from typing import Any

from qvpo_rllib.bench import serve


def add(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure speed on this machine",
        description="Measure speed on this machine.",
        allow_abbrev=False,
    )
    subcommands = bench.add_subparsers(dest="benchmark", required=True, metavar="WHAT")
    serve.add(subcommands)
