"""Theorem 2: the densities against sums, the trained policy against Eq. 7, the command."""

import json

import matplotlib.image
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from qvpo_rllib import cli
from qvpo_rllib.paper import theorem2
from qvpo_rllib.paper.single_state import toy_hyperparameters

HP = toy_hyperparameters(theorem2.HYPERPARAMETERS, {})
QUICK = ["--updates", "3", "--set", "hidden=8", "--set", "diffusion_steps=3"]
QRELU, QCUT, QADV, QCUT_BEST, QADV_BEST = theorem2.VARIANTS


@pytest.mark.parametrize("variant", theorem2.VARIANTS, ids=lambda v: v.title)
def test_the_expected_density_is_that_of_resampled_behaviour(variant):
    """Draw from the behaviour policy, weigh, resample: what the weighted loss sees."""
    rng, num_samples = np.random.default_rng(0), HP.num_policy_samples
    actions = theorem2.BEHAVIOR.rvs((4000, num_samples), random_state=rng)
    q = np.sin(2 * np.pi * actions) + actions / 2 + 0.5
    value = q.mean()
    if variant.best_only:
        best = q.argmax(axis=1)[:, None]
        actions, q = np.take_along_axis(actions, best, 1), np.take_along_axis(q, best, 1)
    actions, q = actions.ravel(), q.ravel()
    if variant.q_weights == "qadv":
        weights = [max(one - value, 0) for one in q]
    elif variant.q_weights == "qcut":
        weights = [one if one >= 0 else HP.q_cut for one in q]
    else:
        weights = [max(one, 0) for one in q]
    chosen = rng.choice(actions, 4000, p=np.array(weights) / np.sum(weights))
    density = theorem2.expected_density(variant, HP)
    assert theorem2.ks_distance(chosen, density) < 0.04
    assert np.trapezoid(density, theorem2.GRID) == pytest.approx(1)


def test_the_distance_of_a_uniform_sample_to_a_uniform_density():
    uniform = np.full(len(theorem2.GRID), 0.5)
    even = (np.arange(1000) + 0.5) / 500 - 1
    assert theorem2.ks_distance(even, uniform) < 0.001
    assert theorem2.ks_distance(even / 2, uniform) == pytest.approx(0.25, abs=0.001)


def test_more_steps_bring_the_chain_itself_nearer():
    density = theorem2.expected_density(QRELU, HP)

    def distance(steps):
        hp = toy_hyperparameters(theorem2.HYPERPARAMETERS, {"diffusion_steps": steps})
        return theorem2.chain_distance(density, hp, seed=0, num_samples=2000)

    few, some, many = distance(5), distance(20), distance(100)
    assert few > 1.5 * some > 2.25 * many
    assert many < 0.05


@pytest.fixture(scope="module")
def trained():
    """The policy trained with Eq. 7's weights, as `qvpo theorem2` trains it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = theorem2.train(QRELU, HP, seed=0)
    torch.set_num_threads(threads)
    return found


def test_the_trained_policy_has_eq_7s_density(trained):
    assert trained.ks_theorem2 == trained.ks_expected < 0.07
    assert trained.ks_behavior > 3 * trained.ks_theorem2


def test_the_trained_policy_avoids_what_has_a_negative_q(trained):
    behavior = theorem2.BEHAVIOR.rvs(10_000, random_state=0)
    assert (theorem2.q_function(behavior) < 0).mean() > 0.3
    assert trained.negative_share < 0.1


def test_the_best_of_n_becomes_greedy():
    """A short training is enough to see it: on the highest hill, far from Eq. 7's density."""
    found = theorem2.train(QADV_BEST, HP, seed=0, num_updates=200)
    best = theorem2.GRID[theorem2.q_function(theorem2.GRID).argmax()]
    assert np.median(np.abs(found.samples - best)) < 0.1
    assert found.ks_theorem2 > 0.3


def test_the_command_writes_picture_table_and_summary(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["theorem2", "--seed", "4", *QUICK, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        "theorem2.json", "theorem2.parquet", "theorem2.png",
    ]  # fmt: skip
    assert all(str(file) in printed for file in out.iterdir())
    rows = pq.read_table(out / "theorem2.parquet").to_pylist()
    assert [(row["q_weights"], row["trained_on"]) for row in rows] == [
        ("qrelu", "all"), ("qcut", "all"), ("qadv", "all"), ("qcut", "best"), ("qadv", "best"),
    ]  # fmt: skip
    assert {row["seed"] for row in rows} == {4}
    summary = json.loads((out / "theorem2.json").read_text())
    assert summary["results"] == rows
    assert summary["hyperparameters"]["diffusion_steps"] == 3
    assert 0 < summary["ks_of_the_chain_itself"] < 1
    height, width, _ = matplotlib.image.imread(out / "theorem2.png").shape
    assert width > height > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--updates", "0"], "--updates 0 is not allowed"),
        (["--seed", "-2"], "--seed -2 is not allowed"),
        (["--set", "q_weights=qexp"], "q_weights cannot be set here"),
        (["--set", "tau=0.1"], "tau has no effect"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["theorem2", *arguments, "--out", str(out)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
