"""`ray job submit` on two nodes with token authentication, as on a cluster."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from ray_nodes import HEAD_IP, RAY, SECOND_IP, RayNodes, ray_nodes

from qvpo_rllib.tuning.results import FINISHED, read_trials

ROOT = Path(__file__).parents[1]
TRAIN = [
    "python", "cluster/submit.py", "train", "--env", "InvertedPendulum-v5",
    "--num-env-runners", "2", "--env-steps", "320", "--eval-interval", "160",
    "--run-dir", "runs/two", "--set", "warmup_steps=100", "--set", "batch_size=16",
    "--set", "hidden=16",
]  # fmt: skip

SWEEP = "name: mine\ntask: InvertedPendulum-v5\npreset: quick\nseeds: [3]\nenv_steps: 5000\n"


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes() as started:
        home = started.directory / "home"
        home.mkdir()
        started.environment["HOME"] = str(home)
        started.start_head(num_cpus=1)
        started.start_node(SECOND_IP, num_cpus=1)
        started.wait_for_nodes(2)
        yield started


def test_workers_of_a_job_sit_on_both_nodes(nodes: RayNodes) -> None:
    result = submit(nodes, ROOT, *TRAIN)
    assert result.returncode == 0, result.stdout + result.stderr
    line = f"Rollout workers: 1 on {HEAD_IP}; 2 on {SECOND_IP}; learner on {HEAD_IP}."
    assert result.stdout.count(line) == 2  # at the start and at the end
    run = nodes.directory / "home" / "runs" / "two"
    first, last = json.loads((run / "workers.json").read_text())
    assert [entry["node_ip"] for entry in first["workers"]] == [HEAD_IP, SECOND_IP]
    assert len({entry["node_id"] for entry in first["workers"]}) == 2
    # Fragments of both workers that are in flight at the end are taken in too.
    assert first["env_steps"] == 0
    assert 320 <= last["env_steps"] <= 320 + 4 * 64


@pytest.mark.slow
def test_a_sweep_of_ones_own_is_run_once(nodes: RayNodes, tmp_path: Path) -> None:
    shutil.copy(ROOT / "cluster" / "submit.py", tmp_path)
    (tmp_path / "mine.yaml").write_text(SWEEP)
    command = ["python", "submit.py", "tune", "mine.yaml", "--smoke"]
    result = submit(nodes, tmp_path, *command)
    assert "1 of 1 trials finished" in result.stdout, result.stdout + result.stderr
    part = nodes.directory / "home" / "results" / "mine-smoke" / "qvpo"
    before = read_trials(part)
    assert [entry["status"] for entry in before.values()] == [FINISHED]
    again = submit(nodes, tmp_path, *command)
    assert "Finished already" in again.stdout, again.stdout + again.stderr
    assert read_trials(part) == before


def test_without_the_token_nobody_gets_in(nodes: RayNodes) -> None:
    jobs = f"{nodes.dashboard}/api/jobs/"
    token = (nodes.directory / "token").read_text()
    assert requests.get(jobs, timeout=10).status_code == 401
    for given, status in (("0" * 64, 403), (token, 200)):
        reply = requests.get(jobs, headers={"Authorization": f"Bearer {given}"}, timeout=10)
        assert reply.status_code == status


def submit(nodes: RayNodes, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return nodes.run(
        RAY, "job", "submit", "--address", nodes.dashboard, "--working-dir", str(folder), "--",
        *command, timeout_s=500,
    )  # fmt: skip
