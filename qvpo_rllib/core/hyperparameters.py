"""Every hyperparameter of QVPO: its default, its meaning, the values it may take.

These dataclasses are the one home of the defaults. `QVPOConfig.training(...)`, the presets, YAML
files and `--set key=value` all read their names, types and values from here; for another algorithm
from its own subclass of `OffPolicyHyperparameters`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from qvpo_rllib.core import options
from qvpo_rllib.core.options import (
    BELOW_ONE,
    COUNT,
    NON_NEGATIVE,
    NON_NEGATIVE_COUNT,
    POSITIVE,
    SHARE,
    WIDTHS,
    Options,
    option,
    require,
)


@dataclass(frozen=True, kw_only=True)
class OffPolicyHyperparameters(Options):
    """What every algorithm has that learns from a replay on this package's runtime."""

    # Options that a checkpoint's networks depend on: another value cannot go on from it.
    fixed_by_checkpoint: ClassVar[tuple[str, ...]] = ("hidden",)

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
    engine: str = option(
        "auto",
        "how updates and action selection run; the numbers are the same. auto: a CUDA graph on a "
        "GPU; on a CPU compiled, or eager where no C++ compiler is found",
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
        require(
            "replay_capacity",
            self.replay_capacity,
            self.replay_capacity >= max(self.batch_size, self.warmup_steps),
            f"at least batch_size={self.batch_size} and warmup_steps={self.warmup_steps}",
        )


@dataclass(frozen=True, kw_only=True)
class DiffusionHyperparameters(OffPolicyHyperparameters):
    """What every algorithm has whose policy is a diffusion chain."""

    fixed_by_checkpoint: ClassVar[tuple[str, ...]] = ("hidden", "diffusion_steps", "noise_schedule")

    diffusion_steps: int = option(20, "steps of the diffusion chain", "T", range=COUNT)
    noise_schedule: str = option(
        "cosine",
        "variance schedule of the diffusion chain",
        "β_t",
        choices=("cosine", "linear", "vp"),
    )


@dataclass(frozen=True, kw_only=True)
class Hyperparameters(DiffusionHyperparameters):
    """QVPO's.

    Values follow the paper where it speaks and the authors' released program elsewhere; departures
    are listed in the README.
    """

    # K_t of the paper's Table 3.
    task_values: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "Hopper": {"k_target": 1},
        "Walker2d": {"k_target": 2},
        "Ant": {"k_target": 2},
        "HalfCheetah": {"k_target": 4},
        "Humanoid": {"k_target": 2},
    }
    other_task_values: ClassVar[Mapping[str, Any]] = {"k_target": 2}

    k_behavior: int = option(
        4, "actions drawn per state to act with; the best is taken", "K_b", range=COUNT
    )
    k_target: int | None = option(
        None,
        "actions drawn per next state for the TD target; none: the paper's value for the task, "
        "2 for other tasks",
        "K_t",
        range=COUNT,
    )
    k_eval: int = option(
        32, "actions drawn per state in evaluation; the best is taken", "K", range=COUNT
    )
    num_policy_samples: int = option(
        64, "policy samples per state in the policy update", "N_d", range=COUNT
    )
    num_chosen_samples: int = option(1, "best policy samples kept per state for Eq. 6", range=COUNT)
    num_uniform_samples: int = option(
        10,
        "uniform actions per state in the entropy term; 0 turns the term off",
        "N_e",
        range=NON_NEGATIVE_COUNT,
    )
    entropy_weight: float = option(
        0.01,
        "weight of the diffusion entropy term, Eq. 10; 0 turns it off",
        "ω_ent",
        range=NON_NEGATIVE,
    )
    entropy_weight_end: float | None = option(
        None,
        "none: constant; a number: entropy_weight moves linearly to it",
        "ω_ent",
        range=NON_NEGATIVE,
    )
    entropy_weight_floor: float = option(
        0.0, "a moving entropy_weight never falls below this", range=NON_NEGATIVE
    )
    entropy_decay_steps: int = option(
        1_000_000,
        "env steps over which entropy_weight moves to entropy_weight_end",
        range=COUNT,
    )
    entropy_reduction: str = option(
        "sum",
        "sum: best and uniform actions share one mean, so the entropy term counts N_e-fold, as in "
        "the authors' program; mean: the sum of the two expectations, Eq. 6 + Eq. 10",
        choices=("sum", "mean"),
    )
    q_weights: str = option(
        "qadv",
        "transformation of Q to the weights of Eq. 6",
        "ω_eq",
        choices=("qadv", "qcut", "qrelu", "qexp"),
    )
    q_cut: float = option(
        0.01, "qcut: the weight of an action whose Q is negative", "ε", range=POSITIVE
    )
    vlo_coefficient: bool = option(False, "keep Eq. 4's coefficient, which Eq. 5 drops")
    target_actor: bool = option(
        True, "TD targets use a moving average of the actor; false: the actor itself"
    )
    update_order: str = option(
        "critic_then_policy",
        "critic_then_policy: each on a batch of its own, as in the authors' program; "
        "policy_then_critic: both on one batch, as in Algorithm 1",
        choices=("critic_then_policy", "policy_then_critic"),
    )
    sampling_precision: str = option(
        "fp32",
        "matrix products that draw an update's action samples (weights and losses stay fp32): "
        "tf32 needs an NVIDIA GPU",
        choices=("fp32", "tf32", "bf16"),
    )

    def check(self) -> None:
        if self.entropy_weight_end is None:
            require(
                "entropy_weight_floor",
                self.entropy_weight_floor,
                self.entropy_weight_floor == 0,
                "0 while entropy_weight is constant (entropy_weight_end is none)",
            )
        require(
            "num_chosen_samples",
            self.num_chosen_samples,
            self.num_chosen_samples <= self.num_policy_samples,
            f"at most num_policy_samples={self.num_policy_samples}",
        )
        super().check()

    def entropy_weight_at(self, env_steps: int) -> float:
        """ω_ent after `env_steps` environment steps: constant, or linear with a floor."""
        if self.entropy_weight_end is None:
            return self.entropy_weight
        share = min(1.0, env_steps / self.entropy_decay_steps)
        moving = self.entropy_weight + share * (self.entropy_weight_end - self.entropy_weight)
        return max(self.entropy_weight_floor, moving)


# The words that QVPO's options of text may be.
CHOICES: dict[str, tuple[str, ...]] = {
    f.name: f.metadata["choices"]
    for f in dataclasses.fields(Hyperparameters)
    if f.metadata["choices"]
}


def option_names(kind: type[Options] = Hyperparameters) -> tuple[str, ...]:
    return tuple(options.options_of(kind))


def option_table(kind: type[Options] = Hyperparameters) -> str:
    """The options as a Markdown table, for the README."""
    return options.option_table(kind)


def check_name(name: str, kind: type[Options] = Hyperparameters) -> None:
    """Raises `ValueError` that suggests the nearest name if no option is called `name`."""
    options.check_name(name, kind)


def parse_option(name: str, text: str, kind: type[Options] = Hyperparameters) -> Any:
    """The value of option `name` as written on a command line ("1e-4", "none", "256,256")."""
    return options.parse_option(name, text, kind)
