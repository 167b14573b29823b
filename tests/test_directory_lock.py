"""Two programs on one directory: the second is refused, and goes on once the first has ended."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpointed_run import CONFIG

from qvpo_rllib import cli
from qvpo_rllib.files import LOCK_FILE, DirectoryLock
from qvpo_rllib.training.plan import TrainingPlan
from qvpo_rllib.training.run_directory import RunDirectory, can_resume

WRITER = """
import sys
from pathlib import Path
from qvpo_rllib.files import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_program(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """One that writes to `directory` until it is killed, or the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdin
        assert process.stdout
        with process.stdin, process.stdout:
            assert process.stdout.readline() == "locked\n"
            yield process
    finally:
        process.kill()
        process.wait()


def contents(directory: Path) -> dict[Path, tuple[bytes, int]]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def saved_run(path: Path) -> Path:
    """A run with a checkpoint, which no program is writing to."""
    with RunDirectory.create(path, {"env": "Hopper-v5"}, ["qvpo"]) as run:
        run.commit_checkpoint(5, lambda directory: (directory / "file").touch(), best=1.0)
    return path


def test_a_second_train_is_refused_until_the_first_has_died(tmp_path: Path, capsys: Any) -> None:
    run = saved_run(tmp_path / "run")
    assert not (run / LOCK_FILE).exists()
    with another_program(run) as first:
        before = contents(run)
        assert cli.main(["train", "--resume", str(run)]) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert f"Another program is writing to {str(run)!r}: process {first.pid} on " in message
        with pytest.raises(ValueError, match="Another program"):
            RunDirectory.open(run, ["qvpo"])
        assert RunDirectory(run, {}).metrics.rows() == []  # reading goes on
        assert contents(run) == before
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert (run / LOCK_FILE).exists()
        with RunDirectory.open(run, ["qvpo"]) as resumed:
            assert f"process {os.getpid()} on " in (run / LOCK_FILE).read_text()
            assert resumed.checkpoint("last").name == "000000005"
    assert not (run / LOCK_FILE).exists()


def test_a_run_that_has_just_begun_is_not_moved_away(tmp_path: Path) -> None:
    """A second `--or-resume` finds a run without a checkpoint: its program is at work on it."""
    run = tmp_path / "run"
    RunDirectory.create(run, CONFIG, ["qvpo"]).close()
    plan = TrainingPlan.from_config(CONFIG)
    with another_program(run), pytest.raises(ValueError, match="Another program"):
        can_resume(run, plan)
    assert os.listdir(tmp_path) == ["run"]
    assert not can_resume(run, plan)
    [kept] = tmp_path.iterdir()
    assert not (kept / LOCK_FILE).exists()


def test_a_second_tune_is_refused_and_one_that_cannot_start_leaves_nothing(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def nobody(**_: Any) -> None:
        raise ConnectionError("nobody listens")

    monkeypatch.setattr("ray.init", nobody)
    file = tmp_path / "x.yaml"
    file.write_text("name: x\npreset: quick\n")
    storage = tmp_path / "some" / "where"
    command = ["tune", str(file), "--storage", str(storage), "--address", "10.0.0.1:1"]
    (storage / "x").mkdir(parents=True)
    with another_program(storage / "x"):
        before = contents(storage)
        assert cli.main(command) == 2
        assert "Another program is writing to" in " ".join(capsys.readouterr().err.split())
        assert contents(storage) == before
    assert cli.main(command) == 2
    assert "No Ray cluster could be joined" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in storage.iterdir()] == ["x"]  # it was there before
    (storage / "x").rmdir()
    storage.rmdir()
    storage.parent.rmdir()
    assert cli.main(command) == 2
    assert not storage.parent.exists()


def test_within_a_process_it_is_held_until_the_last_has_released_it(tmp_path: Path) -> None:
    first, second = DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    first.release()
    first.release()
    assert (tmp_path / LOCK_FILE).exists()
    second.release()
    assert not (tmp_path / LOCK_FILE).exists()
    with another_program(tmp_path), pytest.raises(ValueError, match="Another program"):
        DirectoryLock(tmp_path)


def test_a_file_system_without_locks_is_tolerated(
    tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with DirectoryLock(tmp_path):
        assert "has no locks (No locks available)" in caplog.text


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).mkdir()  # permissions mean nothing to root
    with pytest.raises(ValueError, match="cannot be written to"):
        DirectoryLock(tmp_path)
