"""Shrinking any experiment to minutes on two cores, with the same shape."""

import dataclasses
from typing import Any

from qvpo_rllib.experiments.spec import Confirmation, ExperimentSpec

STEPS, INTERVAL = 480, 160
TRAINING: dict[str, Any] = {
    "hidden": [32, 32],
    "diffusion_steps": 3,
    "num_policy_samples": 4,
    "num_uniform_samples": 2,
    "k_eval": 4,
    "batch_size": 16,
    "warmup_steps": 160,
    "replay_capacity": 2000,
}
MAX_SEEDS, MAX_SETTINGS, MAX_SAMPLES = 2, 2, 3


def shrink(spec: ExperimentSpec) -> ExperimentSpec:
    """Tiny networks and few env steps, two seeds, two settings; swept options keep their values.

    Its name gets "-smoke", so that it never mixes with the real experiment. It says whether the
    whole path works, nothing about returns.
    """
    training = {**spec.training, **TRAINING}
    training = {name: value for name, value in training.items() if name not in spec.swept}
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
        seeds=spec.seeds[:MAX_SEEDS],
        settings=_spread(spec.settings),
        training=training,
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


def _spread(settings: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """The first and the last."""
    return settings if len(settings) <= MAX_SETTINGS else (settings[0], settings[-1])
