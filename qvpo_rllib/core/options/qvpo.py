"""QVPO's options, each once: default, allowed values, meaning; and the presets, sets of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from qvpo_rllib.core.options import (
    COUNT,
    NON_NEGATIVE,
    NON_NEGATIVE_COUNT,
    POSITIVE,
    SHARE,
    Options,
    Setting,
    option,
    options_of,
)
from qvpo_rllib.core.options.shared import DiffusionHyperparameters

# What `networks.new_critic` asks for beside the widths.
CRITIC_OPTIONS = ("critic", "num_quantiles", "dropped_quantiles", "critic_layer_norm")


@dataclass(frozen=True, kw_only=True)
class QVPOHyperparameters(DiffusionHyperparameters):
    """QVPO's options.

    Values follow the paper where it speaks and the authors' released program elsewhere; departures
    are listed in qvpo_rllib/README.md.
    """

    presets: ClassVar[Mapping[str, Setting]] = {
        # The paper's settings, with the authors' program where the paper is silent and time limits
        # bootstrapped.
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
        # Locomotion on a laptop's CPU: a three-hundredth of the default's sampling per update. So
        # short a run is limited by its critics and by what it has tried: critics and targets move
        # faster, and a behaviour of single samples explores more. Two steps along the critics'
        # gradient take the better of two samples further than the best of eight. Both
        # normalisations keep the policy from falling back (tune_configs/results).
        "light": {
            "k_behavior": 1,
            "k_target": 1,
            "num_policy_samples": 2,
            "target_refinement": "gradient",
            "gradient_steps": 2,
            "gradient_lr": 0.1,
            "num_uniform_samples": 2,
            "entropy_weight": 0.02,
            "diffusion_steps": 5,
            "hidden": (256, 256),
            "actor_lr": 3e-4,
            "critic_lr": 1e-3,
            "adam_eps": 1e-8,
            "tau": 0.01,
            "batch_size": 128,
            "replay_capacity": 200_000,
            "warmup_steps": 5_000,
            "critic": "quantile",
            "critic_layer_norm": True,
            "normalize_observations": True,
            # In float32 where the processor is faster so.
            "sampling_precision": "bf16",
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
        },
    }
    # K_t of the paper's Table 3.
    task_values: ClassVar[Mapping[str, Setting]] = {
        "Hopper": {"k_target": 1},
        "Walker2d": {"k_target": 2},
        "Ant": {"k_target": 2},
        "HalfCheetah": {"k_target": 4},
        "Humanoid": {"k_target": 2},
    }
    other_task_values: ClassVar[Setting] = {"k_target": 2}
    fixed_by_checkpoint: ClassVar[tuple[str, ...]] = (
        *DiffusionHyperparameters.fixed_by_checkpoint,
        *CRITIC_OPTIONS,
    )
    decays: ClassVar[tuple[tuple[str, str], ...]] = (("entropy_weight_end", "entropy_decay_steps"),)
    smoke: ClassVar[Setting] = {
        **DiffusionHyperparameters.smoke,
        "num_policy_samples": 4,
        "num_uniform_samples": 2,
        "kl_target": 1.0,
        "k_eval": 4,
    }

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
    entropy_weight: float | Literal["auto"] = option(
        0.01,
        "weight of the diffusion entropy term, Eq. 10; 0 turns it off; auto: it starts at 0.01 and "
        "follows the samples' spread, so that this stays at sample_std_target",
        "ω_ent",
        range=NON_NEGATIVE,
    )
    sample_std_target: float = option(
        0.2,
        "entropy_weight=auto: the standard deviation that the N_d samples of a state shall have in "
        "[-1, 1], as the metric sample_std; uniform actions have 0.58",
        range=SHARE,
    )
    entropy_weight_end: float | None = option(
        None,
        "none: constant; a number: entropy_weight moves linearly to it",
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
        "transformation of Q to the weights of Eq. 6; softmax trains all N_d samples, each with "
        "its share of exp(Q/λ); together they count for one action",
        "ω_eq",
        choices=("qadv", "qcut", "qrelu", "qexp", "softmax"),
    )
    q_cut: float = option(
        0.01, "qcut: the weight of an action whose Q is negative", "ε", range=POSITIVE
    )
    kl_target: float = option(
        2.0,
        "softmax: λ is learnt, from the first batch's scale of Q on, so that the shares' KL "
        "divergence from equal ones is this, in nats; below ln N_d",
        "KL*",
        range=POSITIVE,
    )
    target_refinement: str = option(
        "none",
        "moves the chosen samples to a higher Q before they are trained; V stays that of the "
        "unmoved ones. gradient: by steps of Adam, as in the authors' program with --gradient; "
        "guidance: their chain once more, with its last steps guided by the critics",
        choices=("none", "gradient", "guidance"),
    )
    gradient_steps: int = option(
        20, "gradient: how many steps; the authors' program has 20", range=COUNT
    )
    gradient_lr: float = option(
        0.03,
        "gradient: Adam's rate, about as far as an action moves in each dimension in a step",
        range=POSITIVE,
    )
    guidance_scale: float = option(
        0.1,
        "guidance: its strength; the gradient of Q is divided by the root of the running mean of "
        "(Q - V)², so that the scale of Q does not matter",
        "λ",
        range=NON_NEGATIVE,
    )
    guidance_steps: int = option(
        10, "guidance: how many of the chain's last steps; all, if it has fewer", range=COUNT
    )
    vlo_coefficient: bool = option(False, "keep Eq. 4's coefficient, which Eq. 5 drops")
    target_actor: bool = option(
        True, "TD targets use a moving average of the actor; false: the actor itself"
    )
    entropy_in_target: float | Literal["auto"] = option(
        0.0,
        "weight of the policy's entropy in the TD target: y = r + γ(1 - terminal)(min Q̄ - α ln p̂); "
        "0: none; auto: it is learnt, from 0.05, so that the entropy comes to target_entropy",
        "α",
        range=NON_NEGATIVE,
    )
    entropy_noises: int = option(
        10, "noises for each of the T steps from which ln p̂ of an action is estimated", range=COUNT
    )
    target_entropy: float | None = option(
        None,
        "entropy_in_target=auto: the policy's entropy in nats; none: minus the number of action "
        "dimensions, as in SAC; uniform actions have 0.69 for each",
    )
    update_order: str = option(
        "critic_then_policy",
        "critic_then_policy: each on a batch of its own, as in the authors' program; "
        "policy_then_critic: both on one batch, as in Algorithm 1",
        choices=("critic_then_policy", "policy_then_critic"),
    )
    policy_interval: int = option(
        1,
        "updates of critics and targets for one of the policy",
        range=COUNT,
    )
    sampling_precision: str = option(
        "fp32",
        "matrix products that draw an update's action samples (weights and losses stay fp32): "
        "tf32 needs an NVIDIA GPU",
        choices=("fp32", "tf32", "bf16"),
    )
    ranking_precision: str = option(
        "fp32",
        "matrix products that rank the policy's samples; the TD target's stay fp32: tf32 needs an "
        "NVIDIA GPU",
        choices=("fp32", "tf32"),
    )
    critic: str = option(
        "twin",
        "twin: two estimates of Q, the lower counts; quantile: num_quantiles quantiles of the "
        "return from each of two critics, Q is the mean of all but the highest (TQC); ranking is "
        "then never fused",
        choices=("twin", "quantile"),
    )
    num_quantiles: int = option(
        25, "critic=quantile: quantiles that each of the two predicts", "M", range=COUNT
    )
    dropped_quantiles: int = option(
        2,
        "critic=quantile: of the pooled quantiles the highest, so many for each of the two, do "
        "not count, in the TD target and in Q",
        "d",
        range=NON_NEGATIVE_COUNT,
    )
    critic_layer_norm: bool = option(
        False, "layer normalisation before each Mish of the critics; ranking is then never fused"
    )

    def check(self) -> None:
        chosen, drawn = self.num_chosen_samples, self.num_policy_samples
        if self.critic == "twin":
            need = "{} while the critics have no quantiles (critic is twin)"
            for name in ("num_quantiles", "dropped_quantiles"):
                default = options_of(type(self))[name].default
                self.require(name, getattr(self, name) == default, need.format(default))
        else:
            need = f"below num_quantiles={self.num_quantiles}"
            self.require("dropped_quantiles", self.dropped_quantiles < self.num_quantiles, need)
        if self.entropy_weight == "auto":
            need = (
                "with entropy_weight='auto', whose weight the spread moves and no schedule: set "
                "entropy_weight_end=none and entropy_weight_floor=0, also where a preset, such as "
                "authors, has others"
            )
            self.require("entropy_weight_end", self.entropy_weight_end is None, f"none {need}")
            self.require("entropy_weight_floor", self.entropy_weight_floor == 0, f"0 {need}")
            need = (
                "or more with entropy_weight='auto', which moves the entropy term by the spread of "
                "the policy's samples"
            )
            self.require("num_uniform_samples", self.num_uniform_samples >= 1, f"1 {need}")
            self.require("num_policy_samples", drawn >= 2, f"2 {need}")
        if self.entropy_weight_end is None:
            need = "0 while entropy_weight is constant (entropy_weight_end is none)"
            self.require("entropy_weight_floor", self.entropy_weight_floor == 0, need)
        self.require("num_chosen_samples", chosen <= drawn, f"at most num_policy_samples={drawn}")
        if self.q_weights == "softmax":
            need = "1 with q_weights='softmax', which trains all N_d samples"
            self.require("num_chosen_samples", chosen == 1, need)
            most = f"ln(num_policy_samples={drawn}) = {math.log(drawn):.4g}"
            need = f"below {most}, where one sample has all the weight"
            self.require("kl_target", self.kl_target < math.log(drawn), need)
            need = "'none' with q_weights='softmax', which trains all N_d samples as they are drawn"
            self.require("target_refinement", self.target_refinement == "none", need)
        if self.target_refinement == "guidance":
            need = "2 or more with target_refinement='guidance', which measures Q - V"
            self.require("num_policy_samples", drawn >= 2, need)
        has_use = self.target_entropy is None or self.entropy_in_target == "auto"
        need = "none unless entropy_in_target='auto', which alone has a target"
        self.require("target_entropy", has_use, need)
        super().check()

    @property
    def num_trained_samples(self) -> int:
        """The policy samples per state that Eq. 6 trains: all N_d with soft weights."""
        return self.num_policy_samples if self.q_weights == "softmax" else self.num_chosen_samples

    def entropy_weight_at(self, env_steps: int) -> float | None:
        """ω_ent after `env_steps` environment steps: constant, or linear with a floor.

        None where no schedule knows it, with "auto".
        """
        if self.entropy_weight == "auto":
            return None
        if self.entropy_weight_end is None:
            return self.entropy_weight
        share = min(1.0, env_steps / self.entropy_decay_steps)
        moving = self.entropy_weight + share * (self.entropy_weight_end - self.entropy_weight)
        return max(self.entropy_weight_floor, moving)


H = TypeVar("H", bound=Options)


def resolved_hyperparameters(config: Any, kind: type[H]) -> H:
    """Returns the options in a mapping that also has "env", whose values replace those left none.

    RLlib's `AlgorithmConfig` and a policy's config dict are such mappings. One of an earlier
    version may lack an option, which then has its default.
    """
    given = {name: config[name] for name in options_of(kind) if name in config}
    return kind.for_task(given, str(config["env"]))
