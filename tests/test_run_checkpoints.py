"""The checkpoints of a run: which are kept, when one is due, and no crash loses a whole one."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpointed_run import COMMAND, REPLAY, check_whole, commit, reopen

from qvpo_rllib.training.plan import parse_interval
from qvpo_rllib.training.run import CheckpointClock
from qvpo_rllib.training.run_directory import RunDirectory

KILLS = 20


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", {"env": "Hopper-v5", "hidden": (8, 8)}, COMMAND)


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

        names.append(run.commit_checkpoint(50_000, write).name)
        assert (run.checkpoint("last") / "text").read_text() == text
    assert names == ["000050000", "000050000-2", "000050000"]


def test_a_failed_write_changes_nothing(run: RunDirectory) -> None:
    commit(run, 3)

    def fail(directory: Path) -> None:
        (directory / "part").write_text("half")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run.commit_checkpoint(4, fail, best=4.0)
    assert check_whole(run) == 3


def test_every_file_is_flushed_once_before_the_checkpoint_has_its_name(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    directory = commit(run, 3)
    checkpoints = directory.parent
    below = [path.removeprefix(str(checkpoints)) for path in flushed]
    temporary = f"/.tmp-3-{os.getpid()}"
    files = [f"/{path.relative_to(directory)}" for path in directory.rglob("*")]
    assert sorted(below[: len(files) + 1]) == sorted([temporary + file for file in ["", *files]])
    assert below[len(files) + 1 :] == ["", ""]  # the directory's name, then the links


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


def kill_many_times(path: Path) -> None:
    """In a process of its own: forks processes that commit, and kills them. Prints what survived.

    The moments are up to four commits after the fork. On a busy machine few commits end before the
    kill: then there are more kills.
    """
    run, moments = RunDirectory(path, {}), random.Random(0)
    commit(run, 5)  # the first one took longer
    start = time.perf_counter()
    commit(run, 6)
    commit_s = time.perf_counter() - start
    survived: list[int] = []
    while len(survived) < KILLS or (survived[-1] < 6 + KILLS and len(survived) < 5 * KILLS):
        step = check_whole(run)
        parent, child = os.getpid(), os.fork()
        if child == 0:
            while os.getppid() == parent:  # which may be killed too
                step += 1
                commit(run, step)
            os._exit(0)
        time.sleep(moments.uniform(0.0, 4 * commit_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        survived.append(check_whole(reopen(run)))
    print(json.dumps(survived))


def test_kill_at_random_moments_leaves_a_whole_last_and_best(run: RunDirectory) -> None:
    commit(run, 3)
    commit(run, 4)
    run.close()  # its lock: the next process writes
    result = subprocess.run(
        [sys.executable, __file__, str(run.path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    survived = json.loads(result.stdout)
    assert len(survived) >= KILLS
    assert survived == sorted(survived)
    assert survived[-1] >= 6 + KILLS  # the children did commit between the kills


if __name__ == "__main__":
    kill_many_times(Path(sys.argv[1]))
