"""Options and presets that several rivals have in common."""

from dataclasses import dataclass

from qvpo_rllib.core.options import OptionValue, option, with_default
from qvpo_rllib.core.options.shared import DiffusionHyperparameters


@dataclass(frozen=True, kw_only=True)
class DiffusionRivalHyperparameters(DiffusionHyperparameters):
    """Options of the rivals whose policy is a diffusion chain."""

    actor_lr: float = with_default(DiffusionHyperparameters, "actor_lr", 3e-4)
    # Compiling their losses gained nothing on a CPU: gradients of Q take most of the time.
    engine: str = option(
        "native",
        "native: on a CPU the C++ library fits the critics, ranks actions, runs and fits DIPO's "
        "chain; eager: PyTorch's operations one by one, as all the rest is",
        choices=("native", "eager"),
    )


# Parts of the presets `light` and `quick` of the rivals that have a replay.
LIGHT: dict[str, OptionValue] = {
    "critic_lr": 1e-3,
    "batch_size": 128,
    "replay_capacity": 200_000,
    "warmup_steps": 5_000,
}
QUICK: dict[str, OptionValue] = {
    "hidden": (64, 64),
    "actor_lr": 1e-3,
    "critic_lr": 1e-3,
    "batch_size": 128,
    "replay_capacity": 50_000,
    "warmup_steps": 1_000,
}
