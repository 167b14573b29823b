"""The algorithms an experiment can name: one table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from qvpo_rllib.core.hyperparameters import CHOICES, Hyperparameters, check_name, parse_option
from qvpo_rllib.core.presets import PRESETS

# A checkpoint fits only an algorithm with the same networks and diffusion chain.
FIXED_BY_CHECKPOINT = ("hidden", "diffusion_steps", "noise_schedule")


@dataclass(frozen=True)
class AlgorithmEntry:
    """What an experiment needs to know of an algorithm.

    Attributes:
        label: its name in tables and figures.
        home: "module:Class" of the RLlib algorithm, imported when first needed.
        presets: named sets of training options.
        options: preset and training options → every option, checked. Raises `ValueError`.
        fixed_by_checkpoint: options that a running trial cannot change (population-based training).
    """

    label: str
    home: str
    presets: Mapping[str, Mapping[str, Any]]
    options: Callable[[Mapping[str, Any]], dict[str, Any]]
    fixed_by_checkpoint: tuple[str, ...] = ()

    def load(self) -> type:
        module, _, name = self.home.partition(":")
        found: type = getattr(import_module(module), name)
        return found


def _qvpo_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Text such as "1e-4" and "none" counts as on the command line, except where text is meant."""
    parsed = {}
    for name, value in values.items():
        check_name(name)
        is_text = isinstance(value, str) and name not in CHOICES
        parsed[name] = parse_option(name, value) if is_text else value
    options = Hyperparameters(**parsed).to_dict()
    options["hidden"] = list(options["hidden"])
    return options


ALGORITHMS: dict[str, AlgorithmEntry] = {
    "qvpo": AlgorithmEntry(
        label="QVPO",
        home="qvpo_rllib.algorithm:QVPO",
        presets=PRESETS,
        options=_qvpo_options,
        fixed_by_checkpoint=FIXED_BY_CHECKPOINT,
    ),
}
