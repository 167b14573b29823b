"""The report, over made-up results whose every number is known."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_up_results import make_results

from qvpo_rllib import cli
from qvpo_rllib.report.build import build_report
from qvpo_rllib.report.comparison import Candidate, candidates, verdict
from qvpo_rllib.report.diagnostics import PANELS, diagnostics
from qvpo_rllib.report.figures import curves_of_tasks
from qvpo_rllib.report.runs import SYMBOLS, Group, Run, grouped, load_runs
from qvpo_rllib.report.statistics import (
    common_points,
    curve_band,
    estimate,
    improvement,
    iqm,
    profile,
)
from qvpo_rllib.training.run_directory import RunDirectory
from qvpo_rllib.tuning.results import read_rows

SWEEP = {
    "name": "sweep",
    "task": "InvertedPendulum-v5",
    "preset": "quick",
    "seeds": [0, 1, 2, 3],
    "env_steps": 4000,
    "sweep": {"settings": [{"k_behavior": 1}, {"k_behavior": 4}]},
}


def score(config: dict[str, Any], share: float) -> float:
    """K_b = 4 ends at 200 + seed, K_b = 1 at 100 + seed; both peak one evaluation before."""
    end = 200.0 if config["k_behavior"] == 4 else 100.0
    return end + config["seed"] + (7 if share == 0.75 else 0)


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


# --- reading -----------------------------------------------------------------------------------


def test_rows_written_again_after_a_crash_replace_the_first(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    steps = [(100, 1), (200, 2), (300, 3), (200, 4), (300, 5), (400, 6)]
    lines = [json.dumps({"env_steps": s, "v": v}) for s, v in steps]
    text = "\n".join([*lines[:3], lines[3][:9], *lines[3:]]) + "\n"
    (tmp_path / "results" / "a.jsonl").write_text(text)
    rows = [(row["env_steps"], row["v"]) for row in read_rows(tmp_path, "a")]
    assert rows == [(100, 1), (200, 4), (300, 5), (400, 6)]


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


# --- what it says ------------------------------------------------------------------------------


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
    with_another = verdict([three, one, Candidate("low", ((1.0, 2.0, 3.0),))], [], "train")
    assert "do not tell apart from it: one. The others it beats" in with_another


def test_a_setting_tried_again_is_one_seed(tmp_path: Path) -> None:
    """As Optuna may try it; the trial that ended counts."""
    directory = make_results(tmp_path, SWEEP, score, {5: {"rows": 1, "status": "running"}})
    record = json.loads((directory / "experiment.json").read_text())
    (part,) = record["parts"]
    trials = directory / part["name"] / "trials.json"
    entries = json.loads(trials.read_text())["trials"]
    ended = directory / part["name"] / "results" / "again.jsonl"
    ended.write_text(json.dumps({"env_steps": 4000, "evaluation/return_mean": 5.0}) + "\n")
    entries["again"] = {**entries["t5"], "status": "finished", "env_steps": 4000}
    part["trials"] = None  # the search decides
    (directory / "experiment.json").write_text(json.dumps(record))
    trials.write_text(json.dumps({"trials": entries}))
    runs = load_runs([directory])
    assert len(runs) == 8
    assert [r.returns for r in runs if (r.label, r.seed) == ("K_b=4", 2)] == [[5.0]]


def test_an_experiment_is_not_counted_twice(tmp_path: Path) -> None:
    directory = make_results(tmp_path, SWEEP, score)
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    for again in (directory, copy):
        with pytest.raises(ValueError, match="have the same algorithm, options, task and seed"):
            load_runs([directory, again])


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


def test_train_runs_are_grouped_by_what_sets_them_apart(tmp_path: Path) -> None:
    for seed, tau in itertools.product((0, 1), (0.1, 0.2)):
        config = {
            "algo": "qvpo", "env": "Ant-v5", "preset": "light", "seed": seed, "env_steps": 200,
            "hyperparameters": {"tau": tau, "gamma": 0.9},
        }  # fmt: skip
        with RunDirectory.create(tmp_path / f"{seed}-{tau}", config, ["qvpo"]) as run:
            run.metrics.append(
                {"env_steps": 100, "evaluation/return_mean": 1.0, "time_total_s": 1.0}
            )
            if seed == 0:
                run.metrics.append(
                    {"env_steps": 200, "evaluation/return_mean": 2.0, "time_total_s": 2.0}
                )
    runs = load_runs(sorted(p for p in tmp_path.iterdir() if p.is_dir()))
    labels = [(run.label, run.seed, run.status) for run in runs]
    assert labels == [
        ("preset=light, τ=0.1", 0, "finished"),
        ("preset=light, τ=0.2", 0, "finished"),
        ("preset=light, τ=0.1", 1, "unfinished"),
        ("preset=light, τ=0.2", 1, "unfinished"),
    ]


def train_run(path: Path, seed: int = 0, rows: int = 1, **changes: Any) -> Path:
    config = {
        "algo": "qvpo", "env": "Ant-v5", "preset": "light", "seed": seed, "env_steps": 200,
        "hyperparameters": {"tau": 0.1}, **changes,
    }  # fmt: skip
    with RunDirectory.create(path, config, ["qvpo"]) as run:
        for _ in range(rows):
            run.metrics.append({"env_steps": 200, "evaluation/return_mean": 2.0})
    return path


def test_one_seed_is_not_counted_twice(tmp_path: Path) -> None:
    first, copy, other = (train_run(tmp_path / n, s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert len(load_runs([first, other])) == 2
    with pytest.raises(ValueError, match=r"/a'.*/b' have the same .* seed.*Leave one of them out"):
        load_runs([first, copy, other])


def test_runs_of_other_tasks_lengths_and_workers_are_not_pooled(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"env_config": {"healthy_reward": 0, "xml_file": "a.xml"}},
        {"env_steps": 100},
        {"num_env_runners": 2},
    ]
    runs = [
        train_run(tmp_path / f"{n}-{seed}", seed, **{"num_env_runners": 0, **change})
        for n, change in enumerate(changes)
        for seed in (0, 1)
    ]
    groups = grouped(load_runs(runs))
    assert [len(group.runs) for group in groups] == [2, 2, 2, 2]
    tasks = [group.task for group in groups]
    assert tasks == ["Ant-v5", "Ant-v5 (healthy_reward=0, xml_file=a.xml)", "Ant-v5", "Ant-v5"]
    labels = [group.label for group in groups if group.task == "Ant-v5"]
    assert [label.partition("env_steps=")[2] for label in labels] == [
        "200, num_env_runners=0", "100, num_env_runners=0", "200, num_env_runners=2"
    ]  # fmt: skip
    text = build_report(runs, tmp_path / "out").with_suffix(".md").read_text()
    rows = [row.split(" | ") for row in text.splitlines() if "preset=light" in row]
    papers = {row[0].strip("| "): row[-1].strip("| ") for row in rows if len(row) == 8}
    assert papers[tasks[1]] == "–"  # the paper's Ant has no such arguments
    assert papers["Ant-v5"] != "–"


def test_a_run_that_ended_before_its_first_evaluation_had_begun(tmp_path: Path) -> None:
    (run,) = load_runs([train_run(tmp_path / "a", rows=0)])
    assert run.status == "unfinished"


def test_a_run_of_an_earlier_version_stands_with_those_of_its_options_defaults(
    tmp_path: Path,
) -> None:
    for seed, later in enumerate(({}, {"frame_skip": 1, "wrappers": []}, {"frame_skip": 2})):
        config = {
            "algo": "qvpo", "env": "Ant-v5", "preset": "light", "seed": seed, "env_steps": 200,
            "hyperparameters": {"tau": 0.1, **later},
        }  # fmt: skip
        with RunDirectory.create(tmp_path / str(seed), config, ["qvpo"]) as run:
            run.metrics.append({"env_steps": 200, "evaluation/return_mean": 2.0})
    groups = grouped(load_runs([tmp_path / str(seed) for seed in range(3)]))
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 1], [2]]
    assert groups[0].label == "preset=light, frame_skip=1"


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


def test_settings_that_leave_options_out_are_named_by_what_they_change(tmp_path: Path) -> None:
    settings = [{}, {"k_behavior": 4}, {"tau": 0.5, "n_step": 3}]
    values = {**SWEEP, "seeds": [0, 1], "sweep": {"settings": settings}}
    results = make_results(tmp_path, values, lambda config, share: float(config["k_behavior"]))
    runs = load_runs([results])
    labels = [(run.label, run.seed) for run in runs]
    assert labels == [(n, s) for s in (0, 1) for n in ("QVPO", "K_b=4", "τ=0.5, n=3")]
    trials = json.loads((results / "experiment.json").read_text())["parts"][0]["trials"]
    # A whole setting for Tune: what one leaves out has the preset's value.
    assert trials[0] == {
        "env": "InvertedPendulum-v5",
        "seed": 0,
        "k_behavior": 1,
        "tau": 0.02,
        "n_step": 1,
    }
    assert [run.returns[-1] for run in runs] == [1, 4, 1] * 2


def test_no_two_options_share_a_symbol() -> None:
    symbols = [symbol for symbol in SYMBOLS.values() if symbol]
    assert sorted(symbols) == sorted(set(symbols))


def test_settings_of_one_label_are_not_pooled() -> None:
    def run(tau: float, end: float) -> Run:
        rows: list[Any] = [{"env_steps": 200, "evaluation/return_mean": end}]
        return Run("s", "search", "QVPO", "Hopper-v5", {"tau": tau}, 0, "finished", 200, rows)

    groups = grouped([run(0.12341, 1.0), run(0.12342, 2.0)])
    assert [(g.label, g.last_returns) for g in groups] == [("τ=0.1234", [1]), ("τ=0.1234", [2])]
    compared, _ = candidates(groups)
    assert [candidate.scores for candidate in compared] == [((1,),), ((2,),)]


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
