"""A trained policy that plays: of any algorithm's checkpoint, run directory or bundle."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.policy.policy import Policy
from torch import Generator

from qvpo_rllib.algorithms.qvpo import QVPOTorchPolicy
from qvpo_rllib.checkpoints.metadata import (
    POLICIES_DIRECTORY,
    Metadata,
)
from qvpo_rllib.checkpoints.staging import committed
from qvpo_rllib.core.action_scale import ActionScale
from qvpo_rllib.serving.bundle import (
    DESCRIPTION_FILE,
    build_networks,
    digest,
    encode_parameters,
    load,
)
from qvpo_rllib.serving.description import Description
from qvpo_rllib.serving.policy import ServedPolicy

# Observations [B, O], K (None: the policy's own), noise → actions [B, A] in the environment's box.
Act = Callable[[NDArray[np.float32], int | None, Generator], NDArray[np.floating]]


@dataclass(frozen=True)
class Player:
    """What an evaluation needs to know of a policy.

    Attributes:
        k: actions drawn per state unless told otherwise; None if the policy draws just one.
    """

    env: str
    env_config: dict[str, Any]
    obs_dim: int
    act_low: list[float]
    act_high: list[float]
    k: int | None
    act: Act


def asdict_of(directory: Path) -> dict[str, Any]:
    return dataclasses.asdict(Metadata.read(directory))


def load_player(path: Path) -> Player:
    """The policy of a bundle, a checkpoint or a run directory (its best).

    Loading a checkpoint unpickles it, which runs code: load only your own. A bundle runs none.

    Raises:
        ValueError: there is neither, or it is damaged or of another format.
    """
    directory = find_checkpoint(path)
    if (directory / DESCRIPTION_FILE).is_file() or algorithm_of(directory) == EXPORTED:
        policy = load_policy(directory)
        d = policy.description
        return Player(d.env, d.env_config, d.obs_dim, d.act_low, d.act_high, d.k_eval, policy.act)
    return _of_one_action(directory)


def _of_one_action(directory: Path) -> Player:
    """Of an algorithm that draws one action: it acts as in its evaluations."""
    files = committed(directory)
    metadata = asdict_of(files)
    Metadata(**metadata).check_files(files, under=POLICIES_DIRECTORY)
    policy: Any = Policy.from_checkpoint(str(files / POLICIES_DIRECTORY / "default_policy"))
    low, high = metadata["action_box"]
    dtype = policy.action_space_struct.dtype
    scale = ActionScale(np.asarray(low, dtype), np.asarray(high, dtype))

    def act(obs: NDArray[np.float32], k: int | None, generator: Generator) -> NDArray[np.floating]:
        if k is not None:
            raise ValueError(
                f"--k {k} is not allowed: {metadata['algorithm']} takes one action in each state. "
                "K is for QVPO."
            )
        return scale.to_env(policy.act(obs, generator=generator))

    env, env_config = str(metadata["env"]), metadata["env_config"] or {}
    return Player(env, env_config, metadata["shapes"][0], low, high, None, act)


PACKAGES = ("qvpo_rllib", "torch", "ray", "numpy", "safetensors")
VERSION_DIGITS = 12  # of the parameters' SHA-256
EXPORTED = "QVPO"  # the one algorithm whose policies become bundles


def algorithm_of(directory: Path) -> str:
    """Whose checkpoint it is; those of older versions are QVPO's. `ValueError` if it is none."""
    return str(asdict_of(committed(directory)).get("algorithm", EXPORTED))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or a run directory's best (else its last)."""
    path = path.expanduser().resolve()
    for name in ("best", "last"):
        if (path / "checkpoints" / name).is_dir():
            return (path / "checkpoints" / name).resolve()
    return path


def load_policy(path: Path) -> ServedPolicy:
    """The policy of a bundle, a checkpoint or a run directory (its best).

    Loading a checkpoint unpickles it, which runs code: load only your own. A bundle runs none.

    Raises:
        ValueError: there is neither, or it is damaged or of another format.
    """
    directory = find_checkpoint(path)
    if (directory / DESCRIPTION_FILE).is_file():
        return load(directory)
    description, parameters = read_checkpoint(directory)
    return ServedPolicy(description, build_networks(description, parameters))


def read_checkpoint(
    directory: Path, *, name: str | None = None, version: str | None = None
) -> tuple[Description, bytes]:
    """A checkpoint's policy as a bundle's description and parameters.

    Args:
        name: under which it will be served; the environment's id if None.
        version: of the model; the beginning of the parameters' SHA-256 if None.

    Raises:
        ValueError: no QVPO checkpoint, damaged, of another format, or a name that is not allowed.
    """
    files = committed(directory)
    metadata = asdict_of(files)
    if algorithm_of(directory) != EXPORTED:
        raise ValueError(
            f"{str(directory)!r} is a checkpoint of {metadata['algorithm']}: bundles are made of "
            f"{EXPORTED}'s policies alone. `qvpo evaluate` and `qvpo record` play it."
        )
    Metadata(**metadata).check_files(files, under=POLICIES_DIRECTORY)
    policy = Policy.from_checkpoint(str(files / POLICIES_DIRECTORY / "default_policy"))
    assert isinstance(policy, QVPOTorchPolicy)
    sizes = [policy.obs_dim, policy.act_dim]
    if metadata["shapes"] != sizes:
        raise ValueError(
            f"{directory} contradicts itself: its policy has observation and action sizes {sizes}, "
            f"its qvpo.json says {metadata['shapes']}. It was changed, or put together from two."
        )
    parameters = encode_parameters(policy.networks.state_dict())
    version = version or digest(parameters)[:VERSION_DIGITS]
    return _describe(policy, metadata, directory, name, version), parameters


def _describe(
    policy: QVPOTorchPolicy,
    metadata: dict[str, Any],
    directory: Path,
    name: str | None,
    version: str,
) -> Description:
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
