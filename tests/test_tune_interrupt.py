"""Ctrl-C on `qvpo tune`: trials save where they are, and go on as if nothing had been."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_tune_run import TIMEOUT_S, TRAINING, finish, start

from qvpo_rllib import cli
from qvpo_rllib.algorithms import entry_of
from qvpo_rllib.checkpoints.metadata import Metadata
from qvpo_rllib.runtime.ray_private import LOOK_EVERY_S
from qvpo_rllib.training.rows import metrics_row
from qvpo_rllib.tuning.results import read_rows, read_trials
from qvpo_rllib.tuning.spec import ExperimentSpec
from qvpo_rllib.tuning.tuner import fixed_config

INTERVAL, STEPS = 150, 450  # held in step 200
FILE = f"""
name: interrupted
task: environments:Holding-v0
preset: quick
seeds: [0, 1]
env_steps: {STEPS}
{TRAINING}  engine: eager
workers:
  num_envs_per_env_runner: 1
evaluation:
  interval: {INTERVAL}
  episodes: 2
"""


def checkpoints(part: Path) -> dict[str, list[int]]:
    """The env steps of each trial's checkpoints."""
    return {
        trial: sorted(
            Metadata.read(directory).ledger["ingested"]
            for directory in (part / "tune" / entry["directory"]).glob("checkpoint_*")
        )
        for trial, entry in read_trials(part).items()
    }


def uninterrupted(file: Path) -> list[dict[str, Any]]:
    """The rows of the trial with seed 0, trained in this process."""
    algorithm = entry_of("qvpo").load()(config=fixed_config(ExperimentSpec.load(file), "qvpo"))
    rows = [metrics_row(algorithm.train()) for _ in range(STEPS // INTERVAL)]
    algorithm.stop()
    return rows


def test_trials_go_on_where_ctrl_c_stopped_them(tmp_path: Path, capsys: Any, request: Any) -> None:
    """The first command is ended with its own Ray, as in a terminal."""
    file, part = tmp_path / "x.yaml", tmp_path / "interrupted" / "qvpo"
    file.write_text(f"{FILE}env_config:\n  directory: {tmp_path}\n")
    command = [str(file), "--storage", str(tmp_path)]
    process = start(*command)
    assert process.stdout
    deadline = time.monotonic() + TIMEOUT_S
    while len(list(tmp_path.glob("held-*"))) < 2:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the trials did not get there: {process.communicate()[0]}")
        time.sleep(0.02)
    assert cli.main(["tune", *command]) == 2  # the same command twice at once
    assert f"process {process.pid} on" in " ".join(capsys.readouterr().err.split())
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group
    assert any("Interrupted: 2 trials save" in line for line in process.stdout)
    time.sleep(1.1 * LOOK_EVERY_S)
    (tmp_path / "go").touch()
    code, output = finish(process)
    assert code == 130, output
    assert "Saved. To go on, the same command again: qvpo tune" in output
    assert not (tmp_path / "interrupted" / ".lock").exists()
    assert list(checkpoints(part).values()) == [[150, 200]] * 2  # the best one, and the last
    assert {entry["status"] for entry in read_trials(part).values()} == {"running"}

    qvpo = request.getfixturevalue("qvpo")  # not before: one Ray at a time is enough
    qvpo("tune", *command)
    trials = read_trials(part)
    assert [entry["status"] for entry in trials.values()] == ["finished"] * 2
    rows = {entry["config"]["seed"]: read_rows(part, trial) for trial, entry in trials.items()}
    assert [[row["env_steps"] for row in rows[seed]] for seed in (0, 1)] == [[150, 300, 450]] * 2
    for found, expected in zip(rows[0], uninterrupted(file), strict=True):
        del found["time_total_s"], expected["time_total_s"]
        assert found == expected


def test_an_optuna_search_goes_on_with_new_settings(
    tmp_path: Path, ray_address: str, qvpo: Callable[..., str]
) -> None:
    """Trials that are made after a restart get all the settings that are no numbers too."""
    pytest.importorskip("optuna", reason="the extra `optuna` is not installed")
    file = tmp_path / "x.yaml"
    own = TRAINING.replace("  hidden: [16]\n", "").replace("warmup_steps: 100", "warmup_steps: 200")
    file.write_text(
        f"name: searched\ntask: InvertedPendulum-v5\npreset: quick\nenv_steps: 400\n{own}"
        "sweep:\n  space: {k_target: [none, 2], hidden: [[16], [8, 8]]}\n"
        "search: {method: optuna, num_samples: 3}\n"
        "evaluation: {interval: 400, episodes: 1}\nresources: {max_concurrent: 1}\n"
    )
    command = [str(file), "--storage", str(tmp_path)]
    process = start(*command, "--address", ray_address)
    assert process.stdout
    assert any(": finished" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    qvpo("tune", *command)
    trials = read_trials(tmp_path / "searched" / "qvpo").values()
    assert [entry["status"] for entry in trials] == ["finished"] * 3
    assert {entry["config"]["k_target"] for entry in trials} <= {None, 2}
