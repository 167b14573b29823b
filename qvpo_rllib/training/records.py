"""What a run records of its surroundings: how it was started, and where its workers are."""

import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qvpo_rllib.files import write_atomically

PACKAGES = ("qvpo_rllib", "torch", "ray", "gymnasium", "mujoco", "numpy", "pyarrow")


def describe_start(command: Sequence[str]) -> dict[str, Any]:
    """Command line, time, versions and machine."""
    import torch

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": list(command),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


FILE = "workers.json"


class PlacementRecord:
    """`workers.json` of a run directory: a list of snapshots, oldest first, over all its starts.

    A snapshot is `{"env_steps": int, "driver": {…}, "workers": [{…}, …]}`; the entries say
    `worker` (index from 1), `node_id` (Ray's), `node_ip`, `hostname` and `pid`.
    """

    def __init__(self, run_path: Path) -> None:
        self._file = run_path / FILE

    def snapshots(self) -> list[dict[str, Any]]:
        return list(json.loads(self._file.read_text())) if self._file.exists() else []

    def take(self, algorithm: Any, env_steps: int) -> dict[str, Any]:
        """Asks the remote workers that are alive where they are, and writes it down."""
        workers = algorithm.env_runner_group.foreach_env_runner(
            _worker_whereabouts, local_env_runner=False
        )
        snapshot = {
            "env_steps": env_steps,
            "driver": _whereabouts(),
            "workers": sorted(workers, key=lambda entry: int(entry["worker"])),
        }
        text = json.dumps([*self.snapshots(), snapshot], indent=1)
        write_atomically(self._file, text.encode() + b"\n")
        return snapshot


def describe(snapshot: dict[str, Any]) -> str:
    """`Rollout workers: 1, 3 on 10.0.0.5; 2 on 10.0.0.6; learner on 10.0.0.5.`"""
    by_node: dict[str, list[str]] = {}
    for entry in snapshot["workers"]:
        by_node.setdefault(entry["node_ip"], []).append(str(entry["worker"]))
    places = [f"{', '.join(indices)} on {ip}" for ip, indices in by_node.items()]
    places.append(f"learner on {snapshot['driver']['node_ip']}")
    return f"Rollout workers: {'; '.join(places)}."


def _worker_whereabouts(worker: Any) -> dict[str, Any]:
    return {"worker": worker.worker_index, **_whereabouts()}


def _whereabouts() -> dict[str, Any]:
    import ray

    return {
        "node_id": ray.get_runtime_context().get_node_id(),
        "node_ip": ray.util.get_node_ip_address(),
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
    }
