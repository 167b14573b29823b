"""The algorithms that `--algo` and an experiment file can name: one table."""

from dataclasses import dataclass
from functools import cached_property
from pkgutil import resolve_name
from typing import Any

from qvpo_rllib.core.options import Options, nearest


@dataclass(frozen=True)
class AlgorithmEntry:
    """Where an algorithm is. Its module, and with it Ray, is imported when it is needed.

    Attributes:
        label: its name in tables and figures, which a report needs where there is no Ray.
        home: "module:Class" of the RLlib algorithm.
    """

    label: str
    home: str

    def load(self) -> Any:
        """Returns the RLlib algorithm's class."""
        return resolve_name(self.home)

    @cached_property
    def hyperparameters(self) -> type[Options]:
        """The class of its options."""
        kind: type[Options] = self.load().config_class.hyperparameters_class
        return kind


ALGORITHMS = {
    "qvpo": AlgorithmEntry("QVPO", "qvpo_rllib.algorithms.qvpo:QVPO"),
    "dipo": AlgorithmEntry("DIPO", "qvpo_rllib.algorithms.dipo:DIPO"),
    "qsm": AlgorithmEntry("QSM", "qvpo_rllib.algorithms.qsm:QSM"),
    "td3": AlgorithmEntry("TD3", "qvpo_rllib.algorithms.td3:TD3"),
    "spo": AlgorithmEntry("SPO", "qvpo_rllib.algorithms.spo:SPO"),
    "ppo": AlgorithmEntry("PPO", "qvpo_rllib.algorithms.ppo:RivalPPO"),
    "sac": AlgorithmEntry("SAC", "qvpo_rllib.algorithms.sac:RivalSAC"),
}


def entry_of(name: str) -> AlgorithmEntry:
    """Returns an algorithm's entry. Raises `ValueError` with the nearest name if there is none."""
    if name not in ALGORITHMS:
        raise ValueError(
            f"There is no algorithm {name!r}.{nearest(name, ALGORITHMS)} It must be one of "
            f"{', '.join(ALGORITHMS)}."
        )
    return ALGORITHMS[name]
