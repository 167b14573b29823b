"""`qvpo tune` as a researcher runs it: to the end, again, and after its driver was killed."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import start_qvpo

from qvpo_rllib import cli
from qvpo_rllib.tuning.results import read_rows, read_trials

TIMEOUT_S = 500
STEPS, INTERVAL = 1200, 200
TRAINING = """
training:
  hidden: [16]
  diffusion_steps: 2
  batch_size: 16
  warmup_steps: 100
  num_policy_samples: 4
  k_eval: 2
"""
FILE = f"""
name: killed
task: InvertedPendulum-v5
preset: quick
env_steps: {STEPS}
{TRAINING}sweep:
  grid:
    k_behavior: [1, 2, 4]
evaluation:
  interval: {INTERVAL}
  episodes: 2
resources:
  max_concurrent: 1
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    return start_qvpo("tune", *arguments, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"qvpo tune did not end within {TIMEOUT_S} s: {process.communicate()[0]}")
    return process.returncode, output


def statuses(part: Path) -> list[str]:
    return [entry["status"] for entry in read_trials(part).values()]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: Any, ray_address: str) -> tuple[Path, list[str], dict[str, Any], str]:
    """An experiment of three trials whose driver was killed, moved elsewhere and run again.

    Returns its part's directory, the command, the trials when it was killed, the second output.
    """
    directory = tmp_path_factory.mktemp("tune")
    (directory / "killed.yaml").write_text(FILE)
    command = [str(directory / "killed.yaml"), "--address", ray_address, "--storage"]
    command.append(str(directory / "results"))
    part = directory / "results" / "killed" / "qvpo"
    process = start(*command)
    deadline = time.monotonic() + TIMEOUT_S

    def half_way() -> bool:
        started = [t for t in read_trials(part).values() if t.get("env_steps")]
        return "finished" in statuses(part) and len(started) > statuses(part).count("finished")

    while not half_way():
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"no trial ended: {process.communicate()[0]}")
        time.sleep(0.02)
    process.kill()  # the driver alone, as the kernel does when memory runs out
    process.wait()
    before = read_trials(part)
    (directory / "results").rename(directory / "moved here")
    command[-1] = str(directory / "moved here")
    code, output = finish(start(*command))
    assert code == 0, output
    assert not (directory / "results").exists()
    return directory / "moved here" / "killed" / "qvpo", command, before, output


def test_every_trial_ends_after_a_kill(killed: Any) -> None:
    part, _, _, _ = killed
    assert statuses(part) == ["finished"] * 3
    for trial in read_trials(part):
        steps = [row["env_steps"] for row in read_rows(part, trial)]
        assert steps == list(range(INTERVAL, STEPS + 1, INTERVAL))


def test_no_trial_is_run_twice(killed: Any) -> None:
    """One that had ended is not touched; the others go on from a checkpoint or were waiting."""
    part, _, before, _ = killed
    after = read_trials(part)
    ended = [trial for trial, entry in before.items() if entry["status"] == "finished"]
    assert ended
    for trial in ended:
        assert after[trial] == before[trial]
        lines = (part / "results" / f"{trial}.jsonl").read_text().splitlines()
        assert len(lines) == STEPS // INTERVAL
    assert set(before) <= set(after)
    assert len(before) < 3  # one had not begun
    assert sorted(entry["config"]["k_behavior"] for entry in after.values()) == [1, 2, 4]


def test_best_and_last_checkpoint_are_kept(killed: Any) -> None:
    """Each evaluation has a checkpoint: number n is of evaluation n."""
    part = killed[0]
    for trial, entry in read_trials(part).items():
        returns = [row["evaluation/return_mean"] for row in read_rows(part, trial)]
        directory = part / "tune" / entry["directory"]
        kept = {int(path.name.split("_")[1]) for path in directory.glob("checkpoint_*")}
        assert len(returns) - 1 in kept
        assert max(returns) in [returns[number] for number in kept]


def test_a_finished_experiment_says_so_at_once(killed: Any, capsys: Any) -> None:
    part, command, _, _ = killed
    before = (part / "trials.json").read_bytes()
    assert cli.main(["tune", *command]) == 0
    assert "Finished already" in capsys.readouterr().out
    assert (part / "trials.json").read_bytes() == before


def test_another_experiment_of_that_name_is_refused(killed: Any, capsys: Any) -> None:
    part, command, _, _ = killed
    file = Path(command[0])
    text = file.read_text()
    try:
        file.write_text(text.replace("k_behavior: [1, 2, 4]", "k_behavior: [1, 8]"))
        assert cli.main(["tune", *command]) == 2
    finally:
        file.write_text(text)
    assert "other values of settings" in " ".join(capsys.readouterr().err.split())
    record = json.loads((part.parent / "experiment.json").read_text())
    assert len(record["parts"]) == 1
    assert [start["command"][:2] for start in record["starts"]] == [["qvpo", "tune"]] * 2


def test_a_trial_that_the_cluster_cannot_hold_is_said_at_the_start(
    tmp_path: Path, ray_address: str
) -> None:
    """It waits then: somebody may add nodes to a cluster that is not the command's own."""
    file = tmp_path / "large.yaml"
    large = "resources: {num_cpus: 3}\nworkers: {num_env_runners: 6}\n"
    file.write_text(f"name: large\npreset: quick\nenv_steps: 2400\n{TRAINING}{large}"
                    "evaluation: {interval: 1200}\n")  # fmt: skip
    process = start(str(file), "--storage", str(tmp_path), "--address", ray_address)
    timer = threading.Timer(TIMEOUT_S, process.kill)
    timer.start()
    assert process.stdout
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "is too small now: 9 CPU are needed, of 4. This waits" in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    timer.cancel()
    assert "one trial of qvpo: lower num_cpus" in seen[-1], seen


def test_a_full_disk_ends_the_experiment_which_goes_on_when_there_is_room(
    tmp_path: Path, qvpo: Callable[..., str], capsys: Any
) -> None:
    file, limited = tmp_path / "full.yaml", tmp_path / "limited"
    limited.touch()
    large = TRAINING.replace("[16]", "[128, 128]")
    file.write_text(
        f"name: full\ntask: environments:Limited-v0\npreset: quick\nseeds: [0, 1]\n"
        f"env_config: {{limited: {limited}}}\nenv_steps: 400\n{large}  engine: eager\n"
        "evaluation: {interval: 200, episodes: 1}\nresources: {max_concurrent: 1}\n"
    )
    command = [str(file), "--storage", str(tmp_path)]
    qvpo("tune", *command, code=1)
    part, output = tmp_path / "full" / "qvpo", capsys.readouterr().err
    assert "Traceback" not in output
    said = " ".join(output.split())
    assert "qvpo: error: [Errno 27] File too large: " in said
    assert f"Trials in '{tmp_path / 'full'}' go on from their last checkpoints" in said
    assert statuses(part) == ["failed"]  # the second would only fail too
    limited.unlink()
    output = qvpo("tune", *command)
    assert statuses(part) == ["finished"] * 2
    assert "File too large" not in output.partition("running")[2]
    for trial in read_trials(part):
        assert read_rows(part, trial)[-1]["env_steps"] == 400
