"""`policy.json`: what a bundle says of its policy, checked field by field before it is used."""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, NoReturn

import numpy as np

from qvpo_rllib.core.action_scale import ActionScale
from qvpo_rllib.core.observation_parts import ObservationParts
from qvpo_rllib.core.options import defaults_of
from qvpo_rllib.core.options.qvpo import CRITIC_OPTIONS, QVPOHyperparameters

FORMAT = "qvpo-policy"
FORMAT_VERSION = 1
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
MAX_DIMS = 65_536  # observation or action dimensions
MAX_STEPS = 10_000  # diffusion steps, and actions per observation
MAX_BYTES = 16 * 2**20  # a policy.json; Humanoid's takes 10 kB
MAX_NESTING = 32  # of a policy.json
MAX_NOISE = 2**26  # numbers drawn at once, T × K × A for an observation: 256 MiB
CRITIC_DEFAULTS = {name: defaults_of(QVPOHyperparameters)[name] for name in CRITIC_OPTIONS}
# Fields that the first bundles of this format version do not have: they have the defaults, which a
# bundle leaves out.
ADDED_SINCE = ("frame_skip", "wrappers", "obs_parts", "normalize_observations", *CRITIC_OPTIONS)
FLOATS = ("float16", "float32", "float64")


@dataclass(frozen=True, kw_only=True)
class Description:
    """Everything that acting with a policy needs beside its parameters, and where it came from.

    Raises `ValueError` when made with a value that is not allowed.
    """

    name: str  # the model's name when served
    version: str  # tells two policies of one name apart
    env: str
    env_config: dict[str, Any]  # as `encode_env_config` gives it
    obs_dim: int
    obs_dtype: str
    obs_low: list[float | None]  # [O]; None: unbounded. For the reader: nothing is clipped
    obs_high: list[float | None]
    act_low: list[float]  # [A]
    act_high: list[float]
    act_dtype: str
    hidden: list[int]
    diffusion_steps: int  # T
    noise_schedule: str
    k_behavior: int
    k_eval: int  # K unless a caller asks for another
    normalize_observations: bool = False  # by the moments among the parameters
    critic: str = CRITIC_DEFAULTS["critic"]
    num_quantiles: int = CRITIC_DEFAULTS["num_quantiles"]
    dropped_quantiles: int = CRITIC_DEFAULTS["dropped_quantiles"]
    critic_layer_norm: bool = CRITIC_DEFAULTS["critic_layer_norm"]
    frame_skip: int = 1  # env steps that each action is repeated for
    wrappers: list[str] = field(default_factory=list)  # of the environment, "module:function"
    # Of a Dict or Tuple observation, in the vector's order: `ObservationParts.to_json`.
    obs_parts: list[dict[str, Any]] | None = None
    source: dict[str, Any] = field(default_factory=dict)  # run, env steps, updates, seed, …
    versions: dict[str, str] = field(default_factory=dict)  # of the packages that wrote it
    created: str = ""  # ISO 8601, UTC

    def __post_init__(self) -> None:
        for name, (holds, allowed) in _RULES.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"{name}={_short(value)} is not allowed: it must be {allowed}.")
        sizes = {"obs_low": self.obs_dim, "obs_high": self.obs_dim, "act_high": self.act_dim}
        for name, size in sizes.items():
            if len(getattr(self, name)) != size:
                raise ValueError(f"{name} has {len(getattr(self, name))} numbers, not {size}.")
        if self.parts is not None and self.parts.size != self.obs_dim:
            raise ValueError(f"obs_parts have {self.parts.size} numbers, not {self.obs_dim}.")
        scale = self.action_scale
        if not (np.isfinite(scale.low).all() and np.isfinite(scale.high).all()):
            raise ValueError(f"act_low and act_high must be finite as {self.act_dtype}.")
        if not (scale.low < scale.high).all():
            raise ValueError(
                f"act_low must be below act_high in every dimension, as {self.act_dtype}."
            )
        with np.errstate(invalid="ignore"):  # infinity times zero
            middle = scale.to_env(np.zeros(self.act_dim))
        if not np.isfinite(middle).all():
            raise ValueError("act_low and act_high are too far apart.")
        k = max(self.k_eval, self.k_behavior)
        if k * self.noise_per_sample > MAX_NOISE:
            raise ValueError(
                f"diffusion_steps={self.diffusion_steps}, K = {k} and {self.act_dim} action "
                f"dimensions need more than {MAX_NOISE:,} random numbers for one action."
            )
        QVPOHyperparameters(  # the one home of what these may be
            hidden=tuple(self.hidden),
            diffusion_steps=self.diffusion_steps,
            noise_schedule=self.noise_schedule,
            k_behavior=self.k_behavior,
            k_eval=self.k_eval,
            **{name: getattr(self, name) for name in CRITIC_OPTIONS},
            frame_skip=self.frame_skip,
            wrappers=tuple(self.wrappers),
        )

    @cached_property
    def parts(self) -> ObservationParts | None:
        """What flattens the environment's Dict or Tuple observation; None if it is a vector.

        Raises:
            ValueError: `obs_parts` contradict one another.
        """
        if self.obs_parts is None:
            return None
        try:
            return ObservationParts.from_json(self.obs_parts)
        except ValueError as error:
            raise ValueError(f"obs_parts are not allowed: {error}.") from None

    @property
    def act_dim(self) -> int:
        return len(self.act_low)

    @property
    def noise_per_sample(self) -> int:
        """Random numbers that one of the K actions takes, T × A."""
        return self.diffusion_steps * self.act_dim

    @property
    def action_scale(self) -> ActionScale:
        """The map from the networks' [-1, 1] to the environment's box."""
        dtype = np.dtype(self.act_dtype)
        with np.errstate(over="ignore"):  # to infinity, which is not allowed
            return ActionScale(np.array(self.act_low, dtype), np.array(self.act_high, dtype))


def unsaid() -> dict[str, Any]:
    """Returns the values of the fields that a bundle leaves out."""
    found = {f.name: f for f in fields(Description)}
    return {
        n: [] if found[n].default is MISSING else found[n].default  # a list is made by a function
        for n in ADDED_SINCE
    }


def encode(description: Description, files: dict[str, str]) -> bytes:
    """Returns the text of `policy.json`.

    Args:
        files: SHA-256 in hexadecimal of every other file of the bundle, by name.
    """
    defaults = unsaid()
    said = {n: v for n, v in asdict(description).items() if n not in defaults or v != defaults[n]}
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **said, "sha256": files}
    content["digest"] = _digest(content)
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def decode(text: bytes) -> tuple[Description, dict[str, str]]:
    """Returns what `encode` was given. Raises `ValueError` that says what is wrong with it."""
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
        # Half a surrogate pair, which JSON may hold and UTF-8 may not, is for no reply.
        json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not _is_flat(content, MAX_NESTING):
        raise ValueError(f"it is nested more than {MAX_NESTING} levels deep")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it does not say format: {FORMAT!r}")
    if content.get("format_version") != FORMAT_VERSION:
        written_by = content.get("versions")
        version = written_by.get("qvpo_rllib") if isinstance(written_by, dict) else None
        raise ValueError(
            f"its format version is {_short(content.get('format_version'))}, written by qvpo_rllib "
            f"{_short(version)}, and this qvpo_rllib reads version {FORMAT_VERSION}: install a "
            "matching version, or export again"
        )
    if content.pop("digest", None) != _digest(content):
        raise ValueError("its digest does not fit its content: it was changed or cut short")
    files = content.pop("sha256", None)
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        raise ValueError("sha256 must map names of files to hexadecimal digests")
    del content["format"], content["format_version"]
    content = unsaid() | content
    names = {f.name for f in fields(Description)}
    wrong = sorted(names ^ content.keys())
    if wrong:
        raise ValueError(f"these fields are missing or unknown: {', '.join(map(_short, wrong))}")
    return Description(**content), files


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number in JSON")


def _is_flat(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_flat(item, levels - 1) for item in inner)


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(value: Any) -> bool:
    """Returns whether it is a finite number; an integer may be too large for a float."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_list(value: Any, most: int, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) <= most and all(map(holds, value))


# Whether a value is allowed, and what is.
_Rule = tuple[Callable[[Any], bool], str]
_TEXT: _Rule = (lambda value: isinstance(value, str), "a text")
_OBJECT: _Rule = (lambda value: isinstance(value, dict), "an object")
_NAME: _Rule = (
    lambda value: isinstance(value, str) and re.fullmatch(NAME_PATTERN, value) is not None,
    "1 to 64 letters, digits, dots, dashes and underscores",
)
_COUNT: _Rule = (lambda value: _is_count(value, MAX_STEPS), f"an integer from 1 to {MAX_STEPS}")
_BOUND: _Rule = (
    lambda value: _is_list(value, MAX_DIMS, lambda v: v is None or _is_number(v)),
    "a list of finite numbers or null",
)
_VECTOR: _Rule = (
    lambda value: value != [] and _is_list(value, MAX_DIMS, _is_number),
    "a list of finite numbers",
)
_RULES: dict[str, _Rule] = {
    "name": _NAME,
    "version": _NAME,
    "env": _TEXT,
    "env_config": _OBJECT,
    "obs_dim": (lambda value: _is_count(value, MAX_DIMS), f"an integer from 1 to {MAX_DIMS}"),
    "obs_dtype": _TEXT,
    "obs_low": _BOUND,
    "obs_high": _BOUND,
    "act_low": _VECTOR,
    "act_high": _VECTOR,
    "act_dtype": (lambda value: value in FLOATS, f"one of {', '.join(FLOATS)}"),
    "hidden": (
        lambda value: _is_list(value, 64, lambda v: _is_count(v, 2**20)),
        "a list of up to 64 positive integers",
    ),
    "diffusion_steps": _COUNT,
    "noise_schedule": _TEXT,
    "k_behavior": _COUNT,
    "k_eval": _COUNT,
    "normalize_observations": (lambda value: isinstance(value, bool), "true or false"),
    "critic": _TEXT,
    "num_quantiles": _COUNT,
    "dropped_quantiles": (lambda value: value == 0 or _is_count(value, MAX_STEPS), "0 or more"),
    "critic_layer_norm": (lambda value: isinstance(value, bool), "true or false"),
    "frame_skip": _COUNT,
    "wrappers": (
        lambda value: _is_list(value, 64, lambda v: isinstance(v, str)),
        "a list of texts",
    ),
    "obs_parts": (
        lambda value: value is None or _is_list(value, MAX_DIMS, lambda v: isinstance(v, dict)),
        "null or a list of objects",
    ),
    "source": _OBJECT,
    "versions": _OBJECT,
    "created": _TEXT,
}
