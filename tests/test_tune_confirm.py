"""Which settings a search hands on to its second stage."""

from pathlib import Path
from typing import Any

import pytest
from made_up_results import Score, make_results

from qvpo_rllib.tuning.experiment import Experiment
from qvpo_rllib.tuning.spec import ExperimentSpec

PENDULUM, CHEETAH = "InvertedPendulum-v5", "HalfCheetah-v5"
VALUES = {
    "name": "search",
    "algorithm": "td3",
    "task": PENDULUM,
    "preset": "quick",
    "seeds": [0, 1, 2],
    "env_steps": 4000,
    "sweep": {"grid": {"policy_delay": [1, 2, 3]}},
    "confirm": {"seeds": [7], "top": 2},
}


def confirmed(storage: Path, score: Score, **changes: Any) -> list[int]:
    """The policy delays to confirm; `entries`: what differs in trials' entries."""
    entries = changes.pop("entries", None)
    values = {**VALUES, **changes}
    make_results(storage, values, score, entries)
    experiment = Experiment(ExperimentSpec.from_dict({**values, "storage": str(storage)}))
    return [s["policy_delay"] for s in experiment._best_settings(experiment.parts[0])]


def test_the_mean_over_seeds_decides_not_the_luckiest_seed(tmp_path: Path) -> None:
    returns = {1: (100, 0, 0), 2: (90, 90, 90), 3: (80, 80, 95)}
    found = confirmed(tmp_path, lambda c, _: float(returns[c["policy_delay"]][c["seed"]]))
    assert found == [2, 3]


def test_each_task_counts_alike(tmp_path: Path) -> None:
    """The second is a little better where returns are large, and useless where they are small."""
    returns = {PENDULUM: (0, 1000, 50, 900), CHEETAH: (0, 5000, 5010, 4990)}
    found = confirmed(
        tmp_path, lambda c, _: float(returns[c["env"]][c["policy_delay"]]), task=[PENDULUM, CHEETAH]
    )
    assert found == [1, 2]


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_a_setting_that_has_not_ended_on_every_seed_comes_last(tmp_path: Path, status: str) -> None:
    """Its other seeds would be compared with all of the others'."""
    cut = {3: {"status": status, "rows": 1}}  # seed 1 of the first setting
    assert confirmed(tmp_path, lambda c, _: -float(c["policy_delay"]), entries=cut) == [2, 3]
    every = {n: {"status": status, "rows": 1} for n in (3, 4, 5)}
    found = confirmed(tmp_path / "all", lambda c, _: -float(c["policy_delay"]), entries=every)
    assert found == [1, 2]
