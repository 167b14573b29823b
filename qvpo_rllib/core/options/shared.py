"""Options that several algorithms have: of environments, of a replay, of a diffusion chain."""

from dataclasses import dataclass
from typing import ClassVar

from qvpo_rllib.core.options import (
    BELOW_ONE,
    COUNT,
    ENTRY_POINTS,
    NON_NEGATIVE_COUNT,
    POSITIVE,
    SHARE,
    WIDTHS,
    Options,
    Setting,
    option,
)

TINY_REPLAY: Setting = {
    "hidden": [32, 32],
    "batch_size": 16,
    "warmup_steps": 160,
    "replay_capacity": 2000,
}


@dataclass(frozen=True, kw_only=True)
class EnvironmentOptions(Options):
    """What every algorithm has: how its environment is wrapped."""

    fixed_by_checkpoint: ClassVar[tuple[str, ...]] = ("frame_skip", "wrappers")

    frame_skip: int = option(
        1,
        "env steps that each action is repeated for; rewards are summed, and returns and lengths "
        "of episodes are the env steps' own",
        range=COUNT,
    )
    wrappers: tuple[str, ...] = option(
        (),
        "functions, `module:function`, that wrap the environment, the first one innermost; "
        "`frame_skip` is around them all",
        range=ENTRY_POINTS,
    )


@dataclass(frozen=True, kw_only=True)
class OffPolicyHyperparameters(EnvironmentOptions):
    """What every algorithm has that learns from a replay on this package's runtime."""

    fixed_by_checkpoint: ClassVar[tuple[str, ...]] = (
        *EnvironmentOptions.fixed_by_checkpoint,
        "hidden",
        "normalize_observations",
    )
    # Compiling would take longer than all the rest.
    smoke: ClassVar[Setting] = {**TINY_REPLAY, "engine": "eager"}

    hidden: tuple[int, ...] = option(
        (256, 256, 256), "hidden layers of actor and critics", range=WIDTHS
    )
    actor_lr: float = option(1e-4, "Adam's learning rate for the actor", range=POSITIVE)
    critic_lr: float = option(3e-4, "Adam's learning rate for the critics", range=POSITIVE)
    adam_eps: float = option(1e-5, "Adam's epsilon, both optimisers", range=POSITIVE)
    grad_clip: float | None = option(
        2.0,
        "largest gradient norm of actor and of critics, each; none: no clipping",
        range=POSITIVE,
    )
    gamma: float = option(0.99, "discount factor", "γ", range=BELOW_ONE)
    n_step: int = option(
        1,
        "rewards summed in the TD target before it bootstraps; fewer at an episode's end and at "
        "the newest transition",
        "n",
        range=COUNT,
    )
    tau: float = option(
        0.005, "rate of the targets' moving average, every update", "τ", range=SHARE
    )
    batch_size: int = option(256, "transitions per batch", range=COUNT)
    replay_capacity: int = option(1_000_000, "transitions the replay holds", range=COUNT)
    warmup_steps: int = option(
        10_000,
        "env steps of uniformly random actions before any update",
        range=NON_NEGATIVE_COUNT,
    )
    update_ratio: float = option(1.0, "updates per env step after the warm-up", range=POSITIVE)
    truncation_as_terminal: bool = option(
        False, "true: a time limit ends the return, as in the authors' program (a known error)"
    )
    normalize_observations: bool = option(
        False, "by running mean and deviation of what training observes, clipped at 10"
    )
    engine: str = option(
        "auto",
        "how updates and action selection run; the numbers are the same. auto: a CUDA graph on a "
        "GPU; on a CPU native, or eager where no C++ compiler is found",
        choices=("auto", "eager", "native", "compiled", "cuda_graph"),
    )
    sampling_mode: str = option(
        "async",
        "remote workers: async: they go on while the learner updates; sync: in step with it, the "
        "same bits for the same seed. Without remote workers sampling is always in step",
        choices=("async", "sync"),
    )
    max_staleness: int | None = option(
        None,
        "async: fragments whose weights are more updates old than this are dropped and counted; "
        "none: all are taken in",
        range=NON_NEGATIVE_COUNT,
    )

    def check(self) -> None:
        self.require(
            "replay_capacity",
            self.replay_capacity >= max(self.batch_size, self.warmup_steps),
            f"at least batch_size={self.batch_size} and warmup_steps={self.warmup_steps}",
        )
        self.require(
            "n_step",
            self.n_step <= self.replay_capacity,
            f"at most replay_capacity={self.replay_capacity}",
        )


@dataclass(frozen=True, kw_only=True)
class DiffusionHyperparameters(OffPolicyHyperparameters):
    """What every algorithm has whose policy is a diffusion chain."""

    fixed_by_checkpoint: ClassVar[tuple[str, ...]] = (
        *OffPolicyHyperparameters.fixed_by_checkpoint,
        "diffusion_steps",
        "noise_schedule",
    )
    smoke: ClassVar[Setting] = {**OffPolicyHyperparameters.smoke, "diffusion_steps": 3}

    diffusion_steps: int = option(20, "steps of the diffusion chain", "T", range=COUNT)
    noise_schedule: str = option(
        "cosine",
        "variance schedule of the diffusion chain",
        "β_t",
        choices=("cosine", "linear", "vp"),
    )
