"""`qvpo tune` on bad input, its table of trials, and what `build_tuner` hands to Ray Tune."""

import argparse
import io
import re
from pathlib import Path
from typing import Any

import pytest

from qvpo_rllib import cli
from qvpo_rllib.tuning.spec import ExperimentSpec
from qvpo_rllib.tuning.table import TrialTable
from qvpo_rllib.tuning.tuner import build_tuner

OPTIONS = {
    "tune": {
        "--resume", "--smoke", "--address", "--num-samples", "--storage", "--max-concurrent",
        "--log",
    },
    "report": {"--out", "--time-actions"},
}  # fmt: skip
TRIAL = {"config": {"env": "Ant-v5", "seed": 1}, "name": "00001-Ant-v5-seed=1"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text("name: x\npreset: quick\nstorage: results\n")
    return path


def refused(capsys: Any, *arguments: str) -> str:
    """The message of a command that ends with exit code 2."""
    assert cli.main(["tune", *arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_every_option_is_known_and_named_in_the_help(capsys: Any) -> None:
    for command, options in OPTIONS.items():
        known = cli._subparser(argparse.Namespace(command=command))._option_string_actions
        assert set(known) - {"-h", "--help"} == options
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        text = capsys.readouterr().out
        assert all(re.search(rf"{option}\b", text) for option in options)


def test_bad_input_is_refused_before_anything_is_written(
    file: Path, tmp_path: Path, capsys: Any
) -> None:
    at = ["--storage", str(tmp_path / "results")]
    assert "cannot be read" in refused(capsys, str(tmp_path / "none.yaml"))
    assert "nothing to resume" in refused(capsys, str(file), "--resume", *at)
    assert "does not draw settings" in refused(capsys, str(file), "--num-samples", "3", *at)
    assert "--max-concurrent 0 is not allowed" in refused(
        capsys, str(file), "--max-concurrent", "0", *at
    )
    assert not (tmp_path / "results").exists()


def test_a_logger_that_is_not_installed_says_how_to_install_it(
    file: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        text = refused(capsys, str(file), "--log", name, "--storage", str(tmp_path / "results"))
        assert f"pip install 'qvpo_rllib[{name}]'" in text


def test_a_gpu_that_is_not_there_is_refused(file: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    file.write_text(file.read_text() + "resources:\n  num_gpus: 0.2\n")
    assert "finds no CUDA device" in refused(capsys, str(file))


def test_a_directory_with_other_files_is_left_alone(
    file: Path, tmp_path: Path, capsys: Any
) -> None:
    other = tmp_path / "results" / "x"
    other.mkdir(parents=True)
    (other / "notes.txt").write_text("mine")
    assert "holds other files" in refused(capsys, str(file), "--storage", str(other.parent))
    assert [path.name for path in other.iterdir()] == ["notes.txt"]


def test_tuner_stops_at_the_env_steps_and_scores_checkpoints(tmp_path: Path) -> None:
    spec = ExperimentSpec.from_dict(
        {"name": "x", "preset": "quick", "env_steps": 3000, "storage": str(tmp_path)}
    )
    run = build_tuner(spec)._local_tuner.get_run_config()
    assert run.stop == {"num_env_steps_sampled_lifetime": 3000}
    assert run.checkpoint_config.checkpoint_frequency == 1
    assert Path(run.storage_path) == tmp_path / "x" / "qvpo"


def test_no_more_trials_run_at_a_time_than_the_file_allows(tmp_path: Path) -> None:
    """Tune ignores its own setting beside the search algorithm that a grid uses."""
    values = {"name": "x", "preset": "quick", "seeds": [0, 1], "storage": str(tmp_path)}
    for resources, limit in (({}, 0), ({"max_concurrent": 1}, 1)):
        spec = ExperimentSpec.from_dict({**values, "resources": resources})
        search = build_tuner(spec)._local_tuner._tune_config.search_alg
        assert search.max_concurrent == limit


def test_a_member_that_copies_another_gets_a_seed_of_its_own(tmp_path: Path) -> None:
    """PBT copies the whole configuration, the seed included: both would see the same episodes."""
    spec = ExperimentSpec.from_dict(
        {
            "name": "x",
            "preset": "quick",
            "seeds": [0, 1],
            "storage": str(tmp_path),
            "sweep": {"space": {"actor_lr": {"loguniform": [1e-4, 1e-3]}}},
            "search": {"method": "pbt"},
        }
    )
    explore = build_tuner(spec)._local_tuner._tune_config.scheduler._custom_explore_fn
    copied = [explore({"seed": 0, "actor_lr": lr}) for lr in (1e-4, 2e-4, 1e-4)]
    assert [config["actor_lr"] for config in copied] == [1e-4, 2e-4, 1e-4]
    seeds = [config["seed"] for config in copied]
    assert seeds[0] == seeds[2]
    assert len({0, 1, seeds[0], seeds[1]}) == 4


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_table_shows_every_trial_on_a_terminal() -> None:
    stream = Terminal()
    table = TrialTable("sweep", ("env", "seed"), 1000, 3, stream)
    trials = {
        "a": {**TRIAL, "status": "running", "env_steps": 500, "time_total_s": 10.0,
              "evaluation/return_mean": 12.5},
        "b": {**TRIAL, "status": "failed", "config": {"env": "Ant-v5", "seed": 2}},
    }  # fmt: skip
    table.start({})
    table.stop(trials)
    text = stream.getvalue()
    for word in ("Ant-v5", "running", "failed", "500", "12.5", "50", "1 waiting"):
        assert word in text
    assert "0 of 3 trials finished, 1 running, 1 failed, 17% of the env steps" in text


def test_plain_lines_elsewhere_name_what_ended() -> None:
    stream = io.StringIO()
    table = TrialTable("sweep", ("env", "seed"), 1000, 2, stream)
    ended = {**TRIAL, "status": "finished", "env_steps": 1000, "evaluation/return_mean": 3.0}
    table.start({})
    table.refresh({"a": ended})  # too soon for another line
    table.note(ended)
    table.stop({"a": ended})
    assert stream.getvalue().splitlines() == [
        "sweep: 0 of 2 trials finished, 0% of the env steps",
        "sweep: 00001-Ant-v5-seed=1: finished, 1,000 env steps, evaluation 3",
        "sweep: 1 of 2 trials finished, 50% of the env steps",
    ]
