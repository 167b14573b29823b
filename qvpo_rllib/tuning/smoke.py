"""Shrinking any experiment to minutes on two cores, with the same shape."""

import dataclasses
import itertools

from ray.rllib.env.env_context import EnvContext

from qvpo_rllib.algorithms import entry_of
from qvpo_rllib.core.options import Setting
from qvpo_rllib.rollout.env_batch import EnvBatch
from qvpo_rllib.runtime.ray_private import environment_maker
from qvpo_rllib.tuning.spec import Confirmation, ExperimentSpec

# Env steps between evaluations, of which there are so many, and environments.
INTERVAL, EVALUATIONS, NUM_ENVS = 160, 3, 4
MAX_SEEDS, MAX_SETTINGS, MAX_SAMPLES = 2, 2, 3


def shrink(spec: ExperimentSpec) -> ExperimentSpec:
    """Tiny networks and few env steps, two seeds (of several algorithms one), two settings; swept
    options keep their values.

    Its name gets "-smoke", so that it never mixes with the real experiment. It says whether the
    whole path works, nothing about returns.
    """
    num_envs = NUM_ENVS
    if spec.num_envs_per_env_runner != NUM_ENVS and _steps_vectors(spec):
        num_envs = spec.num_envs_per_env_runner  # it may be able to make no other number
    interval = -(-INTERVAL // num_envs) * num_envs
    per_algorithm = {name: _tiny(spec, name) for name in spec.algorithms}
    search = dataclasses.replace(
        spec.search,
        num_samples=min(spec.search.num_samples, MAX_SAMPLES) if spec.search.num_samples else None,
        grace_steps=interval if spec.search.grace_steps else None,
        interval_steps=interval if spec.search.interval_steps else None,
    )
    confirm = spec.confirm and Confirmation(seeds=spec.confirm.seeds[:MAX_SEEDS], top=1)
    return dataclasses.replace(
        spec,
        name=f"{spec.name}-smoke",
        seeds=spec.seeds[: MAX_SEEDS if len(spec.algorithms) == 1 else 1],
        settings=_spread(spec.settings),
        training={},
        per_algorithm=per_algorithm,
        search=search,
        confirm=confirm,
        env_steps=EVALUATIONS * interval,
        evaluation_interval=interval,
        evaluation_episodes=2,
        num_env_runners=0,
        num_envs_per_env_runner=num_envs,
        num_cpus=1,
        num_gpus=0.0,
        checkpoint_every=1,
    )


def _steps_vectors(spec: ExperimentSpec) -> bool:
    """Returns whether any trial steps a vector environment, which only one that is made tells."""
    for task, way in itertools.product(spec.tasks, spec.made):
        number = spec.num_envs_per_env_runner if way.takes_vectors else None
        make = environment_maker(task, way.frame_skip, way.wrappers, num_envs=number)
        made = make(EnvContext(spec.env_config, worker_index=0))
        made.close()
        if isinstance(made, EnvBatch):
            return True
    return False


def _tiny(spec: ExperimentSpec, algorithm: str) -> Setting:
    tiny = {**spec.training_of(algorithm), **entry_of(algorithm).hyperparameters.smoke}
    return {name: value for name, value in tiny.items() if name not in spec.swept}


def _spread(settings: tuple[Setting, ...]) -> tuple[Setting, ...]:
    """The first and the last."""
    return settings if len(settings) <= MAX_SETTINGS else (settings[0], settings[-1])
