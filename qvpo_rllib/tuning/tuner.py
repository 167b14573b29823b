"""From an experiment to a Ray Tune `Tuner`: trials, search, scheduler, checkpoints."""

import dataclasses
import functools
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import SearchAlgorithm, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.sample import Domain

from qvpo_rllib.algorithms import entry_of
from qvpo_rllib.core.options import OptionValue, Setting
from qvpo_rllib.runtime.base import SCORE
from qvpo_rllib.runtime.ray_private import check_resources
from qvpo_rllib.training.trackers import require
from qvpo_rllib.tuning.interruption import PausingASHA, PausingFIFO, PausingPBT
from qvpo_rllib.tuning.search_space import Planned
from qvpo_rllib.tuning.spec import ExperimentSpec

STEPS = "num_env_steps_sampled_lifetime"
EVALUATION = "evaluation/env_runners/episode_return_mean"
DRAWS_PER_SETTING = 20  # until one that is new is found


def build_tuner(
    spec: ExperimentSpec,
    algorithm: str | None = None,
    *,
    directory: Path | str | None = None,
    callbacks: Sequence[tune.Callback] = (),
) -> tune.Tuner:
    """Returns a `Tuner` for the trials of one algorithm; call its `fit()`.

    One Tune iteration is one evaluation interval, so every result has an evaluation.

    Args:
        algorithm: which of `spec.algorithms`; may be left out if there is one.
        directory: where the trials go, by default `<storage>/<name>/<algorithm>/tune`.
        callbacks: of Ray Tune, beside its own loggers (JSON, CSV, TensorBoard).
    """
    if algorithm is None:
        if len(spec.algorithms) > 1:
            raise ValueError(
                f"The experiment {spec.name!r} has several algorithms: build one Tuner for each of "
                f"{', '.join(spec.algorithms)}."
            )
        algorithm = spec.algorithms[0]
    if directory is None:
        directory = Path(spec.storage) / spec.name / algorithm / "tune"
    directory = Path(directory).expanduser().absolute()
    space = fixed_config(spec, algorithm)
    search, num_samples, scheduler = _search(spec, algorithm, space)
    left_out = spec.left_out(algorithm)
    name_of_trial = functools.partial(_trial_name, swept=spec.swept, left_out=left_out)
    return tune.Tuner(
        entry_of(algorithm).load(),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=num_samples,
            # Tune limits a searcher so, but leaves `BasicVariantGenerator` to limit itself.
            max_concurrent_trials=(spec.max_concurrent if spec.search.method == "optuna" else None),
            trial_name_creator=name_of_trial,
            trial_dirname_creator=name_of_trial,
        ),
        run_config=tune.RunConfig(
            name=directory.name,
            storage_path=str(directory.parent),
            stop={STEPS: spec.env_steps},
            failure_config=tune.FailureConfig(max_failures=spec.max_failures),
            checkpoint_config=_checkpoints(spec),
            callbacks=list(callbacks),
            verbose=0,
        ),
    )


def fixed_config(spec: ExperimentSpec, algorithm: str) -> dict[str, Any]:
    """Returns the settings that all trials share, by RLlib's names."""
    return {
        **spec.options(algorithm).to_json(),
        "env": spec.tasks[0],
        "env_config": spec.env_config,
        "seed": spec.seeds[0],
        "num_env_runners": spec.num_env_runners,
        "num_envs_per_env_runner": spec.num_envs_per_env_runner,
        "num_cpus_for_main_process": spec.num_cpus,
        "num_gpus": spec.num_gpus,
        "min_sample_timesteps_per_iteration": spec.evaluation_interval,
        "metrics_num_episodes_for_smoothing": 10,
        "evaluation_interval": 1,
        "evaluation_duration": spec.evaluation_episodes,
        "evaluation_config": {
            "explore": False,
            "num_envs_per_env_runner": min(10, spec.evaluation_episodes),
        },
        "replay_in_checkpoints": spec.checkpoint_replay,
        "callbacks_class": ScoreCallback,
        "log_level": "ERROR",
    }


def check_trial_resources(spec: ExperimentSpec) -> None:
    """As `check_resources` for one trial; those beyond it may wait for others to end."""
    for algorithm in spec.algorithms:
        request = entry_of(algorithm).load().default_resource_request(fixed_config(spec, algorithm))
        check_resources(
            request.bundles,
            f"That is for one trial of {algorithm}: lower num_cpus, num_gpus or num_env_runners in "
            "the experiment's file, or add nodes.",
        )


def whole_space(spec: ExperimentSpec, algorithm: str) -> dict[str, Any]:
    """Returns the settings that all trials share, and distributions of the others.

    A search that goes on makes new trials, and Tune keeps no classes for them: it asks for these.
    """
    space = fixed_config(spec, algorithm)
    _search(spec, algorithm, space)
    return space


def planned_trials(spec: ExperimentSpec, algorithm: str) -> list[Setting] | None:
    """Returns what sets each trial apart (env, seed, swept options); None if the search decides.

    Seeds are the outermost loop: an experiment that is cut short has every setting with the same
    seeds rather than some settings with all of them.
    """
    if spec.search.method == "optuna":
        return None
    typed = [(spec.options(algorithm, s).to_json(), s) for s in drawn_settings(spec)]
    left_out = spec.left_out(algorithm)
    drawn = [{**left_out, **{n: options[n] for n in setting}} for options, setting in typed]
    if spec.search.method == "pbt":  # members start from drawn settings
        return [
            {"env": spec.tasks[0], "seed": seed, **setting}
            for seed, setting in zip(spec.seeds, drawn, strict=True)
        ]
    return [
        {"env": task, "seed": seed, **setting}
        for seed in spec.seeds
        for task in spec.tasks
        for setting in drawn
    ]


def drawn_settings(spec: ExperimentSpec) -> list[Setting]:
    """Returns every setting of the sweep; those from a space depend on `search.seed` alone.

    They are drawn beforehand, so that each runs with every seed and a resumed experiment has the
    same ones. No two are equal, but for a population's members: a space of fewer settings than are
    to be drawn gives those that were found.
    """
    if not spec.space:
        return [dict(setting) for setting in spec.settings]
    population = spec.search.method == "pbt"
    number = len(spec.seeds) if population else spec.search.num_samples or 0
    random = np.random.RandomState(spec.search.seed)
    drawn: list[Setting] = []
    for _ in range(number * DRAWS_PER_SETTING):
        found = {n: d.domain().sample(random_state=random) for n, d in spec.space.items()}
        setting = {n: v.item() if hasattr(v, "item") else v for n, v in found.items()}
        if population or setting not in drawn:
            drawn.append(setting)
        if len(drawn) == number:
            break
    return drawn


def confirmation_spec(spec: ExperimentSpec, settings: Sequence[Setting]) -> ExperimentSpec:
    """Returns the second stage: these settings, every one with the fresh seeds."""
    assert spec.confirm is not None
    return dataclasses.replace(
        spec,
        seeds=spec.confirm.seeds,
        settings=tuple(dict(s) for s in settings),
        space={},
        search=type(spec.search)(),
        confirm=None,
    )


def _search(
    spec: ExperimentSpec, algorithm: str, space: dict[str, Any]
) -> tuple[SearchAlgorithm | Searcher, int, TrialScheduler]:
    """Returns search algorithm, number of samples and scheduler.

    The swept options go into `space`.
    """
    if spec.search.method == "optuna":
        space |= _domains(spec, algorithm)
        return _optuna(spec), int(spec.search.num_samples or 0), PausingFIFO()
    points = planned_trials(spec, algorithm) or []
    for name in points[0]:
        # Tune takes points only for what varies; it keeps the order of the points.
        space[name] = Planned([point[name] for point in points])
    search = BasicVariantGenerator(
        points_to_evaluate=points,
        random_state=spec.search.seed,
        # Tune limits other searches itself. A population has to be there as a whole.
        max_concurrent=0 if spec.search.method == "pbt" else spec.max_concurrent or 0,
    )
    return search, len(points), _scheduler(spec, algorithm)


def _domains(spec: ExperimentSpec, algorithm: str) -> dict[str, Domain]:
    """Returns what Tune draws from; a choice of "none" or "1e-3" is a value of its option."""

    def typed(name: str, value: OptionValue) -> Any:
        return spec.options(algorithm, {name: value}).to_json()[name]

    return {
        name: tune.choice([typed(name, value) for value in d.values])
        if d.kind == "choice"
        else d.domain()
        for name, d in spec.space.items()
    }


def _scheduler(spec: ExperimentSpec, algorithm: str) -> TrialScheduler:
    search = spec.search
    if search.method == "asha":
        return PausingASHA(
            time_attr=STEPS,
            metric=EVALUATION,
            mode="max",
            max_t=spec.env_steps,
            grace_period=search.grace_steps or max(spec.evaluation_interval, spec.env_steps // 9),
            reduction_factor=search.reduction,
        )
    if search.method == "pbt":
        return PausingPBT(
            time_attr=STEPS,
            metric=EVALUATION,
            mode="max",
            perturbation_interval=search.interval_steps or max(1, spec.env_steps // 10),
            hyperparam_mutations=_domains(spec, algorithm),
            custom_explore_fn=functools.partial(_with_fresh_seed, mutated=tuple(spec.space)),
            quantile_fraction=search.quantile,
        )
    return PausingFIFO()


def _with_fresh_seed(config: dict[str, Any], mutated: Sequence[str]) -> dict[str, Any]:
    """Returns a member's configuration with a seed that follows from its seed and options.

    One that copies another copies its seed too, and would see the same environments.
    """
    options = zlib.crc32(repr([config[name] for name in mutated]).encode())
    sequence = np.random.SeedSequence([config["seed"], options])
    return {**config, "seed": int(sequence.generate_state(1)[0])}


def _optuna(spec: ExperimentSpec) -> Searcher:
    require("optuna", "search.method: optuna")
    from ray.tune.search.optuna import OptunaSearch

    # Optuna's own storage could not keep a list. Here Ray Tune pickles the search.
    warnings.filterwarnings("ignore", "Choices for a categorical distribution")
    return OptunaSearch(metric=EVALUATION, mode="max", seed=spec.search.seed)


def _checkpoints(spec: ExperimentSpec) -> tune.CheckpointConfig:
    """Keeps the best and the last; of a population a few, as members copy each other's."""
    population = spec.search.method == "pbt"
    return tune.CheckpointConfig(
        checkpoint_frequency=spec.checkpoint_every,
        checkpoint_at_end=True,
        num_to_keep=4 if population else 1,
        checkpoint_score_attribute=None if population else SCORE,
        checkpoint_score_order="max",
    )


def _trial_name(trial: Trial, swept: Sequence[str], left_out: Setting) -> str:
    """Returns a directory name such as "00003-Ant-v5-k_behavior=4-k_target=2-seed=0".

    Args:
        left_out: values that are not shown.
    """
    config, number = trial.config, trial.trial_id.rsplit("_", 1)[-1]
    shown = {n: config.get(n) for n in swept if n not in left_out or config.get(n) != left_out[n]}
    setting = [f"{n}={v:.4g}" if isinstance(v, float) else f"{n}={v}" for n, v in shown.items()]
    parts = [number, str(config["env"]), *setting, f"seed={config['seed']}"]
    return "".join(c if c.isalnum() or c in "-_.=" else "_" for c in "-".join(parts))[:150]


class ScoreCallback(RLlibCallback):  # type: ignore[misc]
    """Puts the evaluation return at the top level of a result, as the score of its checkpoint.

    Ray Tune 2.60 looks for it there alone: given a nested name, it keeps the last checkpoint and
    deletes the best, silently.
    """

    def on_train_result(self, *, algorithm: Any, result: dict[str, Any], **kwargs: Any) -> None:
        evaluation = result.get("evaluation", {}).get("env_runners", {})
        if "episode_return_mean" in evaluation:
            result[SCORE] = evaluation["episode_return_mean"]
