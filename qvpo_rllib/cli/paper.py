"""`qvpo bandit` and `qvpo theorem2`: the paper's Figure 2 and its Theorem 2 as experiments."""

import dataclasses
import functools
import itertools
import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
    from qvpo_rllib.files import OutputDirectory
    from qvpo_rllib.paper.bandit import BanditRun, Measurement
    from qvpo_rllib.paper.theorem2 import VariantResult


def add(commands: Any) -> None:
    bandit = commands.add_parser(
        "bandit",
        help="the paper's Figure 2: what the diffusion entropy term does",
        description="Train a diffusion policy on a continuous bandit with three equal peaks, "
        "without and with the diffusion entropy term (Eq. 10), and draw where its samples go. The "
        "reward itself is Q. About 20 seconds per seed on one core.",
        allow_abbrev=False,
    )
    bandit.set_defaults(run=_bandit)
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
    _add_shared(
        bandit,
        updates="policy updates per training (default 800)",
        settings="a hyperparameter of both rows, such as num_policy_samples=16; repeatable. "
        "entropy_weight is the second row's",
    )
    theorem2 = commands.add_parser(
        "theorem2",
        help="the paper's Theorem 2 in one dimension: what Q-weighted training converges to",
        description="Train diffusion policies on samples of a fixed behaviour policy, weighted by "
        "Eq. 7, by qcut and by qadv, and measure how far each is from the density it should have "
        "(Kolmogorov-Smirnov distance). About a minute and a half on one core.",
        allow_abbrev=False,
    )
    theorem2.set_defaults(run=_theorem2)
    theorem2.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    _add_shared(
        theorem2,
        updates="updates per training (default 3000)",
        settings="a hyperparameter of all trainings, such as diffusion_steps=20; repeatable",
    )


def _add_shared(parser: ArgumentParser, *, updates: str, settings: str) -> None:
    """Adds --updates and --set with these help texts, and --out."""
    parser.add_argument("--updates", type=int, metavar="N", help=updates)
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help=settings
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"where results go (default runs/{parser.prog.split()[-1]}-<time>)",
    )


def _bandit(options: Namespace) -> int:
    from qvpo_rllib.core.options import require_at_least
    from qvpo_rllib.paper import bandit
    from qvpo_rllib.paper.single_state import applicable

    variance = _variance(options, bandit.VARIANCE)
    require_at_least("--num-seeds", options.num_seeds, 1)
    num_updates = _num_updates(options, bandit.NUM_UPDATES, bandit.NUM_RECORDS)
    hp = _hyperparameters(options, bandit.HYPERPARAMETERS)
    if hp.entropy_weight == 0 or hp.num_uniform_samples == 0:
        raise ValueError(
            f"entropy_weight={hp.entropy_weight:g} with num_uniform_samples="
            f"{hp.num_uniform_samples} leaves the second row without the entropy term, like the "
            "first. Both must be above 0."
        )
    with _output(options) as out:
        seeds = range(options.seed, options.seed + options.num_seeds)
        runs = _train_bandits(hp, seeds, num_updates, variance)
        summary = {
            "variance": variance,
            "updates": num_updates,
            "peak_radius": bandit.PEAK_RADIUS,
            "covered_share": bandit.COVERED_SHARE,
            "hyperparameters": applicable(hp),
            "final": [run.to_rows()[-1] for run in runs],
        }
        without, with_entropy = (
            ", ".join(str(run.final.num_covered) for run in row) for row in (runs[::2], runs[1::2])
        )
        print(
            f"Peaks covered at the end, by seed: {without} without the entropy term, "
            f"{with_entropy} with it."
        )
        first = f"Figure 2 (seed {seeds[0]})"
        contents = (first, "every measurement", "settings and final numbers")
        rows = [row for run in runs for row in run.to_rows()]
        _write(out, "bandit", bandit.bandit_figure(*runs[:2]), rows, summary, contents)
    return 0


def _variance(options: Namespace, default: float) -> float:
    if options.sigma is None and options.variance is None:
        return default
    name = "variance" if options.sigma is None else "sigma"
    value: float = getattr(options, name)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"--{name} {value:g} is not allowed: it must be a finite number above 0.")
    return value**2 if name == "sigma" else value


def _train_bandits(
    hp: "QVPOHyperparameters", seeds: range, num_updates: int, variance: float
) -> list["BanditRun"]:
    """Returns two runs per seed, the first without and the second with the entropy term."""
    from qvpo_rllib.cli.terminal import progress_line
    from qvpo_rllib.paper import bandit

    shown = {round(share * num_updates) for share in bandit.SNAPSHOTS}
    runs: list[BanditRun] = []
    with progress_line(2 * len(seeds) * num_updates, "updates") as line:

        def report(label: str, found: "Measurement") -> None:
            line.advance(len(runs) * num_updates + found.updates, label)
            if found.updates in shown:
                line.say(f"{label}: {found}")

        for seed, weight in itertools.product(seeds, (0.0, hp.entropy_weight)):
            label = f"seed {seed}, " + (f"ω_ent = {weight:g}" if weight else "no entropy term")
            run = bandit.train(
                dataclasses.replace(hp, entropy_weight=weight),
                seed=seed,
                num_updates=num_updates,
                variance=variance,
                report=functools.partial(report, label),
            )
            runs.append(run)
    return runs


def _theorem2(options: Namespace) -> int:
    from qvpo_rllib.paper import theorem2
    from qvpo_rllib.paper.single_state import applicable

    num_updates = _num_updates(options, theorem2.NUM_UPDATES, 1)
    hp = _hyperparameters(options, theorem2.HYPERPARAMETERS, fixed=theorem2.FIXED)
    with _output(options) as out:
        results = _train_variants(hp, options.seed, num_updates)
        chain = theorem2.chain_distance(results[0].expected, hp, seed=options.seed)
        rows = [{"seed": options.seed, **found.to_row()} for found in results]
        summary = {
            "updates": num_updates,
            "rows_per_update": theorem2.ROWS_PER_UPDATE,
            "ks_of_the_chain_itself": chain,
            "hyperparameters": applicable(hp, fixed=theorem2.FIXED),
            "results": rows,
        }
        print(
            f"A perfect network's chain of {hp.diffusion_steps} steps has KS {chain:.3f} to Eq. "
            f"7's density; the trained policy has {results[0].ks_expected:.3f}."
        )
        contents = ("the densities", "the distances", "settings and distances")
        _write(out, "theorem2", theorem2.theorem2_figure(results), rows, summary, contents)
    return 0


def _train_variants(
    hp: "QVPOHyperparameters", seed: int, num_updates: int
) -> list["VariantResult"]:
    from qvpo_rllib.cli.terminal import progress_line
    from qvpo_rllib.paper import theorem2

    results: list[VariantResult] = []
    with progress_line(len(theorem2.VARIANTS) * num_updates, "updates") as line:

        def report(label: str, updates: int) -> None:
            line.advance(len(results) * num_updates + updates, label)

        for variant in theorem2.VARIANTS:
            own = functools.partial(report, variant.title)
            found = theorem2.train(variant, hp, seed=seed, num_updates=num_updates, report=own)
            line.say(str(found))
            results.append(found)
    return results


def _num_updates(options: Namespace, default: int, least: int) -> int:
    """Returns the number of updates; raises `ValueError` for it, or for the seed, if too low."""
    from qvpo_rllib.core.options import require_at_least

    require_at_least("--seed", options.seed, 0)
    require_at_least("--updates", options.updates, least)
    return default if options.updates is None else options.updates


def _hyperparameters(
    options: Namespace, base: Mapping[str, Any], fixed: tuple[str, ...] = ()
) -> "QVPOHyperparameters":
    from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
    from qvpo_rllib.paper.single_state import toy_hyperparameters
    from qvpo_rllib.training.plan import parse_settings

    settings = parse_settings(options.settings, QVPOHyperparameters)
    return toy_hyperparameters(base, settings, fixed=fixed)


def _output(options: Namespace) -> "OutputDirectory":
    from qvpo_rllib.files import OutputDirectory

    default = Path("runs") / f"{options.command}-{time.strftime('%Y%m%d-%H%M%S')}"
    return OutputDirectory(options.out or default)


def _write(
    out: "OutputDirectory",
    name: str,
    figure: "Figure",
    rows: list[dict[str, Any]],
    summary: dict[str, Any],
    contents: tuple[str, str, str],
) -> None:
    """Writes picture, table and summary, and prints where each is and what it holds."""
    from qvpo_rllib.files import replacing

    with replacing(out.path / f"{name}.png") as temporary:
        figure.savefig(temporary)
    out.write_table(f"{name}.parquet", rows)
    out.write_summary(f"{name}.json", summary)
    for suffix, content in zip(("png", "parquet", "json"), contents, strict=True):
        print(f"  {out.path}/{name}.{suffix:7}   {content}")
