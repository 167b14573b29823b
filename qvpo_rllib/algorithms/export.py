"""From QVPO's policy to a bundle (`serving.bundle`)."""

import importlib.metadata
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvpo_rllib.checkpoints.metadata import Metadata
from qvpo_rllib.core.options.qvpo import CRITIC_OPTIONS
from qvpo_rllib.rollout.policy import OffPolicyTorchPolicy
from qvpo_rllib.serving.bundle import digest, encode_parameters, write_bundle
from qvpo_rllib.serving.description import Description
from qvpo_rllib.serving.onnx import to_onnx

PACKAGES = ("qvpo_rllib", "torch", "ray", "numpy", "safetensors")
VERSION_DIGITS = 12  # of the parameters' SHA-256


def export_policy(
    policy: OffPolicyTorchPolicy[Any, Any],
    metadata: Metadata,
    out: Path,
    *,
    name: str | None = None,
    version: str | None = None,
    run: str | None = None,
    checkpoint: str | None = None,
    onnx: bool = False,
) -> Description:
    """Writes a policy as a bundle, and returns the bundle's description.

    Args:
        metadata: of the run that has trained it.
        out: the bundle's directory, which must not exist.
        name: under which it will be served; the environment's id if None.
        version: of the model; the beginning of the parameters' SHA-256 if None.
        run, checkpoint: names of the directories that it comes from, for the record.
        onnx: also write `policy.onnx`.

    Raises:
        ValueError: `out` exists, a name that is not allowed, or no ONNX here.
    """
    parameters = encode_parameters(policy.networks.state_dict())
    obs, act, env = policy.observation_space, policy.action_space_struct, metadata.env
    description = Description(
        name=name or re.split(r"[/:]", env)[-1].lstrip("_."),
        version=version or digest(parameters)[:VERSION_DIGITS],
        env=env,
        env_config=metadata.env_config,
        frame_skip=policy.hp.frame_skip,
        wrappers=list(policy.hp.wrappers),
        obs_parts=metadata.observation_parts,
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
        normalize_observations=policy.hp.normalize_observations,
        **{name: getattr(policy.hp, name) for name in CRITIC_OPTIONS},
        source={
            "run": run,
            "checkpoint": checkpoint,
            "seed": metadata.seed,
            "env_steps": metadata.ledger["ingested"],
            "updates": metadata.ledger["done"],
            "trained_with": {
                "qvpo_rllib": metadata.package_version,
                "ray": metadata.ray_version,
                "torch": metadata.torch_version,
            },
        },
        versions={package: importlib.metadata.version(package) for package in PACKAGES}
        | {"python": platform.python_version()},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    onnx_bytes = to_onnx(description, parameters) if onnx else None
    write_bundle(out, description, parameters, onnx_bytes)
    return description


def _bounds(values: NDArray[np.floating]) -> list[float | None]:
    """Returns the bounds as JSON has them: None where there is none."""
    return [float(value) if np.isfinite(value) else None for value in values]
