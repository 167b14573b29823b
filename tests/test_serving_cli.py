"""`qvpo serve` and `qvpo bench serve` as processes of their own."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import start_qvpo

from qvpo_rllib import cli
from qvpo_rllib.bench.http_load import fresh_bundle
from qvpo_rllib.serving import load, write_bundle
from qvpo_rllib.serving.client import Client
from qvpo_rllib.serving.schema import READ_TIMEOUT_S

START_TIMEOUT_S = 120
HOST = "127.0.0.1"  # the default


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: Any) -> Path:
    return fresh_bundle(tmp_path_factory.mktemp("cli") / "hopper")


@pytest.fixture(scope="module")
def checkpoint(save_trained: Any, tiny_config: Any) -> Path:
    return Path(save_trained(tiny_config()))


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def served(bundle: Path, checkpoint: Path) -> Iterator[tuple[Any, str, list[str]]]:
    """The process, its address and what it printed until it served."""
    with serving(str(bundle), str(checkpoint), "--trust-checkpoint") as started:
        yield started


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[Any, str, list[str]]]:
    port = free_port()
    process = start_qvpo("serve", *arguments, "--port", str(port))
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Serving at"):
                break
        yield process, f"http://{HOST}:{port}", lines
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


# --- one server, in this order ------------------------------------------------------------------


def test_serves_bundles_and_trusted_checkpoints(served: Any, bundle: Path) -> None:
    process, url, lines = served
    assert any(url in line for line in lines), [*lines, process.stderr.read()]
    assert any(line.startswith("hopper@fresh") for line in lines)
    assert any(line.startswith("InvertedPendulum-v5@") for line in lines)  # the checkpoint
    obs = np.random.default_rng(0).normal(size=(3, 11)).astype(np.float32)
    with Client(url) as client:
        actions = client.act("hopper", obs, k=4, seed=1)
        assert client.act("InvertedPendulum-v5", np.zeros((1, 4))).shape == (1, 1)
    expected = load(bundle).act(obs, 4, torch.Generator().manual_seed(1))
    np.testing.assert_array_equal(actions, expected)
    assert listening_addresses(int(url.rsplit(":", 1)[1])) == {HOST}


def test_bench_serve_reports_loads_and_the_direct_call(
    served: Any, bundle: Path, monkeypatch: Any, capsys: Any
) -> None:
    host, port = served[1].removeprefix("http://").split(":")
    running = contextlib.nullcontext((host, int(port)))
    monkeypatch.setattr("qvpo_rllib.serving.server.serving", lambda *_, **__: running)
    assert cli.main(["bench", "serve", str(bundle), "--seconds", "0.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [load["clients"] for load in report["load"]] == [1, 16, 64]
    for measured in report["load"]:
        assert measured["failed"] == 0
        assert measured["requests_per_s"] > 1
        assert 0 < measured["p50_ms"] <= measured["p99_ms"]
    assert len(report["direct"]) == 2
    assert all(0 < direct["p50_ms"] <= direct["p99_ms"] for direct in report["direct"])
    # So short that the time is over before a client has its first reply.
    assert cli.main(["bench", "serve", str(bundle), "--seconds", "1e-6", "--k", "1"]) == 0
    assert re.search(r" 16 clients .* requests/s, 0 failed", capsys.readouterr().out)


@pytest.mark.parametrize(("victim", "longest_s"), [("qvpo-worker", 5), ("qvpo-http", 5)])
def test_killed_processes_cost_no_request_of_a_client_that_asks_again(
    served: Any, bundle: Path, victim: str, longest_s: float
) -> None:
    process, url, _ = served
    expected = load(bundle).act(np.zeros((1, 11)), 4, torch.Generator().manual_seed(1))
    with Client(url) as client:
        client.act("hopper", np.zeros((1, 11)), k=4)
        victims = [pid for pid in descendants(process.pid) if name_of(pid) == victim]
        assert len(victims) == 1
        os.kill(victims[0], signal.SIGKILL)
        start = time.monotonic()
        actions = client.act("hopper", np.zeros((1, 11)), 4, 1)
        assert time.monotonic() - start < longest_s
    np.testing.assert_array_equal(actions, expected)


def test_stalled_clients_and_bad_headers_harm_nobody(served: Any) -> None:
    """A body that does not come, a head that does not, and a header that is not UTF-8."""
    host, port = served[1].removeprefix("http://").split(":")
    head = b"POST /v1/models/hopper/act HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n"
    stalled = []
    for text in [head + b"\r\n{"] * 300 + [head, b"", b"GET / HT"]:
        stalled.append(socket.create_connection((host, int(port)), timeout=30))
        stalled[-1].sendall(text)
    with Client(served[1]) as client:
        start = time.monotonic()
        assert client.act("hopper", np.zeros((1, 11)), k=1).shape == (1, 3)
        assert time.monotonic() - start < READ_TIMEOUT_S
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head + b"X-Name: \xff\xfe\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    replies = [connection.recv(100) for connection in stalled]
    for connection in stalled:
        connection.close()
    assert all(reply.startswith(b"HTTP/1.1 408") for reply in replies[:-3])
    assert replies[-3:] == [b""] * 3  # closed


def test_sigterm_finishes_what_has_begun_and_takes_nothing_new(bundle: Path) -> None:
    """SIGTERM comes from Kubernetes or systemd."""
    with serving(str(bundle), "--replicas", "2") as (process, url, lines):
        assert any(url in line for line in lines), [*lines, process.stderr.read()]
        host, port = url.removeprefix("http://").split(":")
        assert listening_addresses(int(port)) == {HOST}
        body = json.dumps({"observations": [[0.0] * 11], "k": 256}).encode()
        head = f"POST /v1/models/hopper/act HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
        begun = [socket.create_connection((host, int(port)), timeout=30) for _ in range(8)]
        for connection in begun:
            connection.sendall(head.encode() + b"\r\n\r\n" + body[:20])
        time.sleep(1.5)  # until the heads have been read, of the READ_TIMEOUT_S for the bodies
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout is not None
        assert "Stopping" in process.stdout.readline()
        deadline = time.monotonic() + 3
        while listening_addresses(int(port)) and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)))
        for connection in begun:
            connection.sendall(body[20:])
        assert all(c.recv(100).startswith(b"HTTP/1.1 200") for c in begun)
        _, error = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 0, error
    assert error == ""


def test_stops_on_ctrl_c(served: Any) -> None:
    process, url, _ = served
    with Client(url) as client:
        client.act("hopper", np.zeros((1, 11)), k=1)
        # A terminal signals the whole group: Ray's processes too. The connection is still open.
        os.killpg(process.pid, signal.SIGINT)
        output, error = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 0, error
    assert "Stopping" in output
    assert "Traceback" not in error


def listening_addresses(port: int) -> set[str]:
    """Addresses on which somebody listens to this port, by the kernel's table."""
    found = set()
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(file).read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            host, _, number = address.partition(":")
            if state == "0A" and int(number, 16) == port:
                found.add(socket.inet_ntoa(bytes.fromhex(host)[::-1]) if len(host) == 8 else host)
    return found


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """All processes of this one's session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == pid:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.slow
def test_a_short_soak() -> None:
    """Every process killed once, and clients that stall, under load."""
    command = ["tests/soak_server.py", "--minutes", "0.1", "--strike-every", "1.2"]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, *command], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout)
    assert set(summary["strikes"]) == {"qvpo-worker", "qvpo-http", "stall"}
    assert summary["answers"] > 50


# --- refusals -----------------------------------------------------------------------------------


def error_of(capsys: Any, *arguments: str) -> str:
    assert cli.main([*arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_checkpoint_needs_to_be_trusted(capsys: Any, checkpoint: Path) -> None:
    message = error_of(capsys, "serve", str(checkpoint))
    assert "runs code" in message
    assert "--trust-checkpoint" in message


def test_bad_input_is_refused_before_anything_starts(
    capsys: Any, bundle: Path, tmp_path: Path
) -> None:
    assert "no such directory" in error_of(capsys, "serve", str(bundle), str(tmp_path / "none"))
    assert "not a bundle" in error_of(capsys, "serve", str(tmp_path))
    other = write_bundle(
        tmp_path / "other",
        dataclasses.replace(load(bundle).description, act_high=[2.0] * 3),
        (bundle / "policy.safetensors").read_bytes(),
    )
    assert "--version" in error_of(capsys, "serve", str(bundle), str(other))
    assert "--port 70000" in error_of(capsys, "serve", str(bundle), "--port", "70000")
    assert "--replicas 0" in error_of(capsys, "serve", str(bundle), "--replicas", "0")
    with socket.create_server((HOST, 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}" in error_of(capsys, "serve", str(bundle), "--port", port)


def test_evaluate_says_what_is_wrong(capsys: Any, bundle: Path) -> None:
    url = f"http://{HOST}:{free_port()}"
    assert "Give either" in error_of(capsys, "evaluate")
    assert "Give either" in error_of(capsys, "evaluate", str(bundle), "--server", url)
    assert "--model" in error_of(capsys, "evaluate", "--server", url)
    assert "--env" in error_of(capsys, "evaluate", str(bundle), "--env", "Hopper-v5")
    assert "Is qvpo serve running" in error_of(
        capsys, "evaluate", "--server", url, "--model", "hopper"
    )
    assert "not a server's address" in error_of(
        capsys, "evaluate", "--server", "here", "--model", "m"
    )
