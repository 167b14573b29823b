"""A trained policy that plays: of any algorithm's checkpoint, run directory or bundle."""

import logging
import os
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from ray.rllib.policy.policy import Policy
from torch import Generator

from qvpo_rllib.algorithms import ALGORITHMS
from qvpo_rllib.algorithms.qvpo import QVPOTorchPolicy
from qvpo_rllib.checkpoints import named
from qvpo_rllib.checkpoints.metadata import POLICIES_DIRECTORY, Metadata
from qvpo_rllib.checkpoints.staging import committed
from qvpo_rllib.core.action_scale import ActionScale
from qvpo_rllib.core.env_config import decode_env_config
from qvpo_rllib.core.observation_parts import ObservationParts
from qvpo_rllib.serving.bundle import DESCRIPTION_FILE, load
from qvpo_rllib.serving.policy import BestOfKPolicy

logger = logging.getLogger(__name__)

POLICY_DIRECTORY = f"{POLICIES_DIRECTORY}/default_policy"
# Wherever it was trained: a policy that only acts needs no learner, and acts on the CPU.
ACTING_ONLY = {"in_evaluation": True, "num_gpus": 0}
WARM_UP, REPEATS = 20, 200  # of `action_time_ms`


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy that acts as in its evaluations, with what playing needs to know of it.

    Attributes:
        source: the checkpoint or bundle that it was loaded from.
        env, env_config, frame_skip, wrappers: what it was trained on.
        parts: of a Dict or Tuple observation, which flatten it; None if it is a vector already.
        scale: to the environment's action box.
        k: actions drawn per state unless told otherwise; None if the policy draws just one.
        takes_vectors: whether it was trained in the vector environment of an id that makes both
            kinds.
    """

    source: Path
    env: str
    env_config: dict[str, Any]
    obs_dim: int
    scale: ActionScale
    k: int | None
    frame_skip: int
    wrappers: tuple[str, ...]
    parts: ObservationParts | None
    _policy: BestOfKPolicy | Policy  # RLlib's draws one action
    takes_vectors: bool = True

    @classmethod
    def load(cls, path: str | Path) -> "TrainedPolicy":
        """Returns the policy of a bundle, a checkpoint or a run directory (its best, else last).

        Loading a checkpoint unpickles it, which runs code: load only your own. A bundle runs none.

        Raises:
            ValueError: there is neither, or it is damaged or of another format.
        """
        source = find_checkpoint(Path(path))
        if is_bundle(source):
            served = load(source)
            d = served.description
            env_config = decode_env_config(d.env_config)
            return cls(
                source,
                d.env,
                env_config,
                d.obs_dim,
                served.scale,
                d.k_eval,
                d.frame_skip,
                tuple(d.wrappers),
                served.parts,
                served,
            )
        metadata, policy = load_checkpoint(source)
        space = policy.action_space_struct
        scale, k = ActionScale(space.low, space.high), None
        if isinstance(policy, QVPOTorchPolicy):
            # As from a bundle: the same bits, whatever engine it was trained with.
            k = policy.hp.k_eval
            policy = BestOfKPolicy(policy.networks, scale, k)
        parts = metadata.observation_parts
        return cls(
            source,
            metadata.env,
            decode_env_config(metadata.env_config),
            metadata.shapes[0],
            scale,
            k,
            # An earlier version had neither.
            metadata.hyperparameters.get("frame_skip", 1),
            tuple(metadata.hyperparameters.get("wrappers", ())),
            None if parts is None else ObservationParts.from_json(parts),
            policy,
            _takes_vectors(metadata.algorithm),
        )

    def act(
        self,
        obs: NDArray[np.floating],
        k: int | None = None,
        generator: Generator | None = None,
    ) -> NDArray[np.floating]:
        """Returns an action in the environment's box for each observation: [B, O] → [B, A].

        Args:
            k: actions drawn per observation, of which the best is taken; the policy's own if None.
            generator: of whatever is drawn, on the CPU; the policy's own if None.

        Raises:
            ValueError: wrong shape, or `k` for a policy that draws one action.
        """
        actions = self._policy.act(obs, k=k, generator=generator)
        return actions if isinstance(self._policy, BestOfKPolicy) else self.scale.to_env(actions)


def _takes_vectors(algorithm: str) -> bool:
    """Returns whether the workers of an algorithm, by its name in checkpoints, step vectors."""
    kinds = [entry.load().config_class for entry in ALGORITHMS.values() if entry.label == algorithm]
    return all(kind.takes_vectors for kind in kinds)


def find_checkpoint(path: Path) -> Path:
    """Returns the checkpoint meant by `path`: itself, or a run directory's best (else its last).

    A bundle is itself, whatever lies beside it: nothing in one is unpickled.

    Raises:
        ValueError: `path` is a run that has saved no checkpoint.
    """
    path = path.expanduser().absolute()
    if is_bundle(path):
        return path.resolve()
    in_run = path.is_file() and path.parent.name == named.CHECKPOINTS  # a name without a link
    found = (
        named.find(path.parents[1], path.name)
        if in_run
        else named.find(path, "best") or named.find(path, "last")
    )
    if found is None and (path / named.CHECKPOINTS).is_dir():
        raise ValueError(f"The run {str(path)!r} has saved no checkpoint.")
    return found or path.resolve()


def is_bundle(path: Path) -> bool:
    return os.path.lexists(path / DESCRIPTION_FILE)


class Checkpoint(NamedTuple):
    """A checkpoint's `qvpo.json` and the policy that it describes."""

    metadata: Metadata
    policy: Policy


def load_checkpoint(directory: Path) -> Checkpoint:
    """Returns a checkpoint's policy, which only acts, and on the CPU. This runs code that is in it.

    Raises:
        ValueError: there is no checkpoint, or it is a bundle, damaged, of another format, or
            contradictory.
    """
    if is_bundle(directory):
        raise ValueError(f"{str(directory)!r} is a bundle, not a checkpoint; nothing was loaded.")
    files = committed(directory)
    metadata = Metadata.read(files)
    metadata.check_files(files, under=POLICIES_DIRECTORY)
    logger.info("Loading the checkpoint %s, which runs code that is in it.", directory)
    with (files / POLICY_DIRECTORY / "policy_state.pkl").open("rb") as file:
        state = pickle.load(file)
    state["policy_spec"]["config"].update(ACTING_ONLY)
    policy = Policy.from_state(state)
    sizes = [policy.observation_space.shape[0], policy.action_space_struct.shape[0]]
    if metadata.shapes != sizes:
        raise ValueError(
            f"{directory} contradicts itself: its policy has observation and action sizes {sizes}, "
            f"its qvpo.json says {metadata.shapes}. It was changed, or put together from two."
        )
    return Checkpoint(metadata, policy)


def action_time_ms(run: Path) -> float | None:
    """Returns the median milliseconds of one observation's action, as in the paper's Table 4.

    It is measured on this machine with the best of `k_eval` actions where there is such a number.
    Loading a checkpoint runs code: load only your own.

    Args:
        run: the directory of a run or of a trial, whose newest checkpoint is loaded.

    Returns:
        None if the run has no checkpoint.
    """
    checkpoint = max(run.glob("checkpoint_*"), default=named.find(run, "last"))
    if checkpoint is None or not (checkpoint / POLICY_DIRECTORY).is_dir():
        return None
    policy = TrainedPolicy.load(checkpoint)
    generator = Generator()
    obs = np.zeros((1, policy.obs_dim), np.float32)
    times_s = []
    for _ in range(WARM_UP + REPEATS):
        start = time.perf_counter()
        policy.act(obs, None, generator)
        times_s.append(time.perf_counter() - start)
    return float(np.median(times_s[WARM_UP:])) * 1e3
