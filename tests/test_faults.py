"""Workers that are killed, raise, hang or are slow: training goes on, nothing is counted twice."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from tracing import Trace

from qvpo_rllib.rollout import pool

TESTS = Path(__file__).parent
TRACEABLE = "environments:Traceable-v0"
FRAGMENT = 32  # env steps
# Fragments that a worker owes at most, by mode.
IN_FLIGHT = {"async": 2, "sync": 1}


class Run:
    """An algorithm with two workers that can be told to fail."""

    def __init__(self, algorithm: Any, commands: Path, mode: str) -> None:
        self.algorithm, self.commands, self.mode = algorithm, commands, mode
        self.trace = Trace(algorithm)
        self.result = algorithm.train()

    @property
    def faults(self) -> dict[str, int]:
        return self.result["faults"]

    def train_until(self, reached: Callable[[dict[str, int]], bool]) -> None:
        """Trains until the faults satisfy `reached`, and then once more."""
        deadline = time.monotonic() + 300  # a busy machine starts a process slowly
        while not reached(self.faults):
            assert time.monotonic() < deadline, self.faults
            self.result = self.algorithm.train()
            self.trace.check()
        self.result = self.algorithm.train()
        self.trace.check()

    def tell(self, command: str) -> None:
        (self.commands / command).touch()

    def kill_a_worker(self) -> None:
        pids = self.algorithm.env_runner_group.foreach_env_runner(
            lambda worker: os.getpid(), local_env_runner=False
        )
        os.kill(pids[0], signal.SIGKILL)


@pytest.fixture(scope="module")
def run(request: Any, build_shared: Any, tiny_config: Any, tmp_path_factory: Any) -> Run:
    commands = tmp_path_factory.mktemp("commands")
    config = tiny_config(TRACEABLE, update_ratio=0.1, sampling_mode=request.param)
    config.environment(env_config={"commands": str(commands)})
    config.env_runners(
        num_env_runners=2,
        num_envs_per_env_runner=4,
        rollout_fragment_length=FRAGMENT // 4,
        sample_timeout_s=6.0,
    )
    config.fault_tolerance(delay_between_env_runner_restarts_s=0.1)
    config.reporting(min_sample_timesteps_per_iteration=640)
    return Run(build_shared(config), commands, request.param)


BOTH = pytest.mark.parametrize("run", ["async", "sync"], indirect=True, scope="module")
ASYNC = pytest.mark.parametrize("run", ["async"], indirect=True, scope="module")


@BOTH
def test_a_killed_worker_is_replaced(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before, algorithm = dict(run.faults), run.algorithm
    recreated: list[int] = []
    monkeypatch.setattr(
        algorithm.callbacks,
        "on_env_runners_recreated",
        lambda *, env_runner_indices, **arguments: recreated.extend(env_runner_indices),
    )
    run.kill_a_worker()
    run.train_until(lambda faults: faults["restarts"] == before["restarts"] + 1)
    recreated += algorithm.restore_env_runners(algorithm.env_runner_group)  # if that was just now
    assert len(recreated) == 1
    assert run.faults["workers_lost"] == before["workers_lost"] + 1
    lost = run.faults["fragments_lost"] - before["fragments_lost"]
    assert lost <= IN_FLIGHT[run.mode]
    assert run.faults["env_steps_lost"] - before["env_steps_lost"] == lost * FRAGMENT
    assert run.result["num_healthy_workers"] == 2


@ASYNC
@pytest.mark.parametrize(("command", "fault"), [("raise", "env_errors"), ("hang", "timeouts")])
def test_a_worker_whose_environment_fails_is_replaced(run: Run, command: str, fault: str) -> None:
    before = dict(run.faults)
    run.tell(command)
    run.train_until(lambda faults: faults["restarts"] == before["restarts"] + 1)
    assert run.faults[fault] == before[fault] + 1
    lost = run.faults["fragments_lost"] - before["fragments_lost"]
    assert 1 <= lost <= IN_FLIGHT[run.mode]
    assert run.faults["workers_lost"] == before["workers_lost"]


@ASYNC
def test_a_slow_worker_loses_nothing(run: Run) -> None:
    before = dict(run.faults)
    run.tell("slow")
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        run.result = run.algorithm.train()
        run.trace.check()
    assert run.faults == before
    assert not list(run.commands.iterdir())


@ASYNC
def test_a_learner_that_looks_late_loses_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an evaluation that took longer than `sample_timeout_s`."""
    workers, deadline = run.algorithm.collector.pool._workers, time.monotonic() + 60
    while sum(bool(w.asked) for w in workers.values()) < 2:  # one of an earlier test is coming back
        assert time.monotonic() < deadline
        run.result = run.algorithm.train()
    before = dict(run.faults)
    asked = [ref for w in workers.values() for ref, _ in w.asked]
    assert len(ray.wait(asked, num_returns=len(asked))[0]) >= 2
    later = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 1000, sleep=time.sleep)
    with monkeypatch.context() as patch:
        patch.setattr(pool, "time", later)
        run.algorithm.train()
    run.result = run.algorithm.train()
    assert run.faults == before
    run.trace.check()


@ASYNC
def test_stopping_does_not_wait_for_an_environment_that_hangs(run: Run) -> None:
    """The last test of the fixture's run."""
    try:
        run.tell("hang")
        while list(run.commands.iterdir()):
            run.algorithm.train()
    finally:  # the later tests need its workers' places
        start = time.monotonic()
        run.algorithm.stop()
    assert time.monotonic() - start < 60  # it would hang for ever


def test_an_environment_that_always_raises_ends_the_run(
    ray_session: None, build: Any, tiny_config: Any
) -> None:
    config = tiny_config("environments:Raising-v0").env_runners(num_env_runners=1)
    config.fault_tolerance(
        delay_between_env_runner_restarts_s=0.1, num_consecutive_env_runner_failures_tolerance=1
    )
    algorithm = build(config)
    message = r"Raising-v0: rollout worker 1 failed 2 times.*environment 0.*the motor is on fire"
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        algorithm.train()
    assert algorithm.collector.faults.restarts == 1


@pytest.mark.slow
def test_workers_and_nodes_are_killed_at_random() -> None:
    """A short run of the soak test, on a cluster of its own: the first to go is a node."""
    soak = subprocess.run(
        [sys.executable, TESTS / "soak.py", "--minutes", "0.3", "--kill-every", "5"],
        capture_output=True,
        text=True,
    )
    assert soak.returncode == 0, soak.stdout + soak.stderr
    summary = json.loads(soak.stdout.splitlines()[-1])
    assert summary["kills"]["node"] >= 1
    assert summary["faults"]["workers_lost"] >= 1
    assert summary["faults"]["fragments_lost"] <= 2 * summary["faults"]["workers_lost"]
