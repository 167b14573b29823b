"""Named sets of QVPO's hyperparameters, and what is left to the task."""

from typing import Any, TypeVar

from qvpo_rllib.core.options import Options, options_of

H = TypeVar("H", bound=Options)

PRESETS: dict[str, dict[str, Any]] = {
    # The defaults of `Hyperparameters`: the paper's settings, with the authors' program where the
    # paper is silent and time limits bootstrapped.
    "default": {},
    # The letter of the paper: Table 2, Algorithm 1's order, the sum of Eq. 6 and Eq. 10.
    "paper": {
        "actor_lr": 3e-4,
        "hidden": (256, 256),
        "grad_clip": None,
        "entropy_reduction": "mean",
        "update_order": "policy_then_critic",
        "target_actor": False,
    },
    # The values of the authors' released program, its treatment of time limits included.
    "authors": {
        "k_target": 4,
        "entropy_weight": 0.02,
        "entropy_weight_end": 0.0,
        "entropy_weight_floor": 0.002,
        "truncation_as_terminal": True,
        "q_cut": 1.0,
    },
    # Locomotion on a laptop's CPU: about a hundredth of the default's sampling per update. So short
    # a run is limited by its critics and by what it has tried: critics and targets move faster,
    # with two updates per env step, and a behaviour of single samples explores more.
    "light": {
        "k_behavior": 1,
        "k_target": 2,
        "num_policy_samples": 8,
        "num_uniform_samples": 2,
        "entropy_weight": 0.1,
        "diffusion_steps": 5,
        "hidden": (256, 256),
        "actor_lr": 3e-4,
        "critic_lr": 1e-3,
        "adam_eps": 1e-8,
        "tau": 0.01,
        "batch_size": 128,
        "replay_capacity": 200_000,
        "warmup_steps": 5_000,
        "update_ratio": 2.0,
    },
    # The quick start: a small task in a few minutes on two cores.
    "quick": {
        "k_behavior": 1,
        "k_target": 1,
        "num_policy_samples": 16,
        "num_uniform_samples": 2,
        "entropy_weight": 0.05,
        "diffusion_steps": 5,
        "hidden": (64, 64),
        "actor_lr": 1e-3,
        "critic_lr": 1e-3,
        "tau": 0.02,
        "batch_size": 128,
        "replay_capacity": 50_000,
        "warmup_steps": 1_000,
        # Losses this small gain less by compiling than it takes.
        "engine": "native",
    },
}


def resolve_for_task(hp: Options, env_id: str) -> dict[str, Any]:
    """The options that `hp` leaves to the task ("none") and their values for `env_id`."""
    return hp.values_for_task(env_id)


def resolved_hyperparameters(config: Any, kind: type[H]) -> H:
    """The hyperparameters in a mapping that also has "env", with what is left to the task resolved.

    RLlib's `AlgorithmConfig` and a policy's config dict are such mappings.
    """
    values = {name: config[name] for name in options_of(kind)}
    return kind(**values).resolved_for(str(config["env"]))
