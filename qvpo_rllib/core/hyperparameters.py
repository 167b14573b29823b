"""Every hyperparameter of QVPO: its default, its meaning, the values it may take.

This dataclass is the one home of the defaults. `QVPOConfig.training(...)`, the presets, YAML files
and `--set key=value` all read their names, types and values from here.
"""

import dataclasses
import difflib
import math
import numbers
import typing
from dataclasses import dataclass, field
from typing import Any

CHOICES: dict[str, tuple[str, ...]] = {
    "q_weights": ("qadv", "qcut", "qrelu", "qexp"),
    "noise_schedule": ("cosine", "linear", "vp"),
    "entropy_reduction": ("sum", "mean"),
    "update_order": ("critic_then_policy", "policy_then_critic"),
    "engine": ("auto", "eager", "native", "compiled", "cuda_graph"),
    "sampling_precision": ("fp32", "tf32", "bf16"),
    "sampling_mode": ("async", "sync"),
}


def _option(default: Any, meaning: str, symbol: str = "") -> Any:
    return field(default=default, metadata={"meaning": meaning, "symbol": symbol})


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Immutable and checked when made: `ValueError` names a wrong value and what is allowed.

    Values follow the paper where it speaks and the authors' released program elsewhere; departures
    are listed in the README.
    """

    k_behavior: int = _option(4, "actions drawn per state to act with; the best is taken", "K_b")
    k_target: int | None = _option(
        None,
        "actions drawn per next state for the TD target; none: the paper's value for the task, "
        "2 for other tasks",
        "K_t",
    )
    k_eval: int = _option(32, "actions drawn per state in evaluation; the best is taken", "K")
    num_policy_samples: int = _option(64, "policy samples per state in the policy update", "N_d")
    num_chosen_samples: int = _option(1, "best policy samples kept per state for Eq. 6")
    num_uniform_samples: int = _option(
        10, "uniform actions per state in the entropy term; 0 turns the term off", "N_e"
    )
    entropy_weight: float = _option(
        0.01, "weight of the diffusion entropy term, Eq. 10; 0 turns it off", "ω_ent"
    )
    entropy_weight_end: float | None = _option(
        None, "none: constant; a number: entropy_weight moves linearly to it", "ω_ent"
    )
    entropy_weight_floor: float = _option(0.0, "a moving entropy_weight never falls below this")
    entropy_decay_steps: int = _option(
        1_000_000, "env steps over which entropy_weight moves to entropy_weight_end"
    )
    entropy_reduction: str = _option(
        "sum",
        "sum: best and uniform actions share one mean, so the entropy term counts N_e-fold, as in "
        "the authors' program; mean: the sum of the two expectations, Eq. 6 + Eq. 10",
    )
    q_weights: str = _option("qadv", "transformation of Q to the weights of Eq. 6", "ω_eq")
    q_cut: float = _option(0.01, "qcut: the weight of an action whose Q is negative", "ε")
    diffusion_steps: int = _option(20, "steps of the diffusion chain", "T")
    noise_schedule: str = _option("cosine", "variance schedule of the diffusion chain", "β_t")
    vlo_coefficient: bool = _option(False, "keep Eq. 4's coefficient, which Eq. 5 drops")
    hidden: tuple[int, ...] = _option((256, 256, 256), "hidden layers of actor and critics")
    actor_lr: float = _option(1e-4, "Adam's learning rate for the actor")
    critic_lr: float = _option(3e-4, "Adam's learning rate for the critics")
    adam_eps: float = _option(1e-5, "Adam's epsilon, both optimisers")
    grad_clip: float | None = _option(
        2.0, "largest gradient norm of actor and of critics, each; none: no clipping"
    )
    gamma: float = _option(0.99, "discount factor", "γ")
    tau: float = _option(0.005, "rate of the targets' moving average, every update", "τ")
    target_actor: bool = _option(
        True, "TD targets use a moving average of the actor; false: the actor itself"
    )
    update_order: str = _option(
        "critic_then_policy",
        "critic_then_policy: each on a batch of its own, as in the authors' program; "
        "policy_then_critic: both on one batch, as in Algorithm 1",
    )
    batch_size: int = _option(256, "transitions per batch")
    replay_capacity: int = _option(1_000_000, "transitions the replay holds")
    warmup_steps: int = _option(10_000, "env steps of uniformly random actions before any update")
    update_ratio: float = _option(1.0, "updates per env step after the warm-up")
    truncation_as_terminal: bool = _option(
        False, "true: a time limit ends the return, as in the authors' program (a known error)"
    )
    engine: str = _option(
        "auto",
        "how updates and action selection run; the numbers are the same. auto: a CUDA graph on a "
        "GPU; on a CPU compiled, or eager where no C++ compiler is found",
    )
    sampling_precision: str = _option(
        "fp32",
        "matrix products that draw an update's action samples (weights and losses stay fp32): "
        "tf32 needs an NVIDIA GPU",
    )
    sampling_mode: str = _option(
        "async",
        "remote workers: async: they go on while the learner updates; sync: in step with it, the "
        "same bits for the same seed. Without remote workers sampling is always in step",
    )
    max_staleness: int | None = _option(
        None,
        "async: fragments whose weights are more updates old than this are dropped and counted; "
        "none: all are taken in",
    )

    def __post_init__(self) -> None:
        if isinstance(self.hidden, list):
            object.__setattr__(self, "hidden", tuple(self.hidden))
        for name, kind in _types().items():
            object.__setattr__(self, name, _checked_type(name, getattr(self, name), kind))
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name in ("k_behavior", "k_eval", "num_policy_samples", "num_chosen_samples",
                     "diffusion_steps", "batch_size", "replay_capacity",
                     "entropy_decay_steps"):  # fmt: skip
            _require(name, getattr(self, name), getattr(self, name) >= 1, "an integer of 1 or more")
        if self.k_target is not None:
            _require("k_target", self.k_target, self.k_target >= 1, "an integer of 1 or more")
        if self.max_staleness is not None:
            holds = self.max_staleness >= 0
            _require("max_staleness", self.max_staleness, holds, "an integer of 0 or more, or none")
        for name in ("num_uniform_samples", "warmup_steps"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "an integer of 0 or more")
        for name in ("actor_lr", "critic_lr", "adam_eps", "update_ratio", "q_cut"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "a number above 0")
        for name in ("entropy_weight", "entropy_weight_end", "entropy_weight_floor"):
            value = getattr(self, name)
            if value is not None:
                _require(name, value, value >= 0, "a number of 0 or more")
        if self.entropy_weight_end is None:
            _require(
                "entropy_weight_floor",
                self.entropy_weight_floor,
                self.entropy_weight_floor == 0,
                "0 while entropy_weight is constant (entropy_weight_end is none)",
            )
        if self.grad_clip is not None:
            _require("grad_clip", self.grad_clip, self.grad_clip > 0, "a number above 0, or none")
        _require("gamma", self.gamma, 0 <= self.gamma < 1, "a number in [0, 1)")
        _require("tau", self.tau, 0 < self.tau <= 1, "a number in (0, 1]")
        _require(
            "hidden",
            self.hidden,
            len(self.hidden) >= 1 and all(width >= 1 for width in self.hidden),
            "a list of at least one width of 1 or more, such as [256, 256]",
        )
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name}={value!r} does not exist: it must be one of {', '.join(allowed)}."
                    + _nearest(value, allowed)
                )
        _require(
            "num_chosen_samples",
            self.num_chosen_samples,
            self.num_chosen_samples <= self.num_policy_samples,
            f"at most num_policy_samples={self.num_policy_samples}",
        )
        _require(
            "replay_capacity",
            self.replay_capacity,
            self.replay_capacity >= max(self.batch_size, self.warmup_steps),
            f"at least batch_size={self.batch_size} and warmup_steps={self.warmup_steps}",
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def entropy_weight_at(self, env_steps: int) -> float:
        """ω_ent after `env_steps` environment steps: constant, or linear with a floor."""
        if self.entropy_weight_end is None:
            return self.entropy_weight
        share = min(1.0, env_steps / self.entropy_decay_steps)
        moving = self.entropy_weight + share * (self.entropy_weight_end - self.entropy_weight)
        return max(self.entropy_weight_floor, moving)


def option_names() -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(Hyperparameters))


def option_table() -> str:
    """The options as a Markdown table, for the README."""
    rows = ["| option | symbol | default | meaning |", "|---|---|---|---|"]
    for f in dataclasses.fields(Hyperparameters):
        default = list(f.default) if isinstance(f.default, tuple) else f.default
        shown = "none" if default is None else str(default).lower()
        meaning, symbol = f.metadata["meaning"], f.metadata["symbol"]
        choices = f" ({', '.join(CHOICES[f.name])})" if f.name in CHOICES else ""
        rows.append(f"| `{f.name}` | {symbol} | `{shown}` | {meaning}{choices} |")
    return "\n".join(rows)


def check_name(name: str) -> None:
    """Raises `ValueError` that suggests the nearest name if no option is called `name`."""
    if name not in option_names():
        raise ValueError(
            f"There is no option {name!r}.{_nearest(name, option_names())}"
            f" The options are: {', '.join(option_names())}."
        )


def parse_option(name: str, text: str) -> Any:
    """The value of option `name` as written on a command line ("1e-4", "none", "256,256")."""
    check_name(name)
    kind = _types()[name]
    text = text.strip()
    if _optional(kind) and text.lower() in ("none", "null"):
        return None
    base = _base(kind)
    try:
        if base is bool:
            return {"true": True, "false": False}[text.lower()]
        if base is int:
            number = float(text)  # so that 1e6 and 1_000_000 are both understood
            if not number.is_integer():
                raise ValueError
            return int(number)
        if base is float:
            return float(text)
        if base is tuple:
            return tuple(int(part) for part in text.strip("[]() ").split(",") if part.strip())
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{name}={text!r} is not valid: it must be {_describe(kind)}.") from None
    return text


def _types() -> dict[str, Any]:
    return typing.get_type_hints(Hyperparameters)


def _optional(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


def _base(kind: Any) -> Any:
    if _optional(kind):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    return typing.get_origin(kind) or kind


def _describe(kind: Any) -> str:
    words = {
        int: "an integer",
        float: "a finite number",
        bool: "true or false",
        str: "a word",
        tuple: "a list of integers, such as [256, 256]",
    }[_base(kind)]
    return words + (" or none" if _optional(kind) else "")


def _checked_type(name: str, value: Any, kind: Any) -> Any:
    """`value` as the declared type (an integer is accepted for a float), or `ValueError`."""
    base = _base(kind)
    if value is None and _optional(kind):
        return None
    if not isinstance(value, bool):  # NumPy's numbers are as good as Python's
        if base is float and isinstance(value, numbers.Real):
            try:
                value = float(value)
            except OverflowError:
                value = math.inf
        if base is int and (
            isinstance(value, numbers.Integral) or (isinstance(value, float) and value.is_integer())
        ):
            value = int(value)
    valid = isinstance(value, base) and (base is bool or not isinstance(value, bool))
    if valid and base is float:
        valid = math.isfinite(value)
    if valid and base is tuple:
        valid = all(isinstance(p, numbers.Integral) and not isinstance(p, bool) for p in value)
        value = tuple(int(part) for part in value) if valid else value
    if not valid:
        raise ValueError(f"{name}={value!r} is not valid: it must be {_describe(kind)}.")
    return value


def _require(name: str, value: Any, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}.")


def _nearest(name: Any, names: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
