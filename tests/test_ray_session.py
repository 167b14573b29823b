"""The Ray that a command starts for itself is no service to the network."""

import fcntl
import inspect
import ipaddress
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.node import Node

from qvpo_rllib import cli
from qvpo_rllib.files import scratch_directory

SCRIPT = """
from qvpo_rllib.ray_session import keep_private, start_ray

keep_private(None)
start_ray(1)
import psutil, ray

ray.get(ray.remote(lambda: None).remote())  # a worker has ports of its own
driver = psutil.Process()
for process in [driver, *driver.children(recursive=True)]:
    for connection in process.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN:
            print(connection.laddr.ip)
from ray._raylet import AuthenticationMode, get_authentication_mode

assert get_authentication_mode() == AuthenticationMode.TOKEN
print("folder", ray.get_runtime_context().worker.node.get_session_dir_path())
"""


def test_no_port_of_rays_is_open_to_the_network(tmp_path: Path) -> None:
    """It asks for a token that is in no file, and keeps its files where the next one finds them."""
    left = Path(tempfile.mkdtemp(prefix="qvpo-ray-"))
    (left / ".lock").touch()
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("somebody's")
    token.chmod(0o644)
    environment = os.environ | {"HOME": str(tmp_path)}
    del environment["RAY_AUTH_MODE"]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    printed, _, folder = result.stdout.partition("folder")
    addresses = printed.split()
    assert "/qvpo-ray-" in folder, result.stderr
    assert not left.exists()
    assert token.read_text() == "somebody's"
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(addresses) >= 4, result.stderr
    for text in addresses:
        address = ipaddress.ip_address(text)
        mapped = getattr(address, "ipv4_mapped", None)
        assert (mapped or address).is_loopback, addresses


def test_scratch_of_processes_that_have_ended_is_deleted(tmp_path: Path) -> None:
    mine = scratch_directory("x-", str(tmp_path))
    ended, in_use, no_lock = (tmp_path / f"x-{name}" for name in ("ended", "in-use", "no-lock"))
    for directory in (ended, in_use, no_lock):
        directory.mkdir()
    (ended / ".lock").touch()
    (tmp_path / "x-link").symlink_to(no_lock)
    with (in_use / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = scratch_directory("x-", str(tmp_path))
    assert not ended.exists()
    assert all(directory.exists() for directory in (mine, other, in_use, no_lock))
    assert other.stat().st_mode & 0o777 == 0o700


def test_a_machine_too_busy_for_ray_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Ray waits half a minute for its own processes, and raises an `Exception` then."""
    words = "The current node timed out during startup. "
    assert words in inspect.getsource(Node.__init__)

    def too_busy(**_: Any) -> None:
        raise Exception(f"{words}This could happen because the GCS has become overloaded.")

    monkeypatch.setattr(ray, "init", too_busy)
    run = tmp_path / "run"
    assert cli.main(["train", "--preset", "quick", "--run-dir", str(run)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "qvpo: error: Ray gave up starting after 30 seconds" in said
    assert "give the command again" in said
    assert not run.exists()
