"""cluster/submit.py and `qvpo train --address --or-resume`, without a cluster."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from checkpointed_run import CONFIG

from qvpo_rllib import cli
from qvpo_rllib.training.plan import TrainingPlan
from qvpo_rllib.training.records import describe_placement
from qvpo_rllib.training.run_directory import can_resume

ROOT = Path(__file__).parents[1]
PLAN = TrainingPlan.from_config(CONFIG)


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: Any) -> ModuleType:
    """The module, in a directory of its own and with a home directory of its own."""
    spec = importlib.util.spec_from_file_location("submit", ROOT / "cluster" / "submit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    home, here = tmp_path / "home", tmp_path / "here"
    for directory in (home, here):
        directory.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return module


@pytest.fixture
def received(monkeypatch: Any) -> list[list[str]]:
    """The command lines that reach `qvpo`."""
    lines: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        lines.append(list(arguments))
        return 0

    monkeypatch.setattr(cli, "main", main)
    return lines


def test_train_and_tune_attach_and_go_on(submit: ModuleType, received: list[list[str]]) -> None:
    assert submit.main(["train", "--env", "Ant-v5", "--run-dir", "runs/a"]) == 0
    assert received[-1][4:] == ["runs/a", "--address", "auto", "--or-resume"]
    submit.main(["train", "--resume", "runs/a", "--address=10.0.0.1:6379"])
    assert received[-1] == ["train", "--resume", "runs/a", "--address=10.0.0.1:6379"]
    submit.main(["evaluate", "runs/a"])
    assert received[-1] == ["evaluate", "runs/a"]
    assert Path.cwd() == Path.home()


def test_experiment_files_are_found(submit: ModuleType, received: list[list[str]]) -> None:
    submit.main(["tune", "k_sweep.yaml"])
    assert received[-1][1] == str(ROOT / "tune_configs" / "k_sweep.yaml")


def test_an_experiment_file_that_is_here_comes_first(
    submit: ModuleType, received: list[list[str]]
) -> None:
    mine = Path("k_sweep.yaml").absolute()
    mine.write_text("name: mine\n")
    submit.main(["tune", "k_sweep.yaml", "--address", "auto"])
    assert received[-1] == ["tune", str(mine), "--address", "auto"]


@pytest.mark.parametrize("words", [["train", "--env", "Ant-v5"], ["serve", "pendulum"]])
def test_what_would_not_be_resumed_or_not_attach_is_refused(
    words: list[str], submit: ModuleType, received: list[list[str]], capsys: Any
) -> None:
    assert submit.main(words) == 2
    assert not received
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "tune"])
def test_without_a_cluster_nothing_starts(
    command: str, submit: ModuleType, capsys: Any, monkeypatch: Any
) -> None:
    """An address where nobody listens: other Rays on this machine would be found by "auto"."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr("ray.init", _nobody)
    words = ["--run-dir", "runs/a"] if command == "train" else ["smoke.yaml"]
    assert submit.main([command, *words]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "No Ray cluster could be joined at the address 'auto'" in message
    assert not (Path.home() / "runs" / "a").exists()
    assert not (Path.home() / "results").exists()


def test_or_resume_needs_a_run_dir(capsys: Any) -> None:
    assert cli.main(["train", "--or-resume"]) == 2
    assert "--or-resume needs --run-dir" in " ".join(capsys.readouterr().err.split())


def test_a_run_that_was_begun_is_gone_on_with(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert not can_resume(run, PLAN)
    (run / "checkpoints" / "last").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(CONFIG))
    options = {**PLAN.hyperparameters, "hidden": (16, 16)}
    assert can_resume(run, dataclasses.replace(PLAN, hyperparameters=options))


def test_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match="other values of seed"):
        can_resume(run, dataclasses.replace(PLAN, seed=2))
    assert os.listdir(tmp_path) == ["run"]


def test_a_run_without_a_checkpoint_begins_anew_and_is_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(CONFIG))
    assert not can_resume(run, PLAN)
    [kept] = os.listdir(tmp_path)
    assert kept.startswith("run-unsaved-")


def test_the_line_that_says_where_workers_are() -> None:
    nodes = {1: "10.0.0.5", 2: "10.0.0.6", 3: "10.0.0.5"}
    snapshot = {
        "driver": {"node_ip": "10.0.0.5"},
        "workers": [{"worker": index, "node_ip": ip} for index, ip in nodes.items()],
    }
    expected = "Rollout workers: 1, 3 on 10.0.0.5; 2 on 10.0.0.6; learner on 10.0.0.5."
    assert describe_placement(snapshot) == expected


def _nobody(**options: Any) -> None:
    raise ConnectionError("Could not find any running Ray instance.")
