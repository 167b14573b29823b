"""Experiment files: what they may say, what they become, and errors that point at the line."""

import itertools
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune import Experiment
from readmes import all_text, fenced
from vector_environments import Own

from qvpo_rllib.core.options import options_of
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.tuning.smoke import MAX_SEEDS, shrink
from qvpo_rllib.tuning.spec import ExperimentSpec
from qvpo_rllib.tuning.tuner import (
    _domains,
    _search,
    confirmation_spec,
    fixed_config,
    planned_trials,
)

FILES = sorted((Path(__file__).parents[1] / "tune_configs").glob("*.yaml"))
BASE: dict[str, Any] = {"name": "x", "task": "InvertedPendulum-v5", "preset": "quick"}


def spec_of(**values: Any) -> ExperimentSpec:
    return ExperimentSpec.from_dict({**BASE, **values})


# --- the shipped files -------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_file_is_valid_and_says_what_it_costs(file: Path) -> None:
    spec = ExperimentSpec.load(file)
    assert spec.name == file.stem
    head = file.read_text().split("name:")[0]
    for word in ("# Shows:", "# Costs:", f"qvpo tune tune_configs/{file.name}", "qvpo report"):
        assert word in head
    assert len(planned_trials(shrink(spec), "qvpo") or []) <= 12


def test_figure_5_and_figure_4_are_the_papers() -> None:
    trials = {f.stem: planned_trials(ExperimentSpec.load(f), "qvpo") for f in FILES}
    pairs = {(t["k_behavior"], t["k_target"]) for t in trials["k_sweep"]}
    assert pairs == {(1, 1), (4, 1), (4, 2), (4, 4), (20, 2)}
    assert {t["env"] for t in trials["k_sweep"]} == {"Ant-v5"}
    chains = {(t["diffusion_steps"], t["entropy_weight"] > 0) for t in trials["entropy_sweep"]}
    assert chains == {(20, True), (20, False), (100, True), (100, False)}


def test_the_readmes_experiment_file_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "readme.yaml"
    (example,) = fenced(all_text(), "yaml")
    file.write_text(example)
    trials = planned_trials(ExperimentSpec.load(file), "qvpo") or []
    assert len(trials) == 2 * 5 * 2 * 2


def test_training_takes_every_hyperparameter() -> None:
    values = {
        **QVPOHyperparameters().to_dict(),
        "hidden": [8],
        "k_target": 3,
        "wrappers": ["environments:halved"],
    }
    config = fixed_config(spec_of(training=values), "qvpo")
    assert {name: config[name] for name in options_of(QVPOHyperparameters)} == values


# --- what a file becomes -----------------------------------------------------------------------


def test_every_setting_runs_on_every_task_with_every_seed() -> None:
    tasks = ["InvertedPendulum-v5", "Hopper-v5"]
    spec = spec_of(
        task=tasks,
        seeds=[3, 1],
        sweep={"settings": [{"k_target": 1}, {"k_target": 2}], "grid": {"tau": [0.1, 1]}},
    )
    trials = planned_trials(spec, "qvpo")
    found = [(t["seed"], t["env"], t["k_target"], t["tau"]) for t in trials]
    assert found == list(itertools.product([3, 1], tasks, [1, 2], [0.1, 1.0]))


def test_drawn_settings_follow_from_the_search_seed_and_each_gets_every_seed() -> None:
    values = {
        "seeds": [0, 1],
        "sweep": {"space": {"entropy_weight": {"loguniform": [1e-3, 1e-1]}, "k_target": [1, 2]}},
    }
    first, again, other = (
        planned_trials(spec_of(**values, search={"num_samples": 4, "seed": seed}), "qvpo")
        for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other
    by_seed = [[{**t, "seed": None} for t in first if t["seed"] == seed] for seed in (0, 1)]
    assert by_seed[0] == by_seed[1]
    assert len({t["entropy_weight"] for t in by_seed[0]}) == 4
    assert all(1e-3 <= t["entropy_weight"] <= 1e-1 for t in first)


def test_no_setting_is_drawn_twice() -> None:
    sweep = {"space": {"k_target": [1, 2], "hidden": [[8], [16]]}}
    for number, found in ((3, 3), (50, 4)):
        trials = planned_trials(spec_of(sweep=sweep, search={"num_samples": number}), "qvpo")
        assert len({json.dumps(trial) for trial in trials}) == len(trials) == found
    members = {"method": "pbt", "interval_steps": 1000}
    alike = {"space": {"k_target": [1, 2]}}
    population = spec_of(seeds=list(range(8)), sweep=alike, search=members)
    assert len(planned_trials(population, "qvpo")) == 8  # those of a population may be alike


def test_defaults_are_the_presets_and_the_hyperparameters() -> None:
    config = fixed_config(spec_of(training={"actor_lr": "3e-4", "grad_clip": "none"}), "qvpo")
    values = {**QVPOHyperparameters.presets["quick"], "actor_lr": 3e-4, "grad_clip": None}
    expected = QVPOHyperparameters(**values).to_json()
    assert {name: config[name] for name in expected} == expected


def test_a_word_may_stand_for_a_number_in_training_and_in_a_sweep() -> None:
    training = {"entropy_weight": "auto"}
    assert fixed_config(spec_of(training=training), "qvpo")["entropy_weight"] == "auto"
    sweep = {"grid": {"entropy_in_target": ["auto", 0.1]}}
    trials = planned_trials(spec_of(sweep=sweep), "qvpo")
    assert {trial["entropy_in_target"] for trial in trials} == {"auto", 0.1}


def test_moving_entropy_weight_moves_over_the_whole_run() -> None:
    training = {"entropy_weight_end": 0.0}
    assert fixed_config(spec_of(training=training), "qvpo")["entropy_decay_steps"] == 15_000
    training |= {"entropy_decay_steps": 7}
    assert fixed_config(spec_of(training=training), "qvpo")["entropy_decay_steps"] == 7


def test_confirmation_runs_the_given_settings_on_fresh_seeds_alone() -> None:
    spec = spec_of(
        sweep={"space": {"k_target": [1, 2]}},
        search={"method": "asha", "num_samples": 4},
        confirm={"seeds": [7, 8]},
    )
    second = confirmation_spec(spec, [{"k_target": 2}])
    trials = planned_trials(second, "qvpo")
    assert [(t["seed"], t["k_target"]) for t in trials] == [(7, 2), (8, 2)]


def test_smoke_keeps_the_shape_and_the_swept_values() -> None:
    spec = ExperimentSpec.load(next(f for f in FILES if f.stem == "entropy_sweep"))
    small = shrink(spec)
    trials = planned_trials(small, "qvpo")
    assert {t["diffusion_steps"] for t in trials} == {20, 100}
    assert len({t["seed"] for t in trials}) == MAX_SEEDS
    assert small.env_steps < 1000
    assert small.num_gpus == 0
    assert small.name != spec.name


def test_smoke_keeps_the_number_of_a_vectors_environments() -> None:
    tune.register_env("vectors-of-six", lambda config: Own(num_envs=6))
    six: dict[str, Any] = {"workers": {"num_envs_per_env_runner": 6}, "env_steps": 18_000}
    six["evaluation"] = {"interval": 6_000}
    small = shrink(spec_of(task="vectors-of-six", **six))
    assert (small.num_envs_per_env_runner, small.evaluation_interval, small.env_steps) == (
        *(6, 162),
        486,
    )
    assert shrink(spec_of(**six)).num_envs_per_env_runner == 4  # many single ones


# --- what is refused ---------------------------------------------------------------------------

CASES = {
    "unknown key": ("seed: [1]", 4, "seed: there is no such key. Did you mean 'seeds'?"),
    "unknown option": ("training:\n  k_targt: 2", 5, "Did you mean 'k_target'?"),
    "option's value": ("training:\n  tau: 0.1\n  gamma: 2", 6, "gamma=2.0 is not allowed"),
    "swept value": ("sweep:\n  grid:\n    tau: [0.1, 3]", 6, "tau=3.0 is not allowed"),
    "seed twice": ("seeds:\n  - 1\n  - 2\n  - 1", 7, "seeds[2]: 1 is listed twice"),
    "number of seeds": ("seeds: 3", 4, "3 is not allowed: seeds are a list: [3] is that one"),
    "seed's type": ("seeds: [one]", 4, "'one' is not allowed: seeds are integers"),
    "key twice": ("seeds: [1]\nseeds: [2]", 5, "given twice"),
    "algorithm": ("algorithm: qpvo", 4, "it must be one of qvpo"),
    "steps": ("env_steps: 1500\nevaluation:\n  interval: 1000", 4, "multiple of the evaluation"),
    "interval": ("evaluation:\n  interval: 1002", 5, "multiple of 4, such as 1004"),
    "storage": ("storage: s3://bucket/x", 4, "it must be a directory"),
    "no number": ("env_steps: many", 4, "'many' is not allowed: it must be an integer of 1"),
    "gpus": ("resources:\n  num_gpus: 2", 5, "one GPU or a fraction"),
    "method": ("search:\n  method: ahsa", 5, "Did you mean 'asha'?"),
    "no space": ("search:\n  method: random\n  num_samples: 3", 5, "it needs sweep.space"),
    "asha's seeds": (
        "seeds: [0, 1]\nsweep:\n  grid:\n    tau: [0.1, 0.2]\nsearch:\n  method: asha",
        4,
        "it would keep lucky ones",
    ),
    "seen seed": ("seeds: [0, 1]\nconfirm:\n  seeds: [1, 2]", 6, "never saw"),
    "pbt's networks": (
        "seeds: [0, 1]\nsweep:\n  space:\n    diffusion_steps: [5, 10]\nsearch:\n  method: pbt",
        7,
        "pbt cannot change it",
    ),
    "pbt's environments": (
        "seeds: [0, 1]\nsweep:\n  space:\n    frame_skip: [1, 2]\nsearch:\n  method: pbt",
        7,
        "pbt cannot change it",
    ),
    "distribution": ("sweep:\n  space:\n    tau: {normal: [0, 1]}", 6, "one of choice, uniform"),
    "bounds": ("sweep:\n  space:\n    tau: {uniform: [1, 0]}", 6, "low < high"),
    "in both": ("training:\n  tau: 0.1\nsweep:\n  grid:\n    tau: [0.2, 0.3]", 5, "keep one"),
    "not yaml": ("seeds: [0, 1", 5, "this is not YAML"),
    "aliases": (
        "a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]\n"
        + "".join(
            f"{name}: &{name} [{', '.join([f'*{of}'] * 10)}]\n" for of, name in pairwise("abcdefgh")
        ),
        4,
        "aliases read",
    ),
    "merge key": ("training: {<<: {hidden: [16]}}", 4, "<<: merge keys are not read"),
    "aliases in a key": ("a: &a [0, 0]\n? [*a, *a]\n: 1", 5, "a key must be a word"),
    "an endless alias": ("a: &a [*a]", 4, "50 levels"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_file_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    text, line, message = CASES[case]
    file = tmp_path / "wrong.yaml"
    file.write_text(f"name: x\ntask: InvertedPendulum-v5\npreset: quick\n{text}\n")
    with pytest.raises(ValueError, match=r"wrong\.yaml") as error:
        ExperimentSpec.load(file)
    assert f"line {line}: " in str(error.value)
    assert message in str(error.value)


def test_a_missing_file_and_an_unknown_task_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        ExperimentSpec.load(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="Did you mean 'Hopper-v5'"):
        spec_of(task="Hoper-v5")


def test_a_vector_environment_that_no_trial_could_make_is_refused() -> None:
    tune.register_env("vectors-of-six", lambda config: Own(num_envs=6))
    with pytest.raises(ValueError, match=r"num_envs=6, but num_envs_per_env_runner=4\. Set"):
        spec_of(task="vectors-of-six")
    for wrapped in (
        {"training": {"frame_skip": 2}},
        {"sweep": {"grid": {"frame_skip": [1, 2]}}},
        {"sweep": {"space": {"frame_skip": [1, 2]}}, "search": {"num_samples": 1}},
    ):
        with pytest.raises(ValueError, match="is a vector environment, for which frame_skip=2"):
            spec_of(task="vector_environments:Own-v0", **wrapped)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: \0", "cannot be read"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b"#" * 2**20 + b"\n", "bytes"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ExperimentSpec.load(tmp_path / "bad.yaml")


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "numbers.yaml"
    file.write_text("name: x\npreset: quick\nenv_steps: 2e4\ntraining: {actor_lr: 1e-4}\n")
    spec = ExperimentSpec.load(file)
    assert (spec.env_steps, spec.training["actor_lr"]) == (20_000, 1e-4)


@pytest.mark.parametrize("method", ["optuna", "pbt"])
def test_choices_are_values_of_their_options_whatever_searches(method: str) -> None:
    space = {"grad_clip": ["none", "1e-1"], "hidden": [[8, 8], [16, 16]]}
    many = {"seeds": [0, 1]} if method == "pbt" else {}
    search = {"method": method, **({} if many else {"num_samples": 2})}
    if many:
        space.pop("hidden")  # a checkpoint fits one value
    spec = spec_of(sweep={"space": space}, search=search, **many)
    domains = _domains(spec, "qvpo")
    assert domains["grad_clip"].categories == [None, 0.1]
    for trial in planned_trials(spec, "qvpo") or []:
        assert trial["grad_clip"] in (None, 0.1)


def test_no_more_trials_at_a_time_than_the_file_says() -> None:
    spec = spec_of(seeds=[0, 1, 2], resources={"max_concurrent": 2})
    space: dict[str, Any] = {}
    search, number, _ = _search(spec, "qvpo", space)
    search.add_configurations([Experiment("x", "PPO", config=space, num_samples=number)])
    first, _, third = (search.next_trial() for _ in range(3))
    assert third is None
    search.on_trial_complete(first.trial_id)
    assert search.next_trial() is not None


@pytest.mark.parametrize("method", ["grid", "random", "optuna"])
def test_a_trial_gets_lists_and_none_as_they_are_written(method: str) -> None:
    if method == "optuna":
        pytest.importorskip("optuna", reason="the extra `optuna` is not installed")
    values = {"grad_clip": ["none", 2], "hidden": [[8], [16, 8], [4]]}
    sweep = {"grid" if method == "grid" else "space": values}
    samples = {} if method == "grid" else {"num_samples": 20}
    spec = spec_of(sweep=sweep, search={"method": method, **samples})
    space: dict[str, Any] = {}
    search, number, _ = _search(spec, "qvpo", space)
    if method == "optuna":
        search.set_search_properties(None, None, space)
        configs = [search.suggest(str(i)) for i in range(number)]
    else:
        search.add_configurations([Experiment("x", "PPO", config=space, num_samples=number)])
        configs = [search.next_trial().config for _ in range(number)]
        planned = planned_trials(spec, "qvpo") or []
        assert configs == [{**p, "hidden": list(p["hidden"])} for p in planned]
    assert {config["grad_clip"] for config in configs} == {None, 2.0}
    assert {tuple(config["hidden"]) for config in configs} == {(8,), (16, 8), (4,)}
