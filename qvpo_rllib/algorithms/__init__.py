"""The algorithms that `--algo` and an experiment file can name: one table."""

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from qvpo_rllib.core.options import Options, nearest

OFF_POLICY = "qvpo_rllib.training.trainee:OffPolicyTrainee"
RLLIB = "qvpo_rllib.training.trainee:Trainee"


@dataclass(frozen=True)
class AlgorithmEntry:
    """Where an algorithm is. Its module, and with it Ray, is imported when it is needed.

    Attributes:
        label: its name in tables and figures, which a report needs where there is no Ray.
        home: "module:Class" of the RLlib algorithm.
        trainee_home: "module:Class" of the `Trainee` that drives it.
    """

    label: str
    home: str
    trainee_home: str = OFF_POLICY

    def load(self) -> Any:
        """Returns the RLlib algorithm's class."""
        return _load(self.home)

    def trainee(self, algorithm: Any) -> Any:
        """What drives the built `algorithm` in a training run."""
        return _load(self.trainee_home)(algorithm)

    def check_checkpoint(self, directory: Path) -> None:
        """Raises `ValueError` unless a run can go on from the checkpoint in `directory`."""
        _load(self.trainee_home).check(directory)

    @cached_property
    def hyperparameters(self) -> type[Options]:
        """The class of its options."""
        kind: type[Options] = self.load().config_class.hyperparameters_class
        return kind


def _load(home: str) -> Any:
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)


ALGORITHMS = {
    "qvpo": AlgorithmEntry("QVPO", "qvpo_rllib.algorithms.qvpo:QVPO"),
    "dipo": AlgorithmEntry("DIPO", "qvpo_rllib.algorithms.dipo:DIPO"),
    "qsm": AlgorithmEntry("QSM", "qvpo_rllib.algorithms.qsm:QSM"),
    "td3": AlgorithmEntry("TD3", "qvpo_rllib.algorithms.td3:TD3"),
    "spo": AlgorithmEntry("SPO", "qvpo_rllib.algorithms.spo:SPO", RLLIB),
    "ppo": AlgorithmEntry("PPO", "qvpo_rllib.algorithms.ppo:RivalPPO", RLLIB),
    "sac": AlgorithmEntry("SAC", "qvpo_rllib.algorithms.sac:RivalSAC", RLLIB),
}


def entry_of(name: str) -> AlgorithmEntry:
    """Returns an algorithm's entry. Raises `ValueError` with the nearest name if there is none."""
    if name not in ALGORITHMS:
        raise ValueError(
            f"There is no algorithm {name!r}.{nearest(name, ALGORITHMS)} It must be one of "
            f"{', '.join(ALGORITHMS)}."
        )
    return ALGORITHMS[name]
