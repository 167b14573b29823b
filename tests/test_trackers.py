"""`qvpo train --log`: Weights & Biases and MLflow get every row, and never stop a run."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qvpo_rllib import cli
from qvpo_rllib.training import trackers
from qvpo_rllib.training.trackers import LOGGERS, Trackers, tune_callback

CONFIG = {"env": "Ant-v5", "hyperparameters": {"k_behavior": 4}}
ROWS = [{"env_steps": 10, "updates": 5, "learner/loss": 0.5, "note": "x", "none": None}]
TINY = ["--preset", "quick", "--env-steps", "80", "--eval-interval", "40", "--set", "hidden=8"]
TINY += ["--set", "warmup_steps=40", "--set", "batch_size=8", "--set", "k_eval=2"]
TINY += ["--set", "num_policy_samples=2", "--set", "diffusion_steps=2", "--set", "engine=eager"]


class Recorded:
    """A tracker that keeps what it gets; it fails at the call named by `fails_at`."""

    made: list["Recorded"]
    fails_at = ""

    def __init__(self, run_id: str | None, directory: Path, config: Mapping[str, Any]) -> None:
        self.run_id, self.config = run_id or "new", config
        self.rows: list[Any] = []
        self.closed: list[bool] = []
        self.made.append(self)
        self._may_fail("init")

    def log(self, numbers: Mapping[str, float], env_steps: int) -> None:
        self._may_fail("log")
        self.rows.append((env_steps, dict(numbers)))

    def close(self, *, finished: bool) -> None:
        self.closed.append(finished)
        self._may_fail("close")

    def _may_fail(self, at: str) -> None:
        if self.fails_at == at:
            raise ConnectionError("no network")


@pytest.fixture
def made(monkeypatch: Any) -> list[Recorded]:
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    monkeypatch.setattr(trackers, "KINDS", dict.fromkeys(LOGGERS, Recorded))
    return Recorded.made


def test_rows_reach_every_tracker_and_a_resumed_run_keeps_its_ids(
    made: list[Recorded], tmp_path: Path
) -> None:
    for finished in (False, True):
        own = Trackers(LOGGERS, tmp_path, CONFIG)
        for row in ROWS:
            own.log(row)
        own.close(finished=finished)
        own.close(finished=finished)
        (tmp_path / "trackers.json").write_text(json.dumps({"wandb": "a", "mlflow": "b"}))
    assert [tracker.run_id for tracker in made] == ["new", "new", "a", "b"]
    assert [tracker.closed for tracker in made] == [[False], [False], [True], [True]]
    expected = [(10, {"env_steps": 10.0, "updates": 5.0, "learner/loss": 0.5})]
    assert all(tracker.rows == expected for tracker in made)


@pytest.mark.parametrize("fails_at", ["init", "log", "close"])
def test_a_tracker_that_fails_is_dropped_with_a_warning(
    fails_at: str, made: list[Recorded], tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(Recorded, "fails_at", fails_at)
    own = Trackers(["wandb"], tmp_path, CONFIG)
    own.log(ROWS[0])
    own.log(ROWS[0])
    own.close(finished=True)
    (message,) = caplog.messages
    assert "--log wandb: ConnectionError: no network. The run goes on" in message


def test_without_a_tracker_nothing_is_written(tmp_path: Path) -> None:
    own = Trackers((), tmp_path, CONFIG)
    own.log(ROWS[0])
    own.close(finished=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", LOGGERS)
def test_one_that_is_not_installed_says_how_to_install_it(
    name: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == name else found(n))
    run = tmp_path / "run"
    assert cli.main(["train", "--log", name, "--run-dir", str(run)]) == cli.EXIT_BAD_INPUT
    error = " ".join(capsys.readouterr().err.split())
    assert f"pip install 'qvpo_rllib[{name}]'" in error
    assert not run.exists()
    with pytest.raises(ValueError, match="pip install"):
        tune_callback(name, "x")


@pytest.mark.parametrize("name", LOGGERS)
def test_a_run_is_logged_offline_and_goes_on_under_its_id(name: str, tmp_path: Path) -> None:
    """With the real packages, without a network."""
    pytest.importorskip(name)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    here = {**os.environ, "WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": store}
    run = tmp_path / "run"
    train = [sys.executable, "-m", "qvpo_rllib", "train"]
    subprocess.run(
        [*train, *TINY, "--run-dir", str(run), "--log", name], check=True, env=here, cwd=tmp_path
    )
    ids = json.loads((run / "trackers.json").read_text())
    subprocess.run(
        [*train, "--resume", str(run), "--env-steps", "120"], check=True, env=here, cwd=tmp_path
    )
    assert json.loads((run / "trackers.json").read_text()) == ids
    if name == "wandb":
        assert len(list((run / "wandb").glob(f"offline-run-*-{ids[name]}"))) == 2
        return
    from mlflow import MlflowClient

    client = MlflowClient(store)
    found = client.get_run(ids[name])
    assert found.info.status == "FINISHED"
    assert found.data.params["k_eval"] == "2"
    history = client.get_metric_history(ids[name], "evaluation/return_mean")
    assert [metric.step for metric in history] == [40, 80, 120]


@pytest.mark.parametrize("name", LOGGERS)
def test_tune_has_the_same(name: str) -> None:
    pytest.importorskip(name)
    assert type(tune_callback(name, "x")).__name__.lower() == f"{name}loggercallback"
