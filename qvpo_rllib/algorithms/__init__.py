"""The algorithms an experiment can name: one table."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from qvpo_rllib.core.options import Options, check_name, options_of, parse_option


@dataclass(frozen=True)
class RunDefaults:
    """What a preset says about the run around the algorithm."""

    env: str
    env_steps: int
    eval_interval: int  # env steps
    num_envs: int  # per worker


RUN_DEFAULTS = {
    "quick": RunDefaults("InvertedPendulum-v5", 15_000, 1_000, 4),
    "light": RunDefaults("HalfCheetah-v5", 50_000, 2_500, 4),
    "default": RunDefaults("HalfCheetah-v5", 1_000_000, 10_000, 1),
    "paper": RunDefaults("HalfCheetah-v5", 1_000_000, 10_000, 1),
    "authors": RunDefaults("HalfCheetah-v5", 1_000_000, 10_000, 1),
}
# An on-policy batch comes from several environments, and takes more env steps to learn from.
ON_POLICY_RUNS = {
    **RUN_DEFAULTS,
    "light": RunDefaults("Hopper-v5", 200_000, 10_000, 8),
    "default": RunDefaults("HalfCheetah-v5", 1_000_000, 10_000, 8),
}


@dataclass(frozen=True, kw_only=True)
class AlgorithmEntry:
    """What an experiment needs to know of an algorithm. What is named is imported when needed.

    Attributes:
        label: its name in tables and figures.
        home: "module:Class" of the RLlib algorithm.
        hyperparameters_home: "module:Class" of its options.
        presets_home: "module:NAME" of its presets, named sets of options.
        runs: by preset.
        losses: learner metrics for the status line.
        decays: pairs (end, steps): where option `end` is set, `steps` is the run's env steps unless
            it is given.
        smoke: options that make it tiny.
    """

    label: str
    home: str
    hyperparameters_home: str
    presets_home: str
    runs: Mapping[str, RunDefaults]
    losses: tuple[str, ...] = ("critic_loss", "actor_loss")
    decays: tuple[tuple[str, str], ...] = ()
    smoke: Mapping[str, Any]

    def load(self) -> Any:
        """The RLlib algorithm's class."""
        return _load(self.home)

    def check_checkpoint(self, directory: Path) -> None:
        """Raises `ValueError` unless a run can go on from the checkpoint in `directory`."""
        self.load().check_checkpoint(directory)

    @cached_property
    def hyperparameters(self) -> type[Options]:
        kind: type[Options] = _load(self.hyperparameters_home)
        return kind

    @cached_property
    def presets(self) -> Mapping[str, Mapping[str, Any]]:
        found: Mapping[str, Mapping[str, Any]] = _load(self.presets_home)
        return found

    @property
    def fixed_by_checkpoint(self) -> tuple[str, ...]:
        """Options that a running trial cannot change (population-based training)."""
        names: tuple[str, ...] = getattr(self.hyperparameters, "fixed_by_checkpoint", ())
        return names

    def preset(self, name: str) -> Mapping[str, Any]:
        """Raises `ValueError` if the algorithm has no preset of that name."""
        if name not in self.presets:
            raise ValueError(
                f"{self.label} has no preset {name!r}: it must be one of {', '.join(self.presets)}."
            )
        return self.presets[name]

    def options(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Every option, checked, as JSON has it. Raises `ValueError`.

        Text such as "1e-4" and "none" counts as on the command line, except where text is meant.
        """
        known = options_of(self.hyperparameters)
        parsed = {}
        for name, value in values.items():
            check_name(name, self.hyperparameters)
            is_text = isinstance(value, str) and not known[name].metadata["choices"]
            parsed[name] = parse_option(name, value, self.hyperparameters) if is_text else value
        return _plain(self.hyperparameters(**parsed).to_dict())

    def for_task(self, options: Mapping[str, Any], env: str) -> dict[str, Any]:
        """The options with what they leave to the task ("none") filled in for `env`."""
        return _plain(self.hyperparameters(**options).resolved_for(env).to_dict())

    def for_run(
        self, options: Mapping[str, Any], env_steps: int, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The options with what moves over a run moving over all its `env_steps`.

        Args:
            given: the options that were chosen by hand, which stay.
        """
        moving = {
            steps: max(1, env_steps)
            for end, steps in self.decays
            if options[end] is not None and steps not in given
        }
        return {**options, **moving}


def entry_of(name: str) -> AlgorithmEntry:
    """Raises `ValueError` with the nearest name if there is no such algorithm."""
    if name not in ALGORITHMS:
        close = difflib.get_close_matches(name, ALGORITHMS, n=1)
        raise ValueError(
            f"There is no algorithm {name!r}."
            + (f" Did you mean {close[0]!r}?" if close else "")
            + f" It must be one of {', '.join(ALGORITHMS)}."
        )
    return ALGORITHMS[name]


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {n: list(v) if isinstance(v, tuple) else v for n, v in options.items()}


def _load(home: str) -> Any:
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)


TINY_REPLAY = {"hidden": [32, 32], "batch_size": 16, "warmup_steps": 160, "replay_capacity": 2000}
# Compiling would take longer than all the rest.
TINY_OFF_POLICY = {**TINY_REPLAY, "engine": "eager"}
TINY_ON_POLICY = {"hidden": [32, 32], "train_batch_size": 80, "minibatch_size": 40, "num_epochs": 2}

ALGORITHMS: dict[str, AlgorithmEntry] = {
    "qvpo": AlgorithmEntry(
        label="QVPO",
        home="qvpo_rllib.algorithms.qvpo:QVPO",
        hyperparameters_home="qvpo_rllib.core.hyperparameters:QVPOHyperparameters",
        presets_home="qvpo_rllib.core.hyperparameters:PRESETS",
        runs=RUN_DEFAULTS,
        decays=(("entropy_weight_end", "entropy_decay_steps"),),
        smoke={
            **TINY_OFF_POLICY,
            "diffusion_steps": 3,
            "num_policy_samples": 4,
            "num_uniform_samples": 2,
            "k_eval": 4,
        },
    ),
    "dipo": AlgorithmEntry(
        label="DIPO",
        home="qvpo_rllib.algorithms.dipo:DIPO",
        hyperparameters_home="qvpo_rllib.algorithms.dipo:DIPOHyperparameters",
        presets_home="qvpo_rllib.algorithms.dipo:PRESETS",
        runs=RUN_DEFAULTS,
        smoke={**TINY_OFF_POLICY, "diffusion_steps": 3, "action_steps": 2},
    ),
    "qsm": AlgorithmEntry(
        label="QSM",
        home="qvpo_rllib.algorithms.qsm:QSM",
        hyperparameters_home="qvpo_rllib.algorithms.qsm:QSMHyperparameters",
        presets_home="qvpo_rllib.algorithms.qsm:PRESETS",
        runs=RUN_DEFAULTS,
        smoke={**TINY_OFF_POLICY, "diffusion_steps": 3},
    ),
    "td3": AlgorithmEntry(
        label="TD3",
        home="qvpo_rllib.algorithms.td3:TD3",
        hyperparameters_home="qvpo_rllib.algorithms.td3:TD3Hyperparameters",
        presets_home="qvpo_rllib.algorithms.td3:PRESETS",
        runs=RUN_DEFAULTS,
        smoke=TINY_OFF_POLICY,
    ),
    "spo": AlgorithmEntry(
        label="SPO",
        home="qvpo_rllib.algorithms.spo:SPO",
        hyperparameters_home="qvpo_rllib.algorithms.spo:SPOHyperparameters",
        presets_home="qvpo_rllib.algorithms.spo:PRESETS",
        runs=ON_POLICY_RUNS,
        losses=("policy_loss", "vf_loss"),
        decays=(("lr_end", "lr_decay_steps"),),
        smoke=TINY_ON_POLICY,
    ),
    "ppo": AlgorithmEntry(
        label="PPO",
        home="qvpo_rllib.algorithms.ppo:RivalPPO",
        hyperparameters_home="qvpo_rllib.algorithms.ppo:PPOHyperparameters",
        presets_home="qvpo_rllib.algorithms.ppo:PRESETS",
        runs=ON_POLICY_RUNS,
        losses=("policy_loss", "vf_loss"),
        decays=(("lr_end", "lr_decay_steps"),),
        smoke=TINY_ON_POLICY,
    ),
    "sac": AlgorithmEntry(
        label="SAC",
        home="qvpo_rllib.algorithms.sac:RivalSAC",
        hyperparameters_home="qvpo_rllib.algorithms.sac:SACHyperparameters",
        presets_home="qvpo_rllib.algorithms.sac:PRESETS",
        runs=RUN_DEFAULTS,
        smoke=TINY_REPLAY,
    ),
}
