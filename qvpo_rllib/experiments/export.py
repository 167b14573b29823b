"""From an RLlib checkpoint to a bundle: the code behind `qvpo export`."""

import importlib.metadata
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.policy.policy import Policy

from qvpo_rllib.checkpoint import read_metadata
from qvpo_rllib.experiments.evaluation import find_checkpoint
from qvpo_rllib.policy import QVPOTorchPolicy
from qvpo_rllib.serving.bundle import check_absent, digest, encode_parameters, write_bundle
from qvpo_rllib.serving.description import Description

PACKAGES = ("qvpo_rllib", "torch", "ray", "numpy", "safetensors")
VERSION_DIGITS = 12  # of the parameters' SHA-256


def export_checkpoint(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    version: str | None = None,
    onnx: bool = False,
) -> Description:
    """Writes a checkpoint's policy as a bundle.

    Loading a checkpoint unpickles it, which runs code: export only your own.

    Args:
        path: a checkpoint or a run directory (its best).
        out: the bundle's directory, which must not exist.
        name: under which it will be served; the environment's id if None.
        version: of the model; the beginning of the parameters' SHA-256 if None.
        onnx: also write `policy.onnx`.

    Raises:
        ValueError: no QVPO checkpoint, `out` exists, a name that is not allowed, or no ONNX here.
    """
    check_absent(out.expanduser().absolute())
    if onnx:
        from qvpo_rllib.serving.onnx import check_available

        check_available()
    directory = find_checkpoint(path)
    metadata = read_metadata(directory)
    policy = Policy.from_checkpoint(str(directory / "policies" / "default_policy"))
    assert isinstance(policy, QVPOTorchPolicy)
    parameters = encode_parameters(policy.networks.state_dict())
    description = describe(
        policy, metadata, directory, name, version or digest(parameters)[:VERSION_DIGITS]
    )
    onnx_bytes = None
    if onnx:
        from qvpo_rllib.serving.onnx import to_onnx

        onnx_bytes = to_onnx(description, parameters)
    write_bundle(out, description, parameters, onnx_bytes)
    return description


def describe(
    policy: QVPOTorchPolicy,
    metadata: dict[str, Any],
    directory: Path,
    name: str | None,
    version: str,
) -> Description:
    """The description of a checkpoint's policy."""
    obs, act = policy.observation_space, policy.action_space_struct
    env = str(metadata["env"])
    run = directory.parents[1].name if directory.parent.name == "checkpoints" else None
    return Description(
        name=name or env.rsplit("/", 1)[-1].rsplit(":", 1)[-1],
        version=version,
        env=env,
        env_config=metadata["env_config"] or {},
        obs_dim=policy.obs_dim,
        obs_dtype=str(obs.dtype),
        obs_low=_bounds(obs.low),
        obs_high=_bounds(obs.high),
        act_low=act.low.tolist(),
        act_high=act.high.tolist(),
        act_dtype=str(act.dtype),
        hidden=list(policy.hp.hidden),
        diffusion_steps=policy.hp.diffusion_steps,
        noise_schedule=policy.hp.noise_schedule,
        k_behavior=policy.hp.k_behavior,
        k_eval=policy.hp.k_eval,
        source={
            "run": run,
            "checkpoint": directory.name,
            "seed": metadata.get("seed"),
            "env_steps": metadata["ledger"].get("ingested"),
            "updates": metadata["ledger"].get("done"),
            "trained_with": {
                "qvpo_rllib": metadata.get("package_version"),
                "ray": metadata.get("ray_version"),
                "torch": metadata.get("torch_version"),
            },
        },
        versions={package: importlib.metadata.version(package) for package in PACKAGES}
        | {"python": platform.python_version()},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _bounds(values: NDArray[Any]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
