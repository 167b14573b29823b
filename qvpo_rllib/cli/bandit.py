"""`qvpo bandit`: Figure 2 of the paper."""

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    bandit = commands.add_parser(
        "bandit",
        help="the paper's Figure 2: what the diffusion entropy term does",
        description="Train a diffusion policy on a continuous bandit with three equal peaks, "
        "without and with the diffusion entropy term (Eq. 10), and draw where its samples go. The "
        "reward itself is Q. About 20 seconds per seed on one core.",
        allow_abbrev=False,
    )
    bandit.add_argument("--seed", type=int, default=0, metavar="S", help="first seed (default 0)")
    bandit.add_argument(
        "--num-seeds", type=int, default=1, metavar="N", help="seeds S, S + 1, … (default 1)"
    )
    width = bandit.add_mutually_exclusive_group()
    width.add_argument(
        "--variance",
        type=float,
        metavar="V",
        help="σ² of the peaks (default 0.1, which the paper's picture shows)",
    )
    width.add_argument(
        "--sigma", type=float, metavar="S", help="σ instead of σ²; the paper's text prints 0.1"
    )
    bandit.add_argument(
        "--updates", type=int, metavar="N", help="policy updates per training (default 800)"
    )
    bandit.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="a hyperparameter of both rows, such as num_policy_samples=16; repeatable. "
        "entropy_weight is the second row's",
    )
    bandit.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go (default runs/bandit-<time>)"
    )
    bandit.set_defaults(run=_bandit)


def _bandit(options: argparse.Namespace) -> int:
    from qvpo_rllib.core.hyperparameters import QVPOHyperparameters
    from qvpo_rllib.core.options import require_at_least
    from qvpo_rllib.files import OutputDirectory
    from qvpo_rllib.paper import bandit
    from qvpo_rllib.paper.single_state import toy_hyperparameters
    from qvpo_rllib.training.plan import parse_settings

    variance = _variance(options, bandit.VARIANCE)
    num_updates = bandit.NUM_UPDATES if options.updates is None else options.updates
    for name, value, least in (
        ("seed", options.seed, 0),
        ("num-seeds", options.num_seeds, 1),
        ("updates", num_updates, bandit.NUM_RECORDS),
    ):
        require_at_least(f"--{name}", value, least)
    hp = toy_hyperparameters(
        bandit.HYPERPARAMETERS, parse_settings(options.settings, QVPOHyperparameters)
    )
    if hp.entropy_weight == 0 or hp.num_uniform_samples == 0:
        raise ValueError(
            f"entropy_weight={hp.entropy_weight:g} with num_uniform_samples="
            f"{hp.num_uniform_samples} leaves the second row without the entropy term, like the "
            "first. Both must be above 0."
        )
    path = options.out or Path("runs") / f"bandit-{time.strftime('%Y%m%d-%H%M%S')}"
    seeds = range(options.seed, options.seed + options.num_seeds)
    with OutputDirectory(path) as out:
        pairs = _train_all(hp, seeds, num_updates, variance)
        return _write(out, pairs, hp, num_updates, variance)


def _variance(options: argparse.Namespace, default: float) -> float:
    if options.sigma is None and options.variance is None:
        return default
    name = "variance" if options.sigma is None else "sigma"
    value: float = getattr(options, name)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"--{name} {value:g} is not allowed: it must be a finite number above 0.")
    return value**2 if name == "sigma" else value


def _train_all(hp: Any, seeds: range, num_updates: int, variance: float) -> list[tuple[Any, Any]]:
    """(without, with) the entropy term, for each seed."""
    from qvpo_rllib.cli.progress import progress_line
    from qvpo_rllib.paper import bandit

    shown = {round(share * num_updates) for share in bandit.SNAPSHOTS}
    pairs = []
    with progress_line(2 * len(seeds) * num_updates, "updates") as line:

        def train(seed: int, weight: float, done: int) -> Any:
            label = f"seed {seed}, " + (f"ω_ent = {weight:g}" if weight else "no entropy term")

            def report(found: Any) -> None:
                line.advance(done + found.updates, label)
                if found.updates in shown:
                    line.say(f"{label}: {_describe(found)}")

            return bandit.train(
                dataclasses.replace(hp, entropy_weight=weight),
                seed=seed,
                num_updates=num_updates,
                variance=variance,
                report=report,
            )

        for number, seed in enumerate(seeds):
            done = 2 * number * num_updates
            without = train(seed, 0.0, done)
            pairs.append((without, train(seed, hp.entropy_weight, done + num_updates)))
    return pairs


def _describe(found: Any) -> str:
    """A measurement in one line."""
    shares = " ".join(f"{share:4.0%}" for share in found.peak_shares)
    return (
        f"{found.updates:5,} updates, near the peaks {shares}, {found.num_covered} covered, "
        f"reward {found.reward_mean:.2f}"
    )


def _write(
    out: Any, pairs: list[tuple[Any, Any]], hp: Any, num_updates: int, variance: float
) -> int:
    from qvpo_rllib.paper import bandit
    from qvpo_rllib.paper.bandit import plot_bandit
    from qvpo_rllib.paper.single_state import APPLICABLE

    runs = [run for pair in pairs for run in pair]
    out.write_table(
        "bandit.parquet",
        [
            {"seed": run.seed, "entropy_weight": run.entropy_weight, **found.to_row()}
            for run in runs
            for found in run.measurements
        ],
    )
    out.write_summary(
        "bandit.json",
        {
            "variance": variance,
            "updates": num_updates,
            "peak_radius": bandit.PEAK_RADIUS,
            "covered_share": bandit.COVERED_SHARE,
            "hyperparameters": {name: getattr(hp, name) for name in APPLICABLE},
            "final": [
                {"seed": run.seed, "entropy_weight": run.entropy_weight, **run.final.to_row()}
                for run in runs
            ],
        },
    )
    plot_bandit(*pairs[0], out.path / "bandit.png")
    covered = [[run.final.num_covered for run in row] for row in zip(*pairs, strict=True)]
    print(
        f"Peaks covered at the end, by seed: {_list(covered[0])} without the entropy term, "
        f"{_list(covered[1])} with it.\n"
        f"  {out.path}/bandit.png       Figure 2 (seed {pairs[0][0].seed})\n"
        f"  {out.path}/bandit.parquet   every measurement\n"
        f"  {out.path}/bandit.json      settings and final numbers"
    )
    return 0


def _list(numbers: list[int]) -> str:
    return ", ".join(str(n) for n in numbers)
