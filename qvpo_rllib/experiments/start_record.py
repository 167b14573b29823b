"""How a program was started: what `run.json` and `experiment.json` keep of each start."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

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
