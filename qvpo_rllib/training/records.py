"""What a run records of its surroundings: how it was started, and where its workers are."""

import os
import platform
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qvpo_rllib.files import installed_versions, read_json, write_json

PACKAGES = ("qvpo_rllib", "torch", "ray", "gymnasium", "mujoco", "numpy", "pyarrow")


def describe_start(command: Sequence[str]) -> dict[str, Any]:
    """Returns what `run.json` says of a start: command line, time, versions and machine."""
    import torch

    return {
        "command": list(command),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": installed_versions(*PACKAGES),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def record_placement(run_path: Path, algorithm: Any, env_steps: int) -> str:
    """Asks the remote workers that are alive where they are; adds that to `workers.json`.

    The file is a list of snapshots, oldest first, over all starts of the run. A snapshot is
    `{"env_steps": int, "driver": {…}, "workers": [{…}, …]}`; the entries say `worker` (index from
    1), `node_id` (Ray's), `node_ip`, `hostname` and `pid`.

    Returns:
        The snapshot in words, see `describe_placement`.
    """
    workers = algorithm.env_runner_group.foreach_env_runner(
        lambda worker: {"worker": worker.worker_index, **_whereabouts()}, local_env_runner=False
    )
    snapshot = {
        "env_steps": env_steps,
        "driver": _whereabouts(),
        "workers": sorted(workers, key=lambda entry: int(entry["worker"])),
    }
    file = run_path / "workers.json"
    advice = "Delete it to go on without the record of earlier starts."
    before = read_json(file, list, advice) if file.exists() else []
    write_json(file, [*before, snapshot])
    return describe_placement(snapshot)


def describe_placement(snapshot: Mapping[str, Any]) -> str:
    """Returns "Rollout workers: 1, 3 on 10.0.0.5; 2 on 10.0.0.6; learner on 10.0.0.5."."""
    by_node: dict[str, list[str]] = {}
    for entry in snapshot["workers"]:
        by_node.setdefault(entry["node_ip"], []).append(str(entry["worker"]))
    places = [f"{', '.join(indices)} on {ip}" for ip, indices in by_node.items()]
    places.append(f"learner on {snapshot['driver']['node_ip']}")
    return f"Rollout workers: {'; '.join(places)}."


def _whereabouts() -> dict[str, str | int]:
    import ray

    return {
        "node_id": ray.get_runtime_context().get_node_id(),
        "node_ip": ray.util.get_node_ip_address(),
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
    }
