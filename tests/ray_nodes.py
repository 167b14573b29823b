"""Ray nodes started by `ray start`, as on a cluster, but all of them on this machine's loopback."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from qvpo_rllib.ray_session import NO_CLUSTER

RAY = str(Path(sys.executable).parent / "ray")
HEAD_IP, SECOND_IP = "127.0.0.2", "127.0.0.3"  # Ray replaces 127.0.0.1
START_TIMEOUT_S = 240


class RayNodes:
    """A cluster with a token of its own. Every process it starts ends with it, by its id."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port, self.dashboard_port = free_port(HEAD_IP), free_port("127.0.0.1")
        token = directory / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            # Commands that ran in this process have told Ray that there will be no cluster.
            **{name: value for name, value in os.environ.items() if name not in NO_CLUSTER},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ADDRESS": f"{HEAD_IP}:{self.port}",
        }
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def start_head(self, num_cpus: int) -> None:
        options = ["--head", f"--port={self.port}", "--dashboard-host=127.0.0.1"]
        options += [f"--dashboard-port={self.dashboard_port}", f"--temp-dir={self.directory}"]
        options.append(f"--ray-client-server-port={free_port(HEAD_IP)}")
        self._start(HEAD_IP, num_cpus, options)

    def start_node(self, ip: str, num_cpus: int) -> None:
        self._start(ip, num_cpus, [f"--address={HEAD_IP}:{self.port}"])

    def wait_for_nodes(self, number: int) -> None:
        script = (
            "import ray, time; ray.init('auto', logging_level='ERROR')\n"
            f"while sum(n['Alive'] for n in ray.nodes()) < {number}: time.sleep(0.2)"
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):  # the logs say more
                if self.run(sys.executable, "-c", script, timeout_s=120).returncode == 0:
                    return
            logs = [log.read_text()[-2000:] for log in self.directory.glob("*.log")]
            assert time.monotonic() < deadline, "\n".join(logs)

    def stop(self) -> None:
        processes = [process for node in self._nodes.values() for process in tree(node)]
        for node in self._nodes.values():
            node.terminate()
        _, left = psutil.wait_procs(processes, timeout=20)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=10)
        for node in self._nodes.values():
            node.wait()

    def run(self, *command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def _start(self, ip: str, num_cpus: int, options: list[str]) -> None:
        log = self.directory / f"{ip}.log"
        with log.open("wb") as file:
            node = subprocess.Popen(
                [
                    RAY, "start", "--block", f"--node-ip-address={ip}", f"--num-cpus={num_cpus}",
                    f"--dashboard-agent-listen-port={free_port(ip)}",
                    "--object-store-memory=80000000", *options,
                ],
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self._nodes[ip] = node


def tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A process and all that it started; empty if it has ended."""
    try:
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def free_port(ip: str) -> int:
    with socket.socket() as probe:
        probe.bind((ip, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def ray_nodes() -> Iterator[RayNodes]:
    # Short, as the paths of Ray's sockets below it may have 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="qr", dir="/tmp"))
    nodes = RayNodes(directory)
    try:
        yield nodes
    finally:
        nodes.stop()
        shutil.rmtree(directory, ignore_errors=True)
