"""A `gymnasium.vector.VectorEnv`: stepped as one batch, whichever way it begins new episodes."""

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from ray.rllib.env.vector_env import VectorEnv

from qvpo_rllib.core.errors import RAISED_BY_ENVIRONMENT, EnvironmentFailure, described
from qvpo_rllib.rollout.outcomes import BatchCheck

Infos = dict[str, Any]  # of all sub-environments: arrays by name, and masks by "_name"
FINAL = ("final_obs", "final_info")  # infos of an episode's last step, in the mode SAME_STEP


class BatchStep(NamedTuple):
    """What one step of E sub-environments brought.

    Attributes:
        obs: [E, O] float32, what the next actions are for.
        next_obs: [E, O] float32, what the step led to: the last observation of an episode that has
            ended.
        rewards: [E] float64.
        terminated, truncated: [E] bool.
        skipped: [E] bool, sub-environments that took no step but were reset instead.
        begun: [E] bool, those that begin an episode with `obs`.
        infos: of the step.
        last_infos: of the step, for those whose episode has ended.
        first_infos: for those that begin an episode.
    """

    obs: NDArray[np.float32]
    next_obs: NDArray[np.float32]
    rewards: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    skipped: NDArray[np.bool_]
    begun: NDArray[np.bool_]
    infos: Infos
    last_infos: Infos
    first_infos: Infos

    @property
    def ended(self) -> NDArray[np.bool_]:
        """[E] bool, the sub-environments whose episode ended with this step."""
        return (self.terminated | self.truncated) & ~self.skipped

    def info(self, i: int) -> dict[str, Any]:
        """Returns the info of sub-environment `i` for its step."""
        return info_of(self.last_infos if self.ended[i] else self.infos, i)


class EnvBatch(VectorEnv):  # type: ignore[misc]
    """Steps a vector environment, and hides which of Gymnasium's autoreset modes it has.

    RLlib takes it for a vector environment of its own, so that it makes no copies of it.

    - `SAME_STEP`: the step that ends an episode returns the next one's first observation; the last
      one is in `infos["final_obs"]`.
    - `DISABLED`: the sub-environments that have ended are reset, all at once, after each step.
    - `NEXT_STEP`: the next step resets a sub-environment instead of stepping it.

    Attributes:
        env: the vector environment.
        waiting: [E] bool, the sub-environments that the next step resets.

    Args:
        where: names the environment in messages.

    Raises:
        ValueError: it does not say how many sub-environments, which spaces or which mode it has.
    """

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any], where: str) -> None:
        spaces = [getattr(env, f"single_{kind}_space", None) for kind in ("observation", "action")]
        number = getattr(env, "num_envs", None)
        if not isinstance(number, int | np.integer) or number < 1 or None in spaces:
            raise ValueError(
                f"{where}: a vector environment needs the attributes num_envs (found {number!r}), "
                f"single_observation_space ({spaces[0]}) and single_action_space ({spaces[1]})."
            )
        super().__init__(*spaces, int(number))
        self.env, self.where = env, where
        # Read once: Gymnasium's own vectors write it into what all of a class share.
        self.mode = _mode_of(env, where)
        self.waiting = np.zeros(self.num_envs, bool)
        self._takes_list: bool | None = None  # of seeds; None: not known yet
        self._check = BatchCheck(self.observation_space, self.num_envs, where)

    @property
    def unwrapped(self) -> Any:
        return self.env.unwrapped

    @property
    def spec(self) -> EnvSpec | None:
        """Gymnasium's, if it was made by an id; what others call so is something else."""
        return self.env.spec if isinstance(self.env.spec, EnvSpec) else None

    def get_sub_environments(self) -> list[Any]:
        """Returns the vector environment in the place of each sub-environment."""
        return [self.env] * self.num_envs

    def close(self) -> None:
        self.env.close()

    def reset_all(self, seeds: list[int]) -> tuple[NDArray[np.float32], Infos]:
        """Begins an episode in every sub-environment; returns observations [E, O] and infos.

        Args:
            seeds: one for each; an environment that takes a single number gets the first.

        Raises:
            EnvironmentFailure: the environment raised.
            UnusableOutcome: it returned something else than declared.
        """
        self.waiting = np.zeros(self.num_envs, bool)
        return self._check.reset(self._reset_seeded(seeds))

    def step(self, actions: NDArray[np.floating]) -> BatchStep:
        """Steps every sub-environment by its row of actions [E, A], in the environment's units.

        Raises: as `reset_all`.
        """
        skipped = self.waiting
        try:
            returned = self.env.step(actions)
        except RAISED_BY_ENVIRONMENT as error:
            raise self._failure(error, "its step") from error
        obs, rewards, terminated, truncated, infos = self._check.step(returned)
        ended = terminated | truncated
        if (ended & skipped).any():
            raise self._check.error(
                "its step",
                "an end of an episode for a sub-environment that the step has reset",
                f"metadata['autoreset_mode'] is {self.mode}, where that step only resets it",
            )
        next_obs, begun = obs, skipped
        last_infos, first_infos = infos, infos
        if self.mode is AutoresetMode.NEXT_STEP:
            self.waiting = ended
        elif ended.any():
            begun = ended
            if self.mode is AutoresetMode.SAME_STEP:
                next_obs = obs.copy()
                next_obs[ended] = self._check.final_obs(infos, ended)
                last_infos = infos.get("final_info", {})
                first_infos = {k: v for k, v in infos.items() if k.removeprefix("_") not in FINAL}
            else:
                first, first_infos = self._reset_some(ended)
                obs = np.where(ended[:, None], first, obs)
        return BatchStep(
            obs,
            next_obs,
            rewards,
            terminated,
            truncated,
            skipped,
            begun,
            infos,
            last_infos,
            first_infos,
        )

    def _reset_seeded(self, seeds: list[int]) -> Any:
        if self._takes_list is not False:
            try:
                returned = self.env.reset(seed=list(seeds))
                self._takes_list = True
                return returned
            except RAISED_BY_ENVIRONMENT as error:
                if self._takes_list:
                    raise self._failure(error, "its reset") from error
        try:
            returned = self.env.reset(seed=seeds[0])
        except RAISED_BY_ENVIRONMENT as error:
            raise self._failure(error, "its reset") from error
        self._takes_list = False
        return returned

    def _reset_some(self, ended: NDArray[np.bool_]) -> tuple[NDArray[np.float32], Infos]:
        try:
            returned = self.env.reset(options={"reset_mask": ended.copy()})
        except RAISED_BY_ENVIRONMENT as error:
            raise self._failure(error, "its reset by a reset_mask") from error
        return self._check.reset(returned)

    def _failure(self, error: BaseException, when: str) -> EnvironmentFailure:
        return EnvironmentFailure(f"{self.where}: {described(error)} (in {when})")


def as_batch(env: Any, where: str) -> Any:
    """Returns a vector environment as an `EnvBatch`, and any other as it is."""
    return EnvBatch(env, where) if isinstance(env, gym.vector.VectorEnv) else env


def check_number(batch: EnvBatch, config: Any) -> None:
    """Refuses settings of a rollout worker that do not fit its vector environment.

    An evaluation takes as many sub-environments as there are.

    Raises:
        ValueError: it has another number of sub-environments, or cannot replace one that raised.
    """
    asked = config.num_envs_per_env_runner
    if batch.num_envs != asked and not config.in_evaluation:
        raise ValueError(wrong_number(batch, asked))
    if config.restart_failed_sub_environments:
        raise ValueError(
            f"restart_failed_sub_environments=True is not possible with {batch.where}: a vector "
            "environment that raises is lost as a whole. Remote workers (num_env_runners) are "
            "restarted."
        )


def wrong_number(batch: EnvBatch, asked: int) -> str:
    """Returns the message for a vector environment of another size than a worker asked for."""
    return (
        f"{batch.where}: the vector environment has num_envs={batch.num_envs}, but "
        f"num_envs_per_env_runner={asked}. Set num_envs_per_env_runner={batch.num_envs}, or let "
        "what makes the environment take an argument `num_envs`, which is then "
        "num_envs_per_env_runner."
    )


def not_for_rllib(env: str) -> str:
    """Returns the message for an algorithm whose rollout workers are RLlib's own."""
    return (
        f"{env} is a vector environment (gymnasium.vector.VectorEnv), which RLlib's own rollout "
        "workers cannot step: they make num_envs_per_env_runner single environments. PPO, SPO and "
        "SAC need a single environment; QVPO, DIPO, QSM and TD3 take this one."
    )


def info_of(infos: Infos, i: int) -> dict[str, Any]:
    """Returns the info of sub-environment `i` alone.

    A name's mask, "_name", says which sub-environments have it; without one all have.
    """
    if not isinstance(infos, dict):  # an array of dictionaries, as some make `final_info`
        return infos[i] or {}
    found = {}
    for name, value in infos.items():
        mask = infos.get(f"_{name}")
        is_mask = name.startswith("_") and name[1:] in infos
        if is_mask or (mask is not None and not mask[i]):
            continue
        if isinstance(value, dict):
            found[name] = info_of(value, i)
        else:
            is_column = getattr(value, "ndim", 0) and len(value) > i
            found[name] = value[i] if is_column else value
    return found


def _mode_of(env: gym.vector.VectorEnv[Any, Any, Any], where: str) -> AutoresetMode:
    declared = env.metadata.get("autoreset_mode")
    try:
        return AutoresetMode(declared)
    except ValueError:
        raise ValueError(
            f"{where}: metadata['autoreset_mode'] of the vector environment is {declared!r}, but "
            "it must say how episodes begin, as gymnasium.vector.AutoresetMode: NEXT_STEP (the "
            "step after an episode's last resets the sub-environment, as EnvPool does), SAME_STEP "
            "(the last step does, and infos['final_obs'] has its observation) or DISABLED "
            "(reset(options={'reset_mask': …}) does)."
        ) from None
