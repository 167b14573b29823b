"""Shrinking any experiment to minutes on two cores, with the same shape."""

import dataclasses

from qvpo_rllib.algorithms import entry_of
from qvpo_rllib.core.options import Setting
from qvpo_rllib.tuning.spec import Confirmation, ExperimentSpec

STEPS, INTERVAL = 480, 160
MAX_SEEDS, MAX_SETTINGS, MAX_SAMPLES = 2, 2, 3


def shrink(spec: ExperimentSpec) -> ExperimentSpec:
    """Tiny networks and few env steps, two seeds (of several algorithms one), two settings; swept
    options keep their values.

    Its name gets "-smoke", so that it never mixes with the real experiment. It says whether the
    whole path works, nothing about returns.
    """
    per_algorithm = {name: _tiny(spec, name) for name in spec.algorithms}
    search = dataclasses.replace(
        spec.search,
        num_samples=min(spec.search.num_samples, MAX_SAMPLES) if spec.search.num_samples else None,
        grace_steps=INTERVAL if spec.search.grace_steps else None,
        interval_steps=INTERVAL if spec.search.interval_steps else None,
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
        env_steps=STEPS,
        evaluation_interval=INTERVAL,
        evaluation_episodes=2,
        num_env_runners=0,
        num_envs_per_env_runner=4,
        num_cpus=1,
        num_gpus=0.0,
        checkpoint_every=1,
    )


def _tiny(spec: ExperimentSpec, algorithm: str) -> Setting:
    tiny = {**spec.training_of(algorithm), **entry_of(algorithm).hyperparameters.smoke}
    return {name: value for name, value in tiny.items() if name not in spec.swept}


def _spread(settings: tuple[Setting, ...]) -> tuple[Setting, ...]:
    """The first and the last."""
    return settings if len(settings) <= MAX_SETTINGS else (settings[0], settings[-1])
