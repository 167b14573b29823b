"""Figure 2: the bandit's reward, what the entropy term does over seeds, and `qvpo bandit`."""

import json
import math

import matplotlib.image
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from qvpo_rllib import cli
from qvpo_rllib.paper import bandit
from qvpo_rllib.paper.single_state import toy_hyperparameters

SEEDS = range(1)  # `qvpo bandit --num-seeds 5` made the published table
QUICK = [
    "--updates", "16", "--set", "hidden=8", "--set", "diffusion_steps=2",
    "--set", "num_policy_samples=4", "--set", "batch_size=2",
]  # fmt: skip


def slow_reward(x, y, variance):
    """The paper's formula, a term at a time."""
    total = 0.0
    for mu_x, mu_y in ((-1.35, 0.65), (-0.65, 1.35), (-1.61, 1.61)):
        exponent = -((x - mu_x) ** 2 + (y - mu_y) ** 2) / (2 * variance)
        total += 1.5 / (2 * math.pi * variance) * math.exp(exponent)
    return total


@pytest.mark.parametrize("variance", [0.1, 0.01])
def test_the_reward_is_the_papers_formula(variance):
    points = np.random.default_rng(0).uniform(-2, 2, (50, 2))
    found = bandit.reward(torch.tensor(points, dtype=torch.float32), variance)
    expected = [slow_reward(x, y, variance) for x, y in points]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-6)


def test_the_default_variance_has_the_saddle_of_the_papers_picture():
    """Half-way between two peaks: 0.60 of a peak with σ² = 0.1, nothing with σ = 0.1."""
    peaks = torch.tensor(bandit.PEAKS)
    saddle = (peaks[0] + peaks[1]) / 2
    for variance, ratio in ((bandit.VARIANCE, 0.60), (0.01, 0.0)):
        found = bandit.reward(saddle, variance) / bandit.reward(peaks[0], variance)
        assert float(found) == pytest.approx(ratio, abs=0.01)


def test_measured_shares_are_counts():
    on_first, between = torch.tensor(bandit.PEAKS[0]), torch.tensor([-1.0, 1.0])
    edge = torch.tensor(bandit.PEAKS[1]) + torch.tensor([0.39, 0.0])
    found = bandit.measure(torch.stack([on_first, on_first, between, edge]), 7, 0.1)
    assert found.peak_shares == (0.5, 0.25, 0.0)
    assert found.num_covered == 2


@pytest.fixture(scope="module")
def runs():
    """(without, with) the entropy term, for each seed, with the defaults of `qvpo bandit`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = [
        [
            bandit.train(
                toy_hyperparameters(bandit.HYPERPARAMETERS, {"entropy_weight": weight}), seed=seed
            )
            for weight in (0.0, bandit.HYPERPARAMETERS["entropy_weight"])
        ]
        for seed in SEEDS
    ]
    torch.set_num_threads(threads)
    return found


def test_both_rows_begin_with_the_same_policy_that_covers_little(runs):
    for without, with_entropy in runs:
        assert torch.equal(without.measurements[0].samples, with_entropy.measurements[0].samples)
        assert sum(without.measurements[0].peak_shares) < 0.2


def test_without_the_entropy_term_the_samples_end_on_one_peak(runs):
    for without, _ in runs:
        lowest, middle, highest = sorted(without.final.peak_shares)
        assert highest > 0.75
        assert lowest < 0.01
        assert middle < 0.01
        assert without.final.num_covered == 1


def test_with_the_entropy_term_all_three_peaks_stay_covered(runs):
    uniform = float(bandit.reward(4 * torch.rand(20_000, 2) - 2).mean())
    for _, with_entropy in runs:
        assert with_entropy.final.num_covered == 3
        assert max(with_entropy.final.peak_shares) < 0.4
        assert with_entropy.final.reward_mean > 2.5 * uniform  # it has learnt, all the same


def test_the_command_writes_picture_table_and_summary(tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert cli.main(["bandit", "--seed", "3", "--num-seeds", "2", *QUICK, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        "bandit.json", "bandit.parquet", "bandit.png",
    ]  # fmt: skip
    for file in out.iterdir():
        assert str(file) in printed
    assert "Peaks covered at the end" in printed
    height, width, _ = matplotlib.image.imread(out / "bandit.png").shape
    assert width > height > 500

    rows = pq.read_table(out / "bandit.parquet").to_pylist()
    assert len(rows) == 2 * 2 * (bandit.NUM_RECORDS + 1)
    assert {(row["seed"], row["entropy_weight"]) for row in rows} == {
        (seed, weight) for seed in (3, 4) for weight in (0.0, 0.02)
    }
    summary = json.loads((out / "bandit.json").read_text())
    assert summary["variance"] == 0.1
    assert summary["hyperparameters"]["hidden"] == [8]
    last = [row for row in rows if row["updates"] == 16]
    assert summary["final"] == last


def test_sigma_and_variance_are_two_ways_to_say_one_thing(tmp_path):
    for name, value in (("sigma", "0.1"), ("variance", "0.01")):
        cli.main(["bandit", f"--{name}", value, *QUICK, "--out", str(tmp_path / name)])
    tables = [pq.read_table(tmp_path / n / "bandit.parquet") for n in ("sigma", "variance")]
    assert tables[0].equals(tables[1])
    summary = json.loads((tmp_path / "sigma" / "bandit.json").read_text())
    assert summary["variance"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sigma", "0"], "--sigma 0 is not allowed"),
        (["--variance", "nan"], "--variance nan is not allowed"),
        (["--seed", "-1"], "--seed -1 is not allowed"),
        (["--num-seeds", "0"], "--num-seeds 0 is not allowed"),
        (["--updates", "3"], "--updates 3 is not allowed: it must be 16 or more"),
        (["--set", "gamma=0.9"], "gamma has no effect"),
        (["--set", "hiden=8"], "Did you mean 'hidden'"),
        (["--set", "entropy_weight=0"], "must be above 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["bandit", *arguments, "--out", str(out)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_nothing_is_overwritten(tmp_path, capsys):
    occupied = tmp_path / "mine.txt"
    occupied.write_text("mine")
    for path in (occupied, tmp_path):
        assert cli.main(["bandit", *QUICK, "--out", str(path)]) == 2
        assert "nothing was changed" in " ".join(capsys.readouterr().err.split())
    assert occupied.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
