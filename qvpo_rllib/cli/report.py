"""`qvpo report`."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="curves, tables and comparisons from results",
        description="A report over experiments of `qvpo tune` and run directories of `qvpo train`: "
        "report.html (opens offline), figures as PNG and PDF, tables as Markdown, every evaluation "
        "as Parquet. Runs that are missing, failed or unfinished are shown as such.",
        allow_abbrev=False,
    )
    report.add_argument("results", type=Path, nargs="+", metavar="DIR", help="results to report")
    report.add_argument("--out", type=Path, required=True, metavar="DIR", help="where it goes")
    report.add_argument(
        "--time-actions",
        action="store_true",
        help="measure the time of one action with the checkpoints, which are loaded (that runs "
        "code: only your own)",
    )
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from qvpo_rllib.report.build import build_report

    action_time = None
    if options.time_actions:
        from qvpo_rllib.play.trained_policy import action_time_ms

        action_time = action_time_ms
    page = build_report(options.results, options.out, action_time)
    print(f"Report: {page.absolute()}")
    return 0
