"""Runs that were damaged, moved or changed by hand: refused in one paragraph, or gone on with."""

import errno
import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from checkpointed_run import COMMAND, REPLAY, commit, reopen
from made_up_results import make_results
from test_bad_input import assert_refused
from test_directory_lock import contents

from qvpo_rllib import cli
from qvpo_rllib.checkpoints.metadata import Metadata
from qvpo_rllib.files import LOCK_FILE, DirectoryLock
from qvpo_rllib.play.trained_policy import find_checkpoint
from qvpo_rllib.training import run as training_run
from qvpo_rllib.training.plan import TrainingPlan, make_plan
from qvpo_rllib.training.run_directory import RunDirectory, can_resume
from qvpo_rllib.tuning.experiment import Experiment
from qvpo_rllib.tuning.ledger import TrialLedger
from qvpo_rllib.tuning.spec import ExperimentSpec
from qvpo_rllib.tuning.tune_state import callbacks_of

ENV = "InvertedPendulum-v5"
NEWER = ("frame_skip", "wrappers", "critic", "n_step")  # options that came later
ROW = '{"env_steps": 5, "evaluation/return_mean": 1.0}\n'


@pytest.fixture(scope="module")
def plan() -> TrainingPlan:
    return make_plan(
        env=ENV,
        preset="quick",
        seed=0,
        env_steps=100,
        eval_interval=50,
        num_env_runners=0,
        num_envs_per_env_runner=1,
        num_gpus=0,
        settings=[],
    )


def metadata(plan: TrainingPlan, **values: Any) -> Metadata:
    return Metadata(
        **{
            "algorithm": "QVPO",
            "env": ENV,
            "env_config": {},
            "shapes": [4, 1],
            "action_box": [[-3.0], [3.0]],
            "seed": 0,
            "hyperparameters": dict(plan.hyperparameters),
            "fixed_by_checkpoint": [],
            "ledger": {"ingested": 5, "done": 0},
            **values,
        }
    )


@pytest.fixture
def run(plan: TrainingPlan, tmp_path: Path) -> Path:
    """A run with a checkpoint that passes every check; nothing could be trained from it."""
    path = tmp_path / "a run"
    with RunDirectory.create(path, plan.to_dict(), ["qvpo"]) as directory:
        directory.commit_checkpoint(5, metadata(plan).write, best=1.0)
    (path / "metrics.jsonl").write_text(ROW)
    return path


def without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def a_directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def holds(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text)


DAMAGED: list[tuple[str, Callable[[Path], Any], list[str]]] = [
    ("config.json", holds("[]"), ["it is []", "must be an object", "Restore"]),
    ("config.json", holds('{"algo": "qv'), ["Unterminated", "Restore that file"]),
    ("config.json", holds("[" * 100_000), ["recursion", "Restore that file"]),
    ("config.json", holds(""), ["config.json is damaged"]),
    ("config.json", a_directory, ["Is a directory"]),
    ("run.json", holds("[]"), ["it is []", "must be an object", "Delete it"]),
    ("run.json", holds('{"starts": 3}'), ["'starts', which is 3", "must be a list"]),
    ("run.json", holds('{"starts": ["'), ["Unterminated", "Delete it"]),
    ("metrics.jsonl", holds('{"loss": 1}\n' + ROW), ["Line 1 of", "env_steps", "Delete the line"]),
    ("metrics.jsonl", holds('{"env_steps": "x"}\n' + ROW), ["Line 1 of", "Delete the line"]),
    ("metrics.jsonl", holds('{"env_steps": 1, "x": []}\n' + ROW), ["Line 1 of"]),
    ("metrics.jsonl", a_directory, ["is not a file", "Move it away"]),
    ("metrics.parquet", a_directory, ["is not a file", "Move it away"]),
    ("tensorboard", holds("x"), ["is not a directory", "Move it away"]),
    ("checkpoints/000000005/best.json", holds("high"), ["best.json is damaged"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGED)
def test_a_damaged_run_is_not_resumed_and_not_changed(
    run: Path, capsys: Any, name: str, damage: Callable[[Path], Any], words: list[str]
) -> None:
    damage(run / name)
    before = contents(run)
    assert_refused(capsys, ["train", "--resume", str(run)], [Path(name).name, *words])
    assert contents(run) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [("env_steps", "many"), ("keep_checkpoints", "3"), ("hyperparameters", []), ("num_gpus", None)],
)
def test_a_configuration_with_a_value_of_another_type_is_refused(
    run: Path, capsys: Any, field: str, value: object
) -> None:
    config = json.loads((run / "config.json").read_text()) | {field: value}
    (run / "config.json").write_text(json.dumps(config))
    words = ["no training plan", f"{field}={value!r}", "Restore that file"]
    assert_refused(capsys, ["train", "--resume", str(run)], words)


@pytest.mark.parametrize("outside", ["../../elsewhere", "/", ".", "best"])
def test_a_last_that_points_elsewhere_is_refused_with_the_command_that_mends_it(
    run: Path, capsys: Any, outside: str
) -> None:
    last = run / "checkpoints" / "last"
    last.unlink()
    last.symlink_to(outside)
    if outside == "best":  # which is a name of a checkpoint, and as good as its number
        assert RunDirectory.open(run, ["qvpo"]).checkpoint("last").name == "000000005"
        return
    mend = shlex.join(["ln", "-sfn", "000000005", str(last)])
    assert run.name == "a run"  # a path that has to be quoted, and is not broken into lines
    assert cli.main(["train", "--resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert "none of the run's checkpoints" in " ".join(error.split())
    assert f"`{mend}`" in error
    assert os.system(mend) == 0
    assert RunDirectory.open(run, ["qvpo"]).checkpoint("last").name == "000000005"


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_report_refuses_a_damaged_run(run: Path, tmp_path: Path, capsys: Any, name: str) -> None:
    (run / name).write_text("[]\n[]\n")
    assert_refused(capsys, ["report", str(run), "--out", str(tmp_path / "out")], [name, "damaged"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("experiment.json", "[]", ["experiment.json is damaged", "Restore it"]),
        ("experiment.json", '{"starts": [], "spec": {"', ["experiment.json is damaged"]),
        ("qvpo/trials.json", '{"trials": {"a": 3}}', ["trials.json is damaged", "'trials' is 3"]),
        ("qvpo/trials.json", '{"trials": {"a": {}}}', ["lacks name, directory, config, status"]),
    ],
)
def test_report_and_tune_refuse_a_damaged_experiment(
    tmp_path: Path, capsys: Any, name: str, content: str, words: list[str]
) -> None:
    values = {"name": "x", "task": ENV, "preset": "quick", "seeds": [0]}
    results = make_results(tmp_path / "results", values, lambda config, share: share)
    (results / name).write_text(content)
    file = tmp_path / "x.yaml"
    file.write_text(json.dumps(values))
    for command in (
        ["report", str(results), "--out", str(tmp_path / "out")],
        ["tune", str(file), "--storage", str(tmp_path / "results")],
    ):
        assert_refused(capsys, command, words)


def test_a_line_cut_short_is_dropped_with_a_note(run: Path, caplog: Any) -> None:
    (run / "metrics.jsonl").write_text(ROW + ROW[:20])
    with RunDirectory.open(run, ["qvpo"]) as resumed:
        assert len(resumed.metrics.rows()) == 1
    assert "cut its last line short; it is dropped" in caplog.text
    assert (run / "metrics.jsonl").read_text() == ROW


# --- the best ------------------------------------------------------------------------------------


def history(run: RunDirectory) -> training_run.TrainingRun:
    """A run that has read what was before it, and could not train."""
    resumed = object.__new__(training_run.TrainingRun)
    resumed.directory = run
    resumed._read_history()
    return resumed


def test_a_checkpoint_says_how_good_it_was_whatever_became_of_the_metrics(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    with RunDirectory.open(run, ["qvpo"]) as resumed:
        assert resumed.best_return() == history(resumed).best == 1.0
    shutil.rmtree(run / "checkpoints" / "best", ignore_errors=True)
    (run / "checkpoints" / "best").unlink()
    assert RunDirectory(run, {}).best_return() == -float("inf")


def test_a_last_that_was_set_back_does_not_replace_a_better_one(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {"keep_checkpoints": 3}, COMMAND)
    commit(run, 3)
    commit(run, 6)  # each the best so far
    (run.path / "checkpoints" / "last").unlink()
    (run.path / "checkpoints" / "last").symlink_to("000000003")
    resumed = reopen(run)
    assert resumed.checkpoint("last").name == "000000003"
    assert resumed.checkpoint("best").name == "000000006"


def test_a_crash_before_best_was_pointed_to_is_mended(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {"keep_checkpoints": 3}, COMMAND)
    commit(run, 3)
    commit(run, 6)
    (run.path / "checkpoints" / "best").unlink()
    (run.path / "checkpoints" / "best").symlink_to("000000003")
    assert reopen(run).checkpoint("best").name == "000000006"


def test_options_changed_by_hand_are_said(plan: TrainingPlan, caplog: Any) -> None:
    saved = metadata(plan)
    changed = metadata(plan, seed=7, hyperparameters={**plan.hyperparameters, "tau": 0.5})
    kind = plan.algorithm.hyperparameters
    training_run._say_what_has_changed(saved, Metadata(**asdict(saved)), kind)
    older = metadata(plan, hyperparameters=without(plan.hyperparameters, *NEWER))
    training_run._say_what_has_changed(older, saved, kind)
    assert not caplog.text
    training_run._say_what_has_changed(saved, changed, kind)
    assert "seed=7 (was 0), tau=0.5 (was 0.02)" in caplog.text


def test_a_run_begun_by_an_earlier_version_is_gone_on_with(
    plan: TrainingPlan, tmp_path: Path
) -> None:
    """One that knew neither some options nor some of a run's settings."""
    now = plan.to_dict()
    before = without(now, "log", "env_config", "keep_checkpoints")
    before["hyperparameters"] = without(now["hyperparameters"], *NEWER)
    with RunDirectory.create(tmp_path / "run", before, COMMAND) as run:
        commit(run, 5)
    assert TrainingPlan.from_config(before).hyperparameters == now["hyperparameters"]
    assert can_resume(run.path, plan)
    changed = {**plan.hyperparameters, "frame_skip": 2}
    with pytest.raises(ValueError, match="other values of hyperparameters"):
        can_resume(run.path, replace(plan, hyperparameters=changed))


# --- file systems --------------------------------------------------------------------------------


def test_without_symbolic_links_a_file_names_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    run = RunDirectory.create(tmp_path / "run", {"keep_checkpoints": 1}, COMMAND)
    for step in (3, 4, 5):
        commit(run, step)
    checkpoints = run.path / "checkpoints"
    assert (checkpoints / "last").read_text() == "000000005\n"
    (checkpoints / ".tmp-link-last").write_text("00000")  # of a crash
    resumed = reopen(run)
    assert resumed.checkpoint("last").name == "000000005"
    assert resumed.checkpoint("best").name == "000000003"
    kept = {entry.name for entry in checkpoints.iterdir()}
    assert kept == {"last", "best", "000000003", "000000005"}
    assert (resumed.checkpoint("last") / REPLAY).exists()
    best = (checkpoints / "000000003").resolve()
    assert find_checkpoint(run.path) == find_checkpoint(checkpoints / "best") == best


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_lock_never_writes_into_a_file_of_something_else(tmp_path: Path, link: Any) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "run").mkdir()
    link(precious, tmp_path / "run" / LOCK_FILE)
    with pytest.raises(ValueError, match=r"\.lock"):
        DirectoryLock(tmp_path / "run")
    assert precious.read_text() == "precious"
    assert (tmp_path / "run" / LOCK_FILE).exists()


def test_nothing_of_ours_in_an_experiment_knows_where_it_is(tmp_path: Path) -> None:
    values = {"name": "x", "task": ENV, "preset": "quick", "seeds": [0]}
    spec = ExperimentSpec.from_dict({**values, "storage": str(tmp_path / "old")})
    experiment = Experiment(spec)
    experiment._record(experiment.parts)
    experiment._fresh(experiment.parts[0], [])
    state = experiment.directory / "qvpo" / "tune" / "experiment_state-2026.json"
    state.write_text('{"trial_data": [], "runner_data": {}}')
    assert "old" not in (experiment.directory / "experiment.json").read_text()
    (tmp_path / "old").rename(tmp_path / "new")
    moved = Experiment(ExperimentSpec.from_dict({**values, "storage": str(tmp_path / "new")}))
    tuner = moved._restored(moved.parts[0])
    [ledger] = [c for c in callbacks_of(tuner) if isinstance(c, TrialLedger)]
    assert ledger.directory == tmp_path / "new" / "x" / "qvpo"
    assert "old" not in str(ledger.__getstate__())
    assert os.listdir(tmp_path) == ["new"]
