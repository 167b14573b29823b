"""What the command line prints: on any terminal, to be copied, and when a disk is full."""

import errno
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qvpo_rllib import cli
from qvpo_rllib.cli.terminal import paragraph, write_anything
from qvpo_rllib.training.run_directory import RunDirectory, resume_command


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_is_readable_on_any_terminal(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qvpo_rllib", "bandit", "--help"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert "of the peaks (default 0.1" in " ".join(done.stdout.decode(encoding).split())
    assert done.stderr == b""


def test_only_what_an_encoding_lacks_is_replaced() -> None:
    for encoding, expected in (("ascii", b"w?rfel ?"), ("latin-1", b"w\xfcrfel ?")):
        buffer = io.BytesIO()
        stream = io.TextIOWrapper(buffer, encoding=encoding)
        write_anything(stream)
        print("würfel σ", file=stream, end="", flush=True)
        assert buffer.getvalue() == expected


def test_a_command_in_a_paragraph_stays_in_one_piece() -> None:
    command = resume_command(Path("/runs") / "it's here" / ("long " * 30) / "run-1")
    text = paragraph(f"qvpo: error: {'word ' * 30}`{command}`. {'word ' * 30}")
    assert f"`{command}`" in text
    assert shlex.split(command)[-1] == str(Path("/runs") / "it's here" / ("long " * 30) / "run-1")
    assert max(len(line) for line in text.splitlines() if "`" not in line) <= 100


@pytest.mark.parametrize("saved", [True, False])
def test_a_full_disk_names_the_checkpoint_to_go_on_from(
    saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "my run"

    class FullDisk:
        def __init__(self, plan: object, directory: RunDirectory, *, resume: bool) -> None:
            self.plan, self.directory, self.env_steps = plan, directory, 0

        def run(self) -> None:
            if saved:
                self.directory.commit_checkpoint(60, lambda place: (place / "x").touch())
            raise OSError(errno.ENOSPC, "No space left on device", str(path / "metrics.jsonl"))

        def close(self) -> None:
            pass

    monkeypatch.setattr("qvpo_rllib.training.run.TrainingRun", FullDisk)
    monkeypatch.setattr("qvpo_rllib.cli.train._start_ray", lambda *_: None)
    monkeypatch.setattr("qvpo_rllib.cli.train._record_placement", lambda *_: None)
    assert cli.main(["train", "--num-gpus", "0", "--run-dir", str(path)]) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in " ".join(error.split())
    assert "Traceback" not in error
    if saved:
        assert str(path / "checkpoints" / "000000060") in " ".join(error.split())
        assert f"`qvpo train --resume '{path}'`" in error
    else:
        assert "before its first checkpoint" in " ".join(error.split())
        assert not path.exists()


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "an environment's own")

    monkeypatch.setattr("qvpo_rllib.report.build.build_report", fail)
    with pytest.raises(FileNotFoundError):
        cli.main(["report", "x", "--out", "y"])
