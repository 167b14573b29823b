"""A trained policy that plays: of any algorithm's checkpoint, run directory or bundle."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.policy.policy import Policy
from torch import Generator

from qvpo_rllib.checkpoint import POLICIES_DIRECTORY, POLICY_FORMATS, check_files, read_metadata
from qvpo_rllib.core.action_scale import ActionScale
from qvpo_rllib.experiments.served import EXPORTED, algorithm_of, find_checkpoint, load_policy
from qvpo_rllib.serving.bundle import DESCRIPTION_FILE
from qvpo_rllib.staging import whole

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
    files = whole(directory)
    metadata = read_metadata(files, POLICY_FORMATS)
    check_files(files, metadata, under=POLICIES_DIRECTORY)
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
        return scale.to_env(policy.choose(obs, explore=False, generator=generator))

    env, env_config = str(metadata["env"]), metadata["env_config"] or {}
    return Player(env, env_config, metadata["shapes"][0], low, high, None, act)
