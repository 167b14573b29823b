"""What building an algorithm needs beside RLlib's parts: resources, a check, callbacks."""

from typing import Any

import numpy as np

from qvpo_rllib.rollout.environments import check_environment, name_of


def needed_by_workers(config: Any) -> list[dict[str, float]]:
    """Returns the resources of each remote worker, by Ray's names."""
    return [
        {
            "CPU": runners.num_cpus_per_env_runner,
            "GPU": runners.num_gpus_per_env_runner,
            **runners.custom_resources_per_env_runner,
        }
        for runners in (config, config.get_evaluation_config_object())
        for _ in range(runners.num_env_runners)
    ]


def check_evaluation_environment(config: Any, env: Any, policy: Any) -> None:
    """Refuses, before training, an evaluation's own environment that does not suit.

    Args:
        config: of the algorithm.
        env: an environment of the evaluation.
        policy: the policy that is trained.

    Raises:
        ValueError: its spaces are not possible, or other than those of training.
    """
    if not {"env", "env_config"} & (config.evaluation_config or {}).keys():
        return  # it is as training's
    name = f"{name_of(config.get_evaluation_config_object().env)} (evaluation)"
    check_environment(env, name)
    spaces = {
        "observations": (env.observation_space, policy.observation_space),
        "actions": (env.action_space, policy.action_space_struct),
    }
    for of, (space, trained) in spaces.items():
        if np.prod(space.shape) != np.prod(trained.shape):
            raise ValueError(
                f"{name} has {of} of shape {space.shape}, but {name_of(config.env)}, in "
                f"which {config.algorithm_name} trains, has {trained.shape}: the policy "
                "cannot be evaluated there."
            )


class WithoutInit:
    """Callbacks whose `on_algorithm_init` does nothing."""

    def __init__(self, callbacks: Any) -> None:
        self._callbacks = callbacks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callbacks, name)

    def on_algorithm_init(self, **arguments: Any) -> None:
        pass
