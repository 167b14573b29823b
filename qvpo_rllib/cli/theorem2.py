"""`qvpo theorem2`: the paper's Theorem 2 as an experiment."""

import argparse
import time
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    theorem2 = commands.add_parser(
        "theorem2",
        help="the paper's Theorem 2 in one dimension: what Q-weighted training converges to",
        description="Train diffusion policies on samples of a fixed behaviour policy, weighted by "
        "Eq. 7, by qcut and by qadv, and measure how far each is from the density it should have "
        "(Kolmogorov-Smirnov distance). About a minute and a half on one core.",
        allow_abbrev=False,
    )
    theorem2.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    theorem2.add_argument(
        "--updates", type=int, metavar="N", help="updates per training (default 3000)"
    )
    theorem2.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="a hyperparameter of all trainings, such as diffusion_steps=20; repeatable",
    )
    theorem2.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go (default runs/theorem2-<time>)"
    )
    theorem2.set_defaults(run=_theorem2)


# What each training sets itself.
FIXED = ("q_weights", "num_chosen_samples", "batch_size")


def _theorem2(options: argparse.Namespace) -> int:
    from qvpo_rllib.core.hyperparameters import QVPOHyperparameters
    from qvpo_rllib.core.options import require_at_least
    from qvpo_rllib.files import OutputDirectory
    from qvpo_rllib.paper import theorem2
    from qvpo_rllib.paper.single_state import toy_hyperparameters
    from qvpo_rllib.training.plan import parse_settings

    num_updates = theorem2.NUM_UPDATES if options.updates is None else options.updates
    for name, value, least in (("seed", options.seed, 0), ("updates", num_updates, 1)):
        require_at_least(f"--{name}", value, least)
    settings = parse_settings(options.settings, QVPOHyperparameters)
    for name in FIXED:
        if name in settings:
            raise ValueError(
                f"{name} cannot be set here: it is what the five trainings differ in. Leave it out."
            )
    hp = toy_hyperparameters(theorem2.HYPERPARAMETERS, settings)
    path = options.out or Path("runs") / f"theorem2-{time.strftime('%Y%m%d-%H%M%S')}"
    with OutputDirectory(path) as out:
        results = _train_all(hp, options.seed, num_updates)
        return _write(out, results, hp, options.seed, num_updates)


def _train_all(hp: Any, seed: int, num_updates: int) -> list[Any]:
    from qvpo_rllib.cli.progress import progress_line
    from qvpo_rllib.paper import theorem2

    results = []
    with progress_line(len(theorem2.VARIANTS) * num_updates, "updates") as line:

        def train(variant: Any, done: int) -> Any:
            def report(updates: int) -> None:
                line.advance(done + updates, variant.title)

            return theorem2.train(variant, hp, seed=seed, num_updates=num_updates, report=report)

        for number, variant in enumerate(theorem2.VARIANTS):
            found = train(variant, number * num_updates)
            line.say(
                f"{variant.title:18} KS to what it asks for {found.ks_expected:.3f}, to Eq. 7's "
                f"density {found.ks_theorem2:.3f}, to the behaviour policy {found.ks_behavior:.3f}"
            )
            results.append(found)
    return results


def _write(out: Any, results: list[Any], hp: Any, seed: int, num_updates: int) -> int:
    from qvpo_rllib.paper import theorem2
    from qvpo_rllib.paper.single_state import APPLICABLE
    from qvpo_rllib.paper.theorem2 import plot_theorem2

    chain = theorem2.chain_distance(
        results[0].expected, hp, seed=seed, num_samples=theorem2.NUM_MEASURED_SAMPLES
    )
    rows = [{"seed": seed, **found.to_row()} for found in results]
    out.write_table("theorem2.parquet", rows)
    shared = [name for name in APPLICABLE if name not in FIXED]
    out.write_summary(
        "theorem2.json",
        {
            "updates": num_updates,
            "rows_per_update": theorem2.ROWS_PER_UPDATE,
            "ks_of_the_chain_itself": chain,
            "hyperparameters": {name: getattr(hp, name) for name in shared},
            "results": rows,
        },
    )
    plot_theorem2(results, out.path / "theorem2.png")
    print(
        f"A perfect network's chain of {hp.diffusion_steps} steps has KS {chain:.3f} to Eq. 7's "
        f"density; the trained policy has {results[0].ks_expected:.3f}.\n"
        f"  {out.path}/theorem2.png       the densities\n"
        f"  {out.path}/theorem2.parquet   the distances\n"
        f"  {out.path}/theorem2.json      settings and distances"
    )
    return 0
