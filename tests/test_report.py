"""The report, over made-up results whose every number is known."""

import itertools
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_up_results import SWEEP, make_results, score

from qvpo_rllib import cli
from qvpo_rllib.report import figures
from qvpo_rllib.report.build import build_report
from qvpo_rllib.report.comparison import Candidate, verdict
from qvpo_rllib.report.diagnostics import PANELS, diagnostics
from qvpo_rllib.report.figures import curves_of_tasks, option_scatter
from qvpo_rllib.report.runs import Group, Run, grouped, load_runs
from qvpo_rllib.report.statistics import (
    common_points,
    curve_band,
    estimate,
    improvement,
    iqm,
    least_p_value,
    p_value,
    profile,
)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: Any) -> tuple[Path, Path]:
    """A report over eight trials of which one failed, one stopped half-way, one never began.

    Trials are seed by seed: number 5 is K_b = 4 with seed 2, 6 and 7 are seed 3.
    """
    storage = tmp_path_factory.mktemp("report")
    changes: dict[int, Any] = {
        5: {"rows": 2, "status": "running"},
        6: {"rows": 1, "status": "failed", "error": "NonFiniteError: a loss became nan"},
        7: None,
    }
    results = make_results(storage, SWEEP, score, changes)
    build_report([results], storage / "out")
    return results, storage / "out"


def test_seeds_evaluated_at_about_the_same_env_steps_are_matched() -> None:
    """As of vector environments, which take a few env steps more."""
    steps, values = common_points(
        [
            [(1003, 1.0), (2005, 2.0), (3001, 3.0)],
            [(1000, 5.0), (2009, 6.0)],  # it is not that far yet
            [(1006, 9.0), (2007, 10.0), (3002, 11.0)],
        ]
    )
    assert (steps.tolist(), values.tolist()) == ([1003, 2007], [[1, 2], [5, 6], [9, 10]])
    of_100 = [(100 * i, float(i)) for i in range(1, 5)]
    steps, values = common_points([of_100, [(200, 7.0), (400, 8.0), (600, 9.0)]])
    assert (steps.tolist(), values.tolist()) == ([200, 400], [[2, 4], [7, 8]])
    steps, values = common_points([[(100, 1.0)], [(160, 2.0)]])
    assert (steps.shape, values.shape) == ((0,), (2, 0))


# --- statistics --------------------------------------------------------------------------------


def test_iqm_is_the_mean_without_the_outer_quarters() -> None:
    assert iqm([100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -100.0]) == np.mean([2, 3, 4, 5])
    assert iqm([1.0, 2.0, 9.0]) == 4.0


def test_improvement_counts_pairs_and_half_of_ties() -> None:
    x, y = [3.0, 1.0, 2.0], [2.0, 0.0]
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(x, y)]
    assert improvement([x], [y]).value == pytest.approx(np.mean(pairs))
    assert improvement([x], [x]).value == 0.5
    assert improvement([x, [1.0, 1.0]], [y, [0.0, 0.0]]).value == pytest.approx(
        (np.mean(pairs) + 1) / 2
    )


def test_p_value_of_seeds_without_overlap_is_known() -> None:
    for n, m in ((2, 2), (3, 5), (8, 8)):
        least = 2 / math.comb(n + m, n)
        assert least_p_value([(n, m)]) == pytest.approx(least)
        assert p_value([np.arange(n) + 9.0], [np.arange(m)]) == pytest.approx(least)
        assert p_value([[1.0] * n], [[0.0] * m]) == pytest.approx(least)
        assert p_value([np.arange(m)], [np.arange(n) + 9.0]) == 1.0
    # Three tasks say more than one, and what they say must agree.
    high, low = [4.0, 5.0, 6.0], [1.0, 2.0, 3.0]
    assert p_value([high] * 3, [low] * 3) < 0.05 < p_value([high], [low])
    assert p_value([high, low], [low, high]) == 1.0


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    """Twenty seeds of a normal distribution: between 80 and 100 of 100 intervals hold its mean."""
    random = np.random.default_rng(0)
    intervals = [estimate([random.normal(5, 2, 20)], np.mean) for _ in range(100)]
    assert 80 <= sum(e.low <= 5 <= e.high for e in intervals) <= 100
    assert all(e.low < e.value < e.high for e in intervals)


def test_tasks_are_strata() -> None:
    """Between tasks the returns differ a hundredfold, within a task not at all: no uncertainty."""
    e = estimate([[1.0, 1.0, 1.0], [100.0, 100.0, 100.0]])
    assert (e.low, e.value, e.high) == (50.5, 50.5, 50.5)


def test_one_seed_has_no_interval() -> None:
    assert not estimate([[3.0]]).has_interval
    assert np.isnan(curve_band(np.ones((1, 5)))[1]).all()


def test_profile_is_the_share_above() -> None:
    shares = profile([[0.1, 0.5], [0.5, 0.9]], np.array([0.0, 0.3, 0.5, 1.0]))
    assert shares.tolist() == [1.0, 0.75, 0.25, 0.0]


# --- what it says ------------------------------------------------------------------------------


def test_no_trial_is_dropped(reported: Any) -> None:
    results, out = reported
    runs = load_runs([results])
    assert len(runs) == 8
    found = [run.status for run in runs]
    assert found == ["finished"] * 5 + ["unfinished", "failed", "not started"]
    page = (out / "report.html").read_text()
    for word in ("5 of 8 runs have ended", "unfinished", "NonFiniteError", "not started"):
        assert word in page
    table = pq.read_table(out / "evaluations.parquet").to_pydict()
    assert len(table["seed"]) == 5 * 4 + 2 + 1 + 1
    assert table["status"].count("not started") == 1


def test_table_1_has_best_and_last_of_the_ended_runs(reported: Any) -> None:
    _, out = reported
    text = (out / "table1.md").read_text()
    rows = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if "K_b=" in line]
    (one, four) = rows
    assert one[2:6] == ["K_b=1", "3 of 4", "108.0 (1.0)", "101.0 (1.0)"]
    assert four[2:6] == ["K_b=4", "2 of 4", "207.5 (0.7)", "200.5 (0.7)"]


def test_settings_with_missing_seeds_are_not_compared(reported: Any) -> None:
    _, out = reported
    assert "Not compared, as seeds are missing: K_b=1; K_b=4" in (out / "report.md").read_text()


def test_whole_sweep_is_decided(tmp_path: Path) -> None:
    build_report([make_results(tmp_path, SWEEP, score)], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Highest: K_b=4, 201.5 [" in text
    assert "It beats every other setting" in text
    assert "| K_b=1 | 4 | 101.5 " in text
    assert "1.00 [1.00, 1.00] |" in text


def test_a_setting_of_one_seed_is_not_beaten() -> None:
    three, one = Candidate("three", ((10.0, 11.0, 12.0),)), Candidate("one", ((10.5,),))
    text = verdict([three, one], [], "train")
    assert "Highest: three, 11.0 [" in text
    assert "These seeds tell no other setting apart from it." in text
    six, low = (Candidate(str(n), (tuple(n + np.arange(6.0)),)) for n in (60, 0))
    with_another = verdict([six, one, low], [], "train")
    assert "do not tell apart from it: one. The others it beats" in with_another


def test_few_seeds_tell_nothing_apart() -> None:
    """However far apart they are: such an order of so few comes about by chance."""

    def said(seeds: int, settings: int = 2) -> str:
        far = [tuple(1000.0 * n + np.arange(seeds)) for n in range(settings)]
        return verdict([Candidate(str(n), (s,)) for n, s in enumerate(far)], [], "train")

    needed = "tell no other setting apart from it. To tell 2 settings apart takes at least 4 seeds"
    assert needed in said(2)
    assert needed in said(3)
    assert said(4).endswith("and p < 0.05 by the exact Mann-Whitney test).")
    # Of five settings the best and the worst are farther apart, by chance too, than two are.
    assert "To tell 5 settings apart takes at least 6 seeds of each." in said(5, settings=5)
    assert said(6, settings=5).endswith("exact Mann-Whitney test, corrected for 10 pairs).")


@pytest.mark.parametrize("end", [-150.0, 0.0])
def test_returns_that_are_not_positive_have_no_profile(tmp_path: Path, end: float) -> None:
    values = {**SWEEP, "task": ["Pendulum-v1", "Hopper-v5"]}

    def low(config: dict[str, Any], share: float) -> float:
        return end - config["k_behavior"] if config["env"] == "Pendulum-v1" else 100.0

    build_report([make_results(tmp_path, values, low)], tmp_path / "out")
    names = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert "sweep-Pendulum-v1-curves" in names
    assert "sweep-profile" not in names


def test_settings_that_differ_by_luck_are_not_told_apart(tmp_path: Path) -> None:
    def luck(config: dict[str, Any], share: float) -> float:
        return float((7 * config["seed"] + config["k_behavior"]) % 5)

    build_report([make_results(tmp_path, SWEEP, luck)], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "These seeds tell no other setting apart from it." in text


def test_the_page_opens_offline_and_figures_come_as_png_and_pdf(reported: Any) -> None:
    _, out = reported
    page = (out / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    pictures = sorted(out.glob("*.png"))
    assert page.count("data:image/png;base64,") == len(pictures) >= 2
    for picture in pictures:
        assert picture.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_heat_map_lines_and_profile_are_drawn_where_they_mean_something(tmp_path: Path) -> None:
    values = {
        **SWEEP,
        "task": ["InvertedPendulum-v5", "Hopper-v5"],
        "sweep": {"grid": {"k_behavior": [1, 4], "k_target": [1, 2]}},
    }
    build_report([make_results(tmp_path, values, score)], tmp_path / "out")
    names = {path.stem for path in (tmp_path / "out").glob("*.png")}
    for task in values["task"]:
        for kind in ("curves", "heatmap", "k_behavior", "k_target", "improvement"):
            assert f"sweep-{task}-{kind}" in names
    assert "sweep-profile" in names


def test_a_sweep_is_drawn_for_each_algorithm(tmp_path: Path, monkeypatch: Any) -> None:
    values = {
        **SWEEP,
        "algorithm": ["qvpo", "sac"],
        "seeds": [0],
        "sweep": {"grid": {"tau": [0.1, 0.2], "gamma": [0.9, 0.99]}},
    }
    calls = itertools.count()  # QVPO's evaluations come first, all of 1; those of SAC are 2
    half = 4 * 4
    drawn = []

    def heat_map(cells: Any, *args: Any, title: str, **more: Any) -> Any:
        drawn.append((title, {e.value for e in cells.values()}))
        return original(cells, *args, title=title, **more)

    original = figures.heat_map
    monkeypatch.setattr(figures, "heat_map", heat_map)
    results = make_results(tmp_path, values, lambda c, share: 1.0 if next(calls) < half else 2.0)
    build_report([results], tmp_path / "out")
    names = {path.stem for path in (tmp_path / "out").glob("*.png")}
    for algorithm, kind in itertools.product(("QVPO", "SAC"), ("heatmap", "tau", "gamma")):
        assert f"sweep-InvertedPendulum-v5-{algorithm}-{kind}" in names
    of_task = "on InvertedPendulum-v5: last return"
    assert drawn == [(f"QVPO {of_task}", {1.0}), (f"SAC {of_task}", {2.0})]


def test_a_scatter_says_how_each_run_stands() -> None:
    stands = ["finished", "stopped early", "unfinished", "failed"]
    rows: list[Any] = [{"env_steps": 100, "evaluation/return_mean": 1.0}]
    points = [
        (0.1, Run("s", "search", "QVPO", "Hopper-v5", {"tau": 0.1}, 0, status, 200, rows))
        for status in stands
    ]
    _, labels = option_scatter(points, "tau", title="").axes[0].get_legend_handles_labels()
    assert labels == stands


def test_each_task_is_decided_by_itself(tmp_path: Path) -> None:
    """Returns of one task are a hundred times the other's, and the order is the other way round."""
    tasks = ["InvertedPendulum-v5", "Hopper-v5"]

    def opposite(config: dict[str, Any], share: float) -> float:
        value = float(10 * config["k_behavior"] + config["seed"])
        return value if config["env"] == tasks[0] else 10_000 - 100 * value

    build_report([make_results(tmp_path, {**SWEEP, "task": tasks}, opposite)], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert re.search(r"InvertedPendulum-v5: Highest: K_b=4, .* It beats every other setting", text)
    assert re.search(r"Hopper-v5: Highest: K_b=1, .* It beats every other setting", text)


def test_diagnostics_are_drawn_where_runs_have_them() -> None:
    def group(k: int, columns: dict[str, float]) -> Group:
        rows = [{"env_steps": n, "evaluation/return_mean": 1.0, **columns} for n in (100, 200)]
        setting = {"k_behavior": k}
        run = Run("sweep", "search", "QVPO", "Hopper-v5", setting, 0, "finished", 200, rows)
        return grouped([run])[0]

    assert diagnostics([group(1, {})], title="nothing") is None
    columns = {"learner/sample_std": 0.3, "evaluation/q_overestimation": 2.0, "learner/q_mean": 1.0}
    figure = diagnostics([group(1, columns), group(4, {})], title="some")
    assert figure is not None
    drawn = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    odd = diagnostics([group(1, {"learner/sample_std": 0.3})], title="one panel")
    assert odd is not None
    assert [axes.get_visible() for axes in odd.axes] == [True, False]
    assert set(drawn) == {PANELS["learner/sample_std"], PANELS["evaluation/q_overestimation"]}
    line = drawn[PANELS["learner/sample_std"]].lines[-1]
    assert (line.get_label(), list(line.get_ydata())) == ("K_b=1", [0.3, 0.3])


def test_it_opens_with_tasks_by_algorithms_and_the_curves_of_all_tasks(tmp_path: Path) -> None:
    """QVPO is best on Hopper, SAC on the pendulum."""
    values = {
        "name": "compared", "algorithm": ["qvpo", "sac"], "preset": "light", "seeds": [0, 1, 2],
        "task": ["Hopper-v5", "InvertedPendulum-v5"], "env_steps": 20_000,
    }  # fmt: skip

    calls = itertools.count()  # QVPO's 48 evaluations come first

    def returns(config: dict[str, Any], share: float) -> float:
        high = (next(calls) < 48) == (config["env"] == "Hopper-v5")
        return (200.0 if high else 100.0) * share + config["seed"]

    results = make_results(tmp_path, values, returns)
    build_report([results], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("## Summary")
    summary = (tmp_path / "out" / "summary.md").read_text()
    rows = [re.split(r" *\| *", line)[1:-1] for line in summary.splitlines() if line[:1] == "|"]
    assert rows[0] == ["task", "QVPO", "SAC", "paper"]
    assert rows[2] == ["Hopper-v5", "**201 [200, 202]**", "101 [100, 102]", "3,000"]
    assert rows[3] == ["InvertedPendulum-v5", "101 [100, 102]", "**201 [200, 202]**", "–"]
    assert "Figure 3 at 200,000" in summary
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>201 [200, 202]</b>" in page
    assert page.index("Summary") < page.index('alt="curves"') < page.index("compared")

    groups = grouped(load_runs([results]))
    for length, shown in itertools.product((3, 60, 150), (groups, groups[:1])):
        names = {id(g): f"{g.algorithm} {'long ' * length}"[:length] for g in groups}
        figure = curves_of_tasks(shown, lambda g, names=names: names[id(g)])
        figure.draw_without_rendering()
        legend = figure.legends[0].get_window_extent()
        assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width


def test_a_summary_says_how_many_seeds_have_ended(reported: Any) -> None:
    _, out = reported
    summary = (out / "summary.md").read_text()
    assert "| 101 [100, 102] (3 of 4 seeds) | **200 [200, 201] (2 of 4 seeds)** |" in summary


def test_a_summary_of_many_settings_keeps_the_best(tmp_path: Path) -> None:
    values = {**SWEEP, "sweep": {"settings": [{"k_behavior": k} for k in range(1, 13)]}}
    build_report(
        [make_results(tmp_path, values, lambda config, share: float(config["k_behavior"]))],
        tmp_path / "out",
    )
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| task | K_b=6 | K_b=7 | K_b=8 | K_b=9 | K_b=10 | K_b=11 | K_b=12 |" in summary


# --- the command -------------------------------------------------------------------------------


def test_report_command_writes_again_but_over_nothing_else(reported: Any, tmp_path: Path) -> None:
    results, out = reported
    assert cli.main(["report", str(results), "--out", str(out)]) == 0
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert cli.main(["report", str(results), "--out", str(other)]) == 2
    assert [path.name for path in other.iterdir()] == ["notes.txt"]


def test_a_directory_without_results_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("Give such directories.")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_results_is_refused_with_one_of_them(
    reported: Any, tmp_path: Path, capsys: Any
) -> None:
    inner = tmp_path / "all" / "mine"
    shutil.copytree(reported[0], inner)
    assert cli.main(["report", str(inner.parent), "--out", str(tmp_path / "out")]) == 2
    said = "".join(capsys.readouterr().err.split())
    assert f"suchas'{inner}'init." in said


def test_figures_of_an_earlier_report_go_and_other_files_stay(
    reported: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(reported[1], out)
    (out / "old.png").write_text("")
    (out / "old.pdf").write_text("")
    (out / "mine.png").write_text("")
    with (out / "report.md").open("a") as file:
        file.write("![old](old.png)\n![../mine](../mine.png)\n")
    before = {path.name for path in out.iterdir()}
    assert cli.main(["report", str(reported[0]), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == before - {"old.png", "old.pdf"}


def test_a_config_of_something_else_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"env": "Ant-v5", "preset": "light", "seed": 0}')
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "lacks algo, env_steps, hyperparameters" in message
