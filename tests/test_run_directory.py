"""The run directory: nothing is overwritten, nothing repeats, and no crash loses a checkpoint."""

import hashlib
import inspect
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qvpo_rllib.experiments.checkpoint_clock import CheckpointClock
from qvpo_rllib.experiments.plan import parse_interval
from qvpo_rllib.experiments.run_directory import RunDirectory, write_atomically

COMMAND = ["qvpo", "train", "--env", "Hopper-v5"]
REPLAY = "replay.arrow"


def prune(directory: Path) -> None:
    (directory / REPLAY).unlink(missing_ok=True)


def commit(run: RunDirectory, step: int) -> Path:
    """A checkpoint that says which was the best when it was saved, with a checksum of its data."""
    best_step = step - step % 3

    def write(directory: Path) -> None:
        data = step.to_bytes(8, "little") * 5000
        (directory / REPLAY).write_bytes(data)
        (directory / "weights").mkdir()
        (directory / "weights" / "actor").write_bytes(data)
        state = {"step": step, "best_step": best_step, "sha": hashlib.sha256(data).hexdigest()}
        (directory / "state.json").write_text(json.dumps(state))

    return run.commit_checkpoint(step, write, best=step == best_step, prune=prune)


# Commits checkpoints as fast as it can, until it is killed. It imports little, to start fast.
COMMITTING_PROCESS = f"""
import hashlib, json, sys
from pathlib import Path
from qvpo_rllib.experiments.run_directory import RunDirectory

REPLAY = {REPLAY!r}

{inspect.getsource(prune)}
{inspect.getsource(commit)}
run = RunDirectory(Path(sys.argv[1]), {{}})
print("ready", flush=True)
step = int(sys.argv[2])
while True:
    step += 1
    commit(run, step)
"""


def check_whole(run: RunDirectory) -> int:
    """Both names point to whole checkpoints that agree, and nothing else is kept. `last`'s step."""
    last, best = run.checkpoint("last"), run.checkpoint("best")
    states = {}
    for name, directory in (("last", last), ("best", best)):
        states[name] = json.loads((directory / "state.json").read_text())
        data = (directory / "weights" / "actor").read_bytes()
        assert hashlib.sha256(data).hexdigest() == states[name]["sha"]
    assert (last / REPLAY).read_bytes() == (last / "weights" / "actor").read_bytes()
    assert states["best"]["step"] == states["last"]["best_step"]
    kept = {entry.name for entry in (run.path / "checkpoints").iterdir()}
    assert kept == {"last", "best", last.name, best.name}
    return int(states["last"]["step"])


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", {"env": "Hopper-v5", "hidden": (8, 8)}, COMMAND)


def reopen(run: RunDirectory) -> RunDirectory:
    return RunDirectory.open(run.path, [*COMMAND, "--resume"])


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
    resumed = reopen(run)
    assert resumed.config == run.config
    starts = json.loads((run.path / "run.json").read_text())["starts"]
    assert [start["command"][-1] for start in starts] == ["Hopper-v5", "--resume"]


@pytest.mark.parametrize("trace", ["config.json", "metrics.jsonl", "checkpoints"])
def test_create_refuses_a_path_that_holds_a_run(tmp_path: Path, trace: str) -> None:
    (tmp_path / trace).mkdir() if trace == "checkpoints" else (tmp_path / trace).write_text("old")
    with pytest.raises(ValueError, match="already holds a run") as refusal:
        RunDirectory.create(tmp_path, {}, COMMAND)
    assert f"--resume {tmp_path}" in str(refusal.value)
    assert "--run-dir" in str(refusal.value)
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
    assert RunDirectory.create(tmp_path / "empty", {}, COMMAND).rows() == []


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
    run.append(row)
    run.append({"env_steps": np.int64(20), "loss": np.float32(0.5), "é": 1e-30})
    assert run.rows() == [
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
        run.append(row)
    assert run.rows() == []


@pytest.mark.parametrize("torn", ['{"env_steps": 3, "lo', '{"env_steps": 3}', "\0\0\0\n", "{"])
def test_a_torn_last_line_is_ignored_then_cut(run: RunDirectory, torn: str) -> None:
    commit(run, 3)
    for step in (1, 2):
        run.append({"env_steps": step})
    whole = (run.path / "metrics.jsonl").read_text()
    (run.path / "metrics.jsonl").write_text(whole + torn)
    assert [row["env_steps"] for row in run.rows()] == [1, 2]
    resumed = reopen(run)
    assert (run.path / "metrics.jsonl").read_text() == whole
    resumed.append({"env_steps": 4})
    assert [row["env_steps"] for row in resumed.rows()] == [1, 2, 4]


def test_a_damaged_line_in_the_middle_is_named(run: RunDirectory) -> None:
    (run.path / "metrics.jsonl").write_text('{"env_steps": 1}\ngarbage\n{"env_steps": 2}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*garbage"):
        run.rows()


def test_a_full_disk_leaves_no_half_line(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.append({"env_steps": 1})
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
            run.append({"env_steps": 2})
    run.append({"env_steps": 3})
    assert [row["env_steps"] for row in run.rows()] == [1, 3]


def test_truncation_on_resume_drops_only_later_rows(run: RunDirectory) -> None:
    for step in range(0, 60, 10):
        run.append({"env_steps": step, "loss": step / 10})
    run.compact()
    run.truncate_after(30)
    assert [row["env_steps"] for row in run.rows()] == [0, 10, 20, 30]
    parquet = pq.read_table(run.path / "metrics.parquet")
    assert parquet["env_steps"].to_pylist() == [0, 10, 20, 30]


def test_parquet_holds_every_key_of_every_row(run: RunDirectory) -> None:
    run.append({"env_steps": 1, "loss": 1, "phase": "warm-up"})
    run.append({"env_steps": 2, "loss": 0.5, "phase": 7, "evaluation/return_mean": 3.0})
    run.append({"env_steps": 3, "empty": None})
    table = pq.read_table(run.compact())
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
    table = pq.read_table(run.compact())
    assert (table.column_names, table.num_rows) == (["env_steps"], 0)


def test_tensorboard_shows_each_number_once_even_after_a_resume(run: RunDirectory) -> None:
    with run:
        for step in (10, 20, 30):
            run.append({"env_steps": step, "critic_loss": step / 4, "task": "x", "nan": np.nan})
    commit(run, 21)
    with reopen(run) as resumed:
        resumed.truncate_after(20)
        resumed.append({"env_steps": 30, "critic_loss": 99.0, "updates": 5})
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["critic_loss", "updates"]
    losses = [(event.step, event.value) for event in events.Scalars("critic_loss")]
    assert losses == [(10, 2.5), (20, 5.0), (30, 99.0)]


def test_names_are_relative_links_and_only_what_they_name_is_kept(run: RunDirectory) -> None:
    assert commit(run, 3).name == "000000003"
    assert run.checkpoint("last") == run.checkpoint("best")
    for step in (4, 5):
        commit(run, step)
    assert os.readlink(run.path / "checkpoints" / "last") == "000000005"
    assert os.readlink(run.path / "checkpoints" / "best") == "000000003"
    assert check_whole(run) == 5
    assert not (run.checkpoint("best") / REPLAY).exists()
    moved = run.path.rename(run.path.with_name("moved"))
    assert check_whole(RunDirectory.open(moved, COMMAND)) == 5


def test_the_newest_are_kept_as_many_as_asked_for(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {"keep_checkpoints": 3}, COMMAND)
    for step in (3, 4, 5, 7, 8):
        commit(run, step)
    (run.path / "checkpoints" / "000000009").mkdir()  # a crash before `last` was re-pointed
    for resumed in (run, reopen(run)):
        resumed._clean_checkpoints()
        kept = {entry.name for entry in (run.path / "checkpoints").iterdir()}
        assert kept == {"last", "best", "000000003", "000000005", "000000007", "000000008"}
    assert not (run.path / "checkpoints" / "000000003" / REPLAY).exists()
    assert (run.path / "checkpoints" / "000000005" / REPLAY).exists()


def test_a_checkpoint_is_due_by_env_steps_or_by_minutes() -> None:
    by_steps, by_time = CheckpointClock(100, None), CheckpointClock(None, 2.0)
    never = CheckpointClock(None, None)
    for clock in (by_steps, by_time, never):
        clock.saved(150, 1000.0)
    steps_and_times = [(199, 1119.0), (200, 1119.0), (199, 1120.0), (650, 9999.0)]
    assert [by_steps.is_due(*at) for at in steps_and_times] == [False, True, False, True]
    assert [by_time.is_due(*at) for at in steps_and_times] == [False, False, True, True]
    assert not any(never.is_due(*at) for at in steps_and_times)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        (None, (None, None)),
        ("20000", (20000, None)),
        ("10min", (None, 10.0)),
        ("0.5min", (None, 0.5)),
    ],
)
def test_an_interval_is_env_steps_or_minutes(
    text: str | None, meaning: tuple[int | None, float | None]
) -> None:
    assert parse_interval(text) == meaning


@pytest.mark.parametrize("text", ["", "0", "0min", "1.5", "-3", "10 min", "min", "1h", "1e5"])
def test_an_interval_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--checkpoint-interval .* env steps, such as 20000"):
        parse_interval(text)


def test_the_same_step_saved_twice_replaces_the_first(run: RunDirectory) -> None:
    names = []
    for text in "abc":

        def write(directory: Path, text: str = text) -> None:
            (directory / "text").write_text(text)

        names.append(run.commit_checkpoint(50_000, write, best=False).name)
        assert (run.checkpoint("last") / "text").read_text() == text
    assert names == ["000050000", "000050000-2", "000050000"]


def test_a_failed_write_changes_nothing(run: RunDirectory) -> None:
    commit(run, 3)

    def fail(directory: Path) -> None:
        (directory / "part").write_text("half")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run.commit_checkpoint(4, fail, best=True)
    assert check_whole(run) == 3


def test_open_cleans_leftovers_and_keeps_what_is_not_its_own(run: RunDirectory) -> None:
    commit(run, 3)
    checkpoints = run.path / "checkpoints"
    (checkpoints / ".tmp-9-123").mkdir()
    (checkpoints / ".tmp-9-123" / "part").write_text("half")
    (checkpoints / ".tmp-link-last").symlink_to("000000009")
    (checkpoints / "000000009").mkdir()
    (checkpoints / "my-favourite").mkdir()
    reopen(run)
    kept = {entry.name for entry in checkpoints.iterdir()}
    assert kept == {"last", "best", "000000003", "my-favourite"}


def test_a_copy_whose_links_became_directories_can_go_on(run: RunDirectory) -> None:
    commit(run, 3)
    checkpoints = run.path / "checkpoints"
    (checkpoints / "last").unlink()
    (checkpoints / "000000003").rename(checkpoints / "last")
    resumed = reopen(run)
    assert (resumed.checkpoint("last") / REPLAY).exists()
    commit(resumed, 6)
    assert check_whole(resumed) == 6


def test_checkpoint_knows_two_names(run: RunDirectory) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint 'newest'.*'last' or 'best'"):
        run.checkpoint("newest")
    with pytest.raises(ValueError, match="no checkpoint 'best'"):
        run.checkpoint("best")


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


@pytest.mark.parametrize("step", [6, 7], ids=["best", "not best"])
def test_a_crash_before_any_single_file_operation_keeps_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    class Crash(BaseException):
        pass

    survivors = set()
    for crash_at in itertools.count():
        run = RunDirectory.create(tmp_path / str(crash_at), {}, COMMAND)
        commit(run, 3)
        commit(run, 4)
        if step == 7:
            commit(run, 6)
        countdown = itertools.count(crash_at, -1)
        with monkeypatch.context() as patch:
            for name in ("mkdir", "fsync", "rename", "symlink", "replace", "unlink", "rmdir"):
                real = getattr(os, name)

                def crashing(*args, _real=real, _countdown=countdown, **kwargs):  # type: ignore[no-untyped-def]
                    if next(_countdown) <= 0:
                        raise Crash
                    return _real(*args, **kwargs)

                patch.setattr(os, name, crashing)
            try:
                commit(run, step)
                crashed = False
            except Crash:
                crashed = True
        if not crashed:
            break
        survivors.add(check_whole(reopen(run)))
    assert crash_at >= 10  # as many operations, at least, were interrupted
    assert survivors == {4 if step == 6 else 6, step}


def test_kill_at_random_moments_leaves_a_whole_last_and_best(run: RunDirectory) -> None:
    commit(run, 3)
    commit(run, 4)
    moments = random.Random(0)
    step = 4
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", COMMITTING_PROCESS, str(run.path), str(step)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(moments.uniform(0.0, 0.05))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        reached = check_whole(reopen(run))
        assert reached >= step
        step = reached
    assert step > 20  # the children did commit between the kills
