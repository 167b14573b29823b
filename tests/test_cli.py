"""`qvpo train` and `qvpo evaluate` as a newcomer runs them, in processes of their own."""

import argparse
import contextlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
import torch
from conftest import start_qvpo
from ray.rllib.policy.policy import Policy

from qvpo_rllib import cli
from qvpo_rllib.checkpoints.metadata import Metadata
from qvpo_rllib.checkpoints.replay_files import Segment, read_segments
from qvpo_rllib.cli.train import _interrupts_are_kept, _run_training
from qvpo_rllib.play.trained_policy import action_time_ms
from qvpo_rllib.training.rows import RETURN

TRAIN_OPTIONS = [
    "--algo", "--env", "--preset", "--seed", "--env-steps", "--num-env-runners",
    "--num-envs-per-env-runner", "--num-gpus", "--run-dir", "--resume", "--eval-interval",
    "--checkpoint-interval", "--keep-checkpoints", "--set", "--or-resume", "--address",
    "--env-config", "--log",
]  # fmt: skip
EVALUATE_OPTIONS = [
    "--episodes", "--k", "--seed", "--import", "--json", "--server", "--model", "--env",
]  # fmt: skip
EXPORT_OPTIONS = ["--name", "--version", "--onnx"]
SERVE_OPTIONS = ["--host", "--port", "--replicas", "--trust-checkpoint"]
TINY = ["--set", "warmup_steps=100", "--set", "batch_size=16", "--set", "hidden=16"]
START_TIMEOUT_S = 300


def start(*arguments: str) -> subprocess.Popen[str]:
    return start_qvpo(*arguments, env={**os.environ, "COLUMNS": "100"})


def press_ctrl_c(process: subprocess.Popen[str]) -> None:
    """A terminal signals the whole group: Ray's processes too."""
    os.killpg(process.pid, signal.SIGINT)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    try:
        output, error = process.communicate(timeout=START_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, error = process.communicate()
        pytest.fail(f"qvpo did not end within {START_TIMEOUT_S} s:\n{output}\n{error}")
    return process.returncode, output, error


def rows_of(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def evaluated_at(rows: list[dict[str, Any]]) -> list[int]:
    return [row["env_steps"] for row in rows if row.get("evaluation/return_mean") is not None]


def assert_ledger_exact(metadata: Metadata) -> None:
    """One update per env step after the warm-up of 100."""
    ledger = metadata.ledger
    assert ledger["done"] == max(0, ledger["ingested"] - 100)


def assert_rows_go_on(rows: list[dict[str, Any]]) -> None:
    steps = [row["env_steps"] for row in rows]
    assert steps == sorted(set(steps))
    for row in rows:
        assert row["updates"] == max(0, row["env_steps"] - 100)


def evaluate(capsys: Any, *arguments: str) -> dict[str, Any]:
    """`qvpo evaluate … --json` in this process."""
    assert cli.main(["evaluate", *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert isinstance(result, dict)
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> tuple[Path, tuple[int, str, str]]:
    """A run of 400 env steps, and what the command returned."""
    run = tmp_path_factory.mktemp("cli") / "run"
    process = start(
        "train", "--env", "InvertedPendulum-v5", "--preset", "quick", "--env-steps", "400",
        "--eval-interval", "200", *TINY, "--run-dir", str(run),
    )  # fmt: skip
    return run, finish(process)


# --- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["train", "evaluate", "export", "serve", "bench", "QVPO"]),
        (["train"], TRAIN_OPTIONS),
        (["evaluate"], EVALUATE_OPTIONS),
        (["export"], EXPORT_OPTIONS),
        (["serve"], SERVE_OPTIONS),
        (["bench", "serve"], ["--k", "--seconds", "--port", "--json"]),
    ],
)
def test_help_names_every_option(capsys: Any, arguments: list[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*arguments, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for word in words:
        assert re.search(rf"{re.escape(word)}\b", text), word


def test_parser_has_no_option_that_this_file_does_not_know() -> None:
    for command, options in (
        ("train", TRAIN_OPTIONS),
        ("evaluate", EVALUATE_OPTIONS),
        ("export", EXPORT_OPTIONS),
        ("serve", SERVE_OPTIONS),
    ):
        known = cli._subparser(argparse.Namespace(command=command))._option_string_actions
        assert set(known) - {"-h", "--help"} == set(options)


# --- train -------------------------------------------------------------------------------------


def test_train_ends_well_and_says_where_things_are(trained: Any) -> None:
    run, (code, output, error) = trained
    assert code == 0, error
    assert str(run) in output
    assert "400/400 env steps" in output
    assert "evaluation at 400 env steps" in output
    assert f"qvpo evaluate {run}" in output
    assert re.search(r"[\d,]+ bytes", error)  # the replay's size
    assert "Traceback" not in error


def test_run_directory_explains_itself(trained: Any) -> None:
    run, _ = trained
    config = json.loads((run / "config.json").read_text())
    assert (config["env"], config["env_steps"], config["seed"]) == ("InvertedPendulum-v5", 400, 0)
    assert config["hyperparameters"]["hidden"] == [16]
    (record,) = json.loads((run / "run.json").read_text())["starts"]
    assert record["command"][:2] == ["qvpo", "train"]
    assert record["versions"]["ray"]
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(run)
    table = pq.read_table(run / "metrics.parquet")
    assert table.column("env_steps").to_pylist() == [row["env_steps"] for row in rows]
    for name in ("last", "best"):
        metadata = Metadata.read(run / "checkpoints" / name)
        assert metadata.env == "InvertedPendulum-v5"
        assert_ledger_exact(metadata)
    assert (run / "checkpoints" / "last" / "replay").exists()


def test_train_evaluates_at_the_interval(trained: Any) -> None:
    rows = rows_of(trained[0])
    assert evaluated_at(rows) == [200, 400]
    assert rows[-1]["env_steps"] == 400
    assert_rows_go_on(rows)
    assert {"learner/critic_loss", "learner/actor_loss"} <= set(rows[-1])


# --- evaluate ----------------------------------------------------------------------------------


def test_evaluate_prints_json_alone(trained: Any) -> None:
    run, _ = trained
    code, output, error = finish(start("evaluate", str(run), "--episodes", "3", "--json"))
    assert code == 0, error
    result = json.loads(output)
    assert result["env"] == "InvertedPendulum-v5"
    assert len(result["returns"]) == len(result["lengths"]) == result["episodes"] == 3
    assert result["return_mean"] == pytest.approx(sum(result["returns"]) / 3)
    assert result["k"] == 32
    assert result["checkpoint"] == str((run / "checkpoints" / "best").resolve())


def test_evaluate_repeats_itself_for_one_seed(capsys: Any, trained: Any) -> None:
    run = str(trained[0])
    first, again, other = (
        evaluate(capsys, run, "--episodes", "3", "--seed", seed) for seed in "440"
    )
    assert first == again
    assert (first["seed"], other["seed"]) == (4, 0)


def test_evaluate_takes_k_and_a_checkpoint(capsys: Any, trained: Any) -> None:
    last = trained[0] / "checkpoints" / "last"
    result = evaluate(capsys, str(last), "--episodes", "2", "--k", "1")
    assert (result["k"], result["episodes"]) == (1, 2)
    assert result["checkpoint"] == str(last.resolve())


def test_evaluate_reads_the_metadata_once_and_encodes_no_weights(
    trained: Any, capsys: Any, monkeypatch: Any
) -> None:
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: Any) -> None:  # a hook that cannot be taken away
        if watching and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    monkeypatch.delattr("safetensors.torch.save")
    try:
        evaluate(capsys, str(trained[0]), "--episodes", "1")
    finally:
        watching = False
    assert len([name for name in opened if name.endswith("qvpo.json")]) == 1
    assert len([name for name in opened if name.endswith("policy_state.pkl")]) == 2  # and checked


def test_the_time_of_an_action_is_measured_with_a_runs_checkpoint(
    trained: Any, tmp_path: Path
) -> None:
    time_ms = action_time_ms(trained[0])
    assert time_ms is not None
    assert 0 < time_ms < 1000
    assert action_time_ms(tmp_path) is None


def test_evaluate_prints_a_table(capsys: Any, trained: Any) -> None:
    assert cli.main(["evaluate", str(trained[0]), "--episodes", "2"]) == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"episode +\d+ +return", text)) == 2
    assert re.search(r"mean +[\d.]+ +std +[\d.]+ +\(2 episodes\)", text)


# --- kill, resume and interrupt ----------------------------------------------------------------


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    trained: Any, tmp_path: Path, ray_address: str, qvpo: Callable[..., str], capsys: Any
) -> None:
    """SIGKILL at some moment of a run that saves all the time; a new process; the same bits."""
    run = tmp_path / "run"
    process = start(
        "train", "--env", "InvertedPendulum-v5", "--preset", "quick", "--env-steps", "400",
        "--eval-interval", "200", *TINY, "--run-dir", str(run),
        "--checkpoint-interval", "20", "--keep-checkpoints", "3", "--address", ray_address,
    )  # fmt: skip
    wait_for_row(run, 200, process)  # early: it is not to end before the kill
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = [d for d in (run / "checkpoints").iterdir() if d.name.isdigit()]
    assert len(kept) >= 3
    stopped_at = Metadata.read(run / "checkpoints" / "last").ledger["ingested"]
    assert 200 <= stopped_at < 400
    qvpo("train", "--resume", str(run))
    assert "new episodes" not in capsys.readouterr().err

    assert state_of(run) == state_of(trained[0])
    ours, theirs = rows_of(run), rows_of(trained[0])
    for name in ("evaluation/return_mean", "episode_return_mean", "learner/critic_loss"):
        assert ours[-1][name] == theirs[-1][name]


def state_of(run: Path) -> dict[str, Any]:
    """The last checkpoint's weights, optimisers and streams as bytes, and its replay."""
    directory = run / "checkpoints" / "last"
    metadata = Metadata.read(directory)
    policy = Policy.from_checkpoint(str(directory))["default_policy"]
    segments = [Segment(**s) for s in metadata.replay.pop("segments")]
    parts = read_segments(directory / "replay", segments, 0)
    columns = [torch.cat(column).numpy().tobytes() for column in zip(*parts, strict=True)]
    learner = io.BytesIO()
    torch.save(policy.learner.state_dict(), learner)
    return {
        "learner": learner.getvalue(),
        "transitions": columns,
        "ledger": metadata.ledger,
        "replay": metadata.replay,
    }


def wait_for_row(run: Path, env_steps: int, process: subprocess.Popen[str]) -> None:
    """Until the run has written a row beyond `env_steps`."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not any(row["env_steps"] > env_steps for row in rows_of(run)):
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"no row beyond {env_steps}: {process.communicate()}")
        time.sleep(0.01)


def test_resume_interrupt_and_resume(trained: Any, capsys: Any, qvpo: Callable[..., str]) -> None:
    run, _ = trained
    before = rows_of(run)
    process = start("train", "--resume", str(run), "--env-steps", "1000000")
    wait_for_row(run, 420, process)
    press_ctrl_c(process)
    code, output, error = finish(process)
    assert code == 130, error
    assert f"qvpo train --resume {run}" in output
    assert "Traceback" not in error

    rows = rows_of(run)
    assert rows[: len(before)] == before
    assert_rows_go_on(rows)
    stopped_at = rows[-1]["env_steps"]
    metadata = Metadata.read(run / "checkpoints" / "last")
    assert metadata.ledger["ingested"] >= stopped_at > 400
    assert_ledger_exact(metadata)
    last = str(run / "checkpoints" / "last")
    assert len(evaluate(capsys, last, "--episodes", "1")["returns"]) == 1

    end = metadata.ledger["ingested"] // 200 * 200 + 200
    qvpo("train", "--resume", str(run), "--env-steps", str(end))
    rows = rows_of(run)
    assert_rows_go_on(rows)
    assert rows[-1]["env_steps"] == end
    assert evaluated_at(rows) == list(range(200, end + 1, 200))
    assert_ledger_exact(Metadata.read(run / "checkpoints" / "last"))
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 3


@pytest.mark.parametrize(("done", "says"), [(400, True), (399, False)])
def test_a_run_that_had_ended_says_how_to_take_it_on(done: int, says: bool, capsys: Any) -> None:
    plan = SimpleNamespace(env_steps=400, num_env_runners=0)
    directory = SimpleNamespace(path=Path("run"))
    training = SimpleNamespace(
        plan=plan, directory=directory, env_steps=done, best=1.0, last=None, run=lambda: None
    )
    assert _run_training(cast(Any, training)) == 0
    assert ("--env-steps N takes it on to N." in capsys.readouterr().out) == says


def test_fewer_env_steps_than_are_done_are_refused(trained: Any, capsys: Any) -> None:
    run, _ = trained
    before = (run / "config.json").read_bytes()
    assert cli.main(["train", "--resume", str(run), "--env-steps", "300"]) == 2
    assert re.search(r"--env-steps 300 .*has done \d+ env\s", capsys.readouterr().err)
    assert (run / "config.json").read_bytes() == before


def test_sigterm_does_not_wait_for_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_address: str, qvpo: Callable[..., str]
) -> None:
    """As on a node that is taken away; the evaluation is made when the run goes on."""
    monkeypatch.setenv("EPISODE_LENGTH", "1000000000")
    run = tmp_path / "run"
    process = start(
        "train", "--env", "environments:Lasting-v0", "--preset", "quick", "--env-steps", "40",
        "--eval-interval", "20", *TINY, "--run-dir", str(run), "--address", ray_address,
    )  # fmt: skip
    wait_for_row(run, 15, process)  # the next one comes with the evaluation
    time.sleep(2)
    process.terminate()
    code, output, error = finish(process)
    assert code == 130, error
    assert f"qvpo train --resume {run}" in output
    assert Metadata.read(run / "checkpoints" / "last").ledger["ingested"] == 20
    assert evaluated_at(rows_of(run)) == []

    monkeypatch.setenv("EPISODE_LENGTH", "5")
    qvpo("train", "--resume", str(run))
    assert evaluated_at(rows_of(run)) == [20, 40]
    assert rows_of(run)[-1][RETURN] == 5.0
    assert (run / "checkpoints" / "best").resolve() == (run / "checkpoints" / "last").resolve()


def test_interrupt_before_anything_is_saved_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("train", "--run-dir", str(run))
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (run / "config.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    press_ctrl_c(process)
    code, output, error = finish(process)
    assert code == 130, error
    assert "Traceback" not in error
    assert not (run / "checkpoints" / "last").exists()
    assert "Saved" not in output
    assert "--resume" not in output


def test_an_interrupt_that_a_library_swallows_still_counts() -> None:
    """As an import or Ray's start may do."""
    before = signal.getsignal(signal.SIGINT)
    went_on = []

    def start_up() -> None:
        with _interrupts_are_kept():
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            went_on.append(True)

    with pytest.raises(KeyboardInterrupt):
        start_up()
    assert went_on
    assert signal.getsignal(signal.SIGINT) is before


# --- failures ----------------------------------------------------------------------------------


def test_non_finite_observation_ends_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, qvpo: Callable[..., str], capsys: Any
) -> None:
    """The environment returns a NaN at its 70th step; the run saves every 20 steps."""
    run = tmp_path / "run"
    env = "environments:LateNan-v0"
    qvpo(
        "train", "--env", env, "--preset", "quick", "--env-steps", "400", "--eval-interval", "20",
        "--num-envs-per-env-runner", "1", *TINY, "--run-dir", str(run), code=1,
    )  # fmt: skip
    error = capsys.readouterr().err
    message = " ".join(error.split())
    assert f"{env} (worker 0, environment 0): non-finite observation at step 4 " in message
    assert "Traceback" not in error
    assert Metadata.read(run / "checkpoints" / "last").ledger["ingested"] == 60
    assert rows_of(run)[-1]["env_steps"] < 70


def test_bad_input_has_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, output, error = finish(start("train", "--set", "k_target=0", "--run-dir", str(run)))
    assert (code, output) == (2, "")
    assert error.startswith("qvpo: error: k_target=0 is not allowed")
    assert len(error.strip().splitlines()) <= 3
    assert not run.exists()


def test_the_packages_warnings_are_plain_text_on_standard_error(capsys: Any) -> None:
    cli._quiet()
    cli._quiet()
    logging.getLogger("qvpo_rllib.some.module").warning("Interrupted: %d trials", 2)
    logging.getLogger("qvpo_rllib.some.module").debug("a detail")
    assert capsys.readouterr().err == "Interrupted: 2 trials\n"


def test_modules_here_are_found_alike_but_not_for_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "policy.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    for first in ("", "/somewhere"):  # as `python -m` and `qvpo` begin
        for arguments, found in (
            (["train"], True),
            (["evaluate", "."], False),
            (["evaluate", ".", "--import", "my_envs"], True),
            (["export", ".", "out"], False),
        ):
            monkeypatch.setattr(sys, "path", [first, *sys.path])
            cli._import_from_here(cli.build_parser().parse_args(arguments))
            assert (here in sys.path, "" in sys.path) == (found, False)


def test_a_handler_of_a_library_repeats_no_message(capfd: Any) -> None:
    """As absl adds one when dm_control is imported; warnings of others are still shown."""
    program = """
import logging
from qvpo_rllib import cli
cli._quiet()
logging.basicConfig()
logging.getLogger("qvpo_rllib.x").warning("ours")
logging.getLogger("other").warning("theirs")
logging.getLogger("other").info("hidden")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert capfd.readouterr().err.split() == ["ours", "theirs"]
