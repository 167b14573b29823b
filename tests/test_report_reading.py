"""What a report reads, and which runs are seeds of one setting."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_up_results import SWEEP, make_results, score

from qvpo_rllib.report.build import build_report
from qvpo_rllib.report.comparison import candidates
from qvpo_rllib.report.runs import SYMBOLS, Run, grouped, load_runs
from qvpo_rllib.training.run_directory import RunDirectory
from qvpo_rllib.tuning.results import read_rows


def test_rows_written_again_after_a_crash_replace_the_first(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    steps = [(100, 1), (200, 2), (300, 3), (200, 4), (300, 5), (400, 6)]
    lines = [json.dumps({"env_steps": s, "v": v}) for s, v in steps]
    text = "\n".join([*lines[:3], lines[3][:9], *lines[3:]]) + "\n"
    (tmp_path / "results" / "a.jsonl").write_text(text)
    rows = [(row["env_steps"], row["v"]) for row in read_rows(tmp_path, "a")]
    assert rows == [(100, 1), (200, 4), (300, 5), (400, 6)]


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


@pytest.mark.parametrize(
    ("changed", "ones", "others"),
    [
        ({"env_steps": 8000}, "env_steps=4000", "env_steps=8000"),
        ({"training": {"tau": 0.5, "hidden": [8, 8]}}, "", "τ=0.5, hidden=[8, 8]"),
        ({"per_algorithm": {"qvpo": {"tau": 0.5}}}, "", "τ=0.5"),
        ({"preset": "light"}, "preset=quick", "preset=light"),
    ],
)
def test_experiments_of_one_name_that_fix_other_options_are_not_pooled(
    tmp_path: Path, changed: dict[str, Any], ones: str, others: str
) -> None:
    """With other seeds they would be taken for one, with the same seeds refused as one."""
    values = {**SWEEP, "evaluation": {"interval": 1000}}
    first = make_results(tmp_path / "a", values, score)
    for storage, seeds in (("b", [4, 5]), ("c", SWEEP["seeds"])):
        second = make_results(tmp_path / storage, {**values, "seeds": seeds, **changed}, score)
        groups = grouped(load_runs([first, second]))
        assert [(g.label, len(g.runs)) for g in groups] == [
            (", ".join(filter(None, (setting, apart))), seeds)
            for apart, seeds in ((ones, 4), (others, len(seeds)))
            for setting in ("K_b=1", "K_b=4")
        ]


def test_experiments_of_one_name_that_differ_in_their_seeds_are_pooled(tmp_path: Path) -> None:
    first = make_results(tmp_path / "a", SWEEP, score)
    more = {
        **SWEEP,
        "seeds": [4, 5],
        "resources": {"max_concurrent": 1, "max_failures": 2},
        "checkpoints": {"replay": False},
        "confirm": {"seeds": [9]},
        "sweep": {"settings": [{"k_behavior": 1}, {"k_behavior": 2}]},
    }
    groups = grouped(load_runs([first, make_results(tmp_path / "b", more, score)]))
    assert [(g.label, len(g.runs)) for g in groups] == [("K_b=1", 6), ("K_b=4", 4), ("K_b=2", 2)]


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
