"""The run directory: nothing is overwritten, no row is lost, torn or repeated."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from checkpointed_run import COMMAND, REPLAY, commit, reopen
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qvpo_rllib.files import write_atomically
from qvpo_rllib.training.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", {"env": "Hopper-v5", "hidden": (8, 8)}, COMMAND)


def test_a_new_run_says_how_it_was_started(run: RunDirectory) -> None:
    assert json.loads((run.path / "config.json").read_text()) == run.config
    assert run.config == {"env": "Hopper-v5", "hidden": [8, 8]}
    (start,) = json.loads((run.path / "run.json").read_text())["starts"]
    assert start["command"] == COMMAND
    assert start["started_at"].endswith("+00:00")
    assert start["versions"]["numpy"] == np.__version__
    assert set(start["versions"]) > {"python", "torch", "ray", "gymnasium", "mujoco", "pyarrow"}
    assert start["cpu_count"] == os.cpu_count()
    assert "gpu" in start


def test_a_resumed_run_adds_its_start_and_keeps_its_configuration(run: RunDirectory) -> None:
    commit(run, 3)
    with pytest.raises(ValueError, match=f"already holds a run.*--resume {run.path}"):
        RunDirectory.create(run.path, {}, COMMAND)
    resumed = reopen(run)
    assert resumed.config == run.config
    starts = json.loads((run.path / "run.json").read_text())["starts"]
    assert [start["command"][-1] for start in starts] == ["Hopper-v5", "--resume"]


@pytest.mark.parametrize("trace", ["config.json", "metrics.jsonl", "checkpoints"])
def test_create_refuses_a_path_that_holds_a_run(tmp_path: Path, trace: str) -> None:
    (tmp_path / trace).mkdir() if trace == "checkpoints" else (tmp_path / trace).write_text("old")
    with pytest.raises(ValueError, match="already holds a run") as refusal:
        RunDirectory.create(tmp_path, {}, COMMAND)
    assert "without a last checkpoint" in str(refusal.value)
    assert "another --run-dir" in str(refusal.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [trace]
    assert trace == "checkpoints" or (tmp_path / trace).read_text() == "old"


def test_create_refuses_other_files_and_accepts_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"other files in it.*another --run-dir"):
        RunDirectory.create(tmp_path, {}, COMMAND)
    with pytest.raises(ValueError, match=r"thesis\.tex.*is a file"):
        RunDirectory.create(tmp_path / "thesis.tex", {}, COMMAND)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert RunDirectory.create(tmp_path / "empty", {}, COMMAND).metrics.rows() == []


def test_open_refuses_what_is_no_run_and_says_what_is_missing(
    tmp_path: Path, run: RunDirectory
) -> None:
    with pytest.raises(ValueError, match=r"no config\.json and no checkpoints"):
        RunDirectory.open(tmp_path / "nowhere", COMMAND)
    with pytest.raises(ValueError, match=r"no checkpoint 'last'.*is missing.*start anew"):
        reopen(run)
    commit(run, 3)
    (run.path / "config.json").write_text('{"env": ')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        reopen(run)
    (run.path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"it has no config\.json\. Give"):
        reopen(run)


def test_open_refuses_a_last_that_points_to_nothing_and_deletes_nothing(run: RunDirectory) -> None:
    commit(run, 3)
    commit(run, 4)
    run.checkpoint("last").rename(run.path / "checkpoints" / "moved")
    with pytest.raises(ValueError, match="as it points to '000000004'"):
        reopen(run)
    assert (run.path / "checkpoints" / "moved" / REPLAY).exists()
    assert run.checkpoint("best").name == "000000003"


def test_rows_come_back_as_written(run: RunDirectory) -> None:
    row = {
        "env_steps": 10,
        "loss": float("nan"),
        "q": -float("inf"),
        "task": "Hopper",
        "none": None,
    }
    run.metrics.append(row)
    run.metrics.append({"env_steps": np.int64(20), "loss": np.float32(0.5), "é": 1e-30})
    assert run.metrics.rows() == [
        {"env_steps": 10, "loss": None, "q": None, "task": "Hopper", "none": None},
        {"env_steps": 20, "loss": 0.5, "é": 1e-30},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"loss": 1.0}, r"env_steps=None.*keys are: loss"),
        ({"env_steps": 1.5}, r"env_steps=1\.5.*integer"),
        ({"env_steps": 1, "loss": [1.0]}, r"loss=\[1\.0\].*a number or a text"),
    ],
)
def test_a_bad_row_is_refused_and_not_written(
    run: RunDirectory, row: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run.metrics.append(row)
    assert run.metrics.rows() == []


@pytest.mark.parametrize("torn", ['{"env_steps": 3, "lo', '{"env_steps": 3}', "\0\0\0\n", "{"])
def test_a_torn_last_line_is_ignored_then_cut(run: RunDirectory, torn: str) -> None:
    commit(run, 3)
    for step in (1, 2):
        run.metrics.append({"env_steps": step})
    whole = (run.path / "metrics.jsonl").read_text()
    (run.path / "metrics.jsonl").write_text(whole + torn)
    assert [row["env_steps"] for row in run.metrics.rows()] == [1, 2]
    resumed = reopen(run)
    assert (run.path / "metrics.jsonl").read_text() == whole
    resumed.metrics.append({"env_steps": 4})
    assert [row["env_steps"] for row in resumed.metrics.rows()] == [1, 2, 4]


def test_a_damaged_line_in_the_middle_is_named(run: RunDirectory) -> None:
    (run.path / "metrics.jsonl").write_text('{"env_steps": 1}\ngarbage\n{"env_steps": 2}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*garbage"):
        run.metrics.rows()


def test_a_full_disk_leaves_no_half_line(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.metrics.append({"env_steps": 1})
    real_open = Path.open

    class FullDisk:
        def __init__(self, path: Path) -> None:
            self.file = real_open(path, "ab")

        def __enter__(self) -> "FullDisk":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, line: bytes) -> None:
            self.file.write(line[:7])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: FullDisk(path))
        with pytest.raises(OSError, match="No space left"):
            run.metrics.append({"env_steps": 2})
    run.metrics.append({"env_steps": 3})
    assert [row["env_steps"] for row in run.metrics.rows()] == [1, 3]


def test_truncation_on_resume_drops_only_later_rows(run: RunDirectory) -> None:
    for step in range(0, 60, 10):
        run.metrics.append({"env_steps": step, "loss": step / 10})
    run.metrics.compact()
    run.metrics.truncate_after(30)
    assert [row["env_steps"] for row in run.metrics.rows()] == [0, 10, 20, 30]
    parquet = pq.read_table(run.path / "metrics.parquet")
    assert parquet["env_steps"].to_pylist() == [0, 10, 20, 30]


def test_parquet_holds_every_key_of_every_row(run: RunDirectory) -> None:
    run.metrics.append({"env_steps": 1, "loss": 1, "phase": "warm-up"})
    run.metrics.append({"env_steps": 2, "loss": 0.5, "phase": 7, "evaluation/return_mean": 3.0})
    run.metrics.append({"env_steps": 3, "empty": None})
    table = pq.read_table(run.metrics.compact())
    assert table.to_pydict() == {
        "env_steps": [1, 2, 3],
        "loss": [1.0, 0.5, None],
        "phase": ["warm-up", "7", None],
        "evaluation/return_mean": [None, 3.0, None],
        "empty": [None, None, None],
    }
    types = [str(table.schema.field(name).type) for name in ("env_steps", "loss", "phase", "empty")]
    assert types == ["int64", "double", "string", "double"]


def test_parquet_of_no_rows_is_an_empty_table(run: RunDirectory) -> None:
    table = pq.read_table(run.metrics.compact())
    assert (table.column_names, table.num_rows) == (["env_steps"], 0)


def test_tensorboard_shows_each_number_once_even_after_a_resume(run: RunDirectory) -> None:
    with run:
        for step in (10, 20, 30):
            run.metrics.append(
                {"env_steps": step, "critic_loss": step / 4, "task": "x", "nan": np.nan}
            )
    commit(run, 21)
    with reopen(run) as resumed:
        resumed.metrics.truncate_after(20)
        resumed.metrics.append({"env_steps": 30, "critic_loss": 99.0, "updates": 5})
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["critic_loss", "updates"]
    losses = [(event.step, event.value) for event in events.Scalars("critic_loss")]
    assert losses == [(10, 2.5), (20, 5.0), (30, 99.0)]


def test_atomic_write_keeps_the_old_content_if_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "file", b"old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
