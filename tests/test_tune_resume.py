"""What a resumed experiment tells Ray Tune, and what it drops of trials that Tune has lost."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train._internal.storage import StorageContext
from ray.tune import Experiment as TuneExperiment
from ray.tune.experiment import Trial
from ray.tune.logger import LoggerCallback
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.search_generator import SearchGenerator

from qvpo_rllib.training.rows import RETURN
from qvpo_rllib.tuning import results
from qvpo_rllib.tuning.experiment import Experiment
from qvpo_rllib.tuning.interruption import PausingASHA, PausingFIFO
from qvpo_rllib.tuning.ledger import TrialLedger
from qvpo_rllib.tuning.results import append_row, read_rows, read_trials, write_trials
from qvpo_rllib.tuning.spec import ExperimentSpec
from qvpo_rllib.tuning.tune_state import TUNE_DIRECTORY, callbacks_of
from qvpo_rllib.tuning.tuner import EVALUATION, _scheduler, _search

VALUES = {
    "name": "x",
    "task": "InvertedPendulum-v5",
    "preset": "quick",
    "env_steps": 900,
    "evaluation": {"interval": 100},
    "sweep": {"grid": {"tau": [0.1, 0.2]}},
    "resources": {"max_concurrent": 1},
}
ENTRY = {"name": "n", "directory": "d", "config": {}, "status": "running", "starts": []}


def spec_of(**changes: Any) -> ExperimentSpec:
    return ExperimentSpec.from_dict({**VALUES, **changes})


def write_rows(part: Path, trial: str, returns: dict[int, float]) -> None:
    results.prepare(part)
    for env_steps, value in returns.items():
        append_row(part, trial, {"env_steps": env_steps, RETURN: value})


# --- the ledger --------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> TrialLedger:
    """Of an experiment that goes on: trial "a" had begun."""
    entry = {**ENTRY, "config": {"env": "E", "seed": 0, "tau": 0.1}, "env_steps": 300, RETURN: 5.0}
    write_trials(tmp_path, {"a": {**entry, "time_total_s": 7.0, "starts": ["2026-01-01T00:00:00"]}})
    write_rows(tmp_path, "a", {100: 4.0, 300: 5.0})
    found = TrialLedger(tmp_path, ["tau"], env_steps=900, num_trials=1, title="x")
    found.trials = read_trials(tmp_path)
    return found


def trial_in(directory: str, **config: Any) -> Any:
    config = {"env": "E", "seed": 0, "tau": 0.1, **config}
    return SimpleNamespace(trial_id="a", path=f"/storage/{directory}", config=config)


def test_a_member_that_copies_another_stays_what_it_began_as(ledger: TrialLedger) -> None:
    """The report finds it by its first settings."""
    ledger.on_trial_start(trial=trial_in("d", seed=7, tau=0.3))
    [entry] = read_trials(ledger.directory).values()
    assert entry["config"] == {"env": "E", "seed": 0, "tau": 0.1}
    assert entry["env_steps"] == 300
    assert len(read_rows(ledger.directory, "a")) == 2


def test_of_a_trial_that_begins_again_elsewhere_nothing_stays(ledger: TrialLedger) -> None:
    ledger.on_trial_start(trial=trial_in("d_2", tau=0.3))
    [entry] = read_trials(ledger.directory).values()
    assert (entry["directory"], entry["config"]["tau"]) == ("d_2", 0.3)
    assert not {"env_steps", RETURN, "time_total_s"} & entry.keys()
    assert read_rows(ledger.directory, "a") == []


# --- search and scheduler ----------------------------------------------------------------------


def searched(spec: ExperimentSpec, storage: Path) -> Any:
    """A controller as schedulers are handed it, with a search that has begun."""
    space: dict[str, Any] = {"env": spec.tasks[0], "seed": spec.seeds[0]}
    search, number, _ = _search(spec, "qvpo", space)
    if spec.search.method == "optuna":
        search.set_search_properties(None, None, space)
        limit = spec.max_concurrent
        search = SearchGenerator(ConcurrencyLimiter(search, limit) if limit else search)
    experiment = TuneExperiment(
        "x", "PPO", config=space, num_samples=number, storage_path=str(storage)
    )
    search.add_configurations([experiment])
    context = StorageContext(storage, TUNE_DIRECTORY)
    return SimpleNamespace(
        search_alg=search, _tune_controller=SimpleNamespace(_storage=context), space=space
    )


def resumed(spec: ExperimentSpec, part: Path, before: Any, session: str = "2026-01-01") -> Any:
    """The controller of a later start, whose search has read what the earlier one saved."""
    (part / TUNE_DIRECTORY).mkdir(exist_ok=True)
    before.search_alg.save_to_dir(str(part / TUNE_DIRECTORY), session)
    found = searched(spec, part)
    found.search_alg.restore_from_dir(str(part / TUNE_DIRECTORY))
    return found


def test_a_search_does_not_wait_for_a_trial_that_has_ended(tmp_path: Path) -> None:
    before = searched(spec_of(), tmp_path)
    trial = before.search_alg.next_trial()
    controller = resumed(spec_of(), tmp_path, before)
    trial.status = Trial.PENDING
    PausingFIFO().on_trial_add(controller, trial)
    assert controller.search_alg.next_trial() is None  # it runs
    trial.status = Trial.TERMINATED
    PausingFIFO().on_trial_add(controller, trial)
    assert controller.search_alg.next_trial() is not None


@pytest.mark.parametrize("limit", [1, None])
def test_optuna_learns_from_a_trial_that_ended_after_tunes_last_save(
    tmp_path: Path, limit: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("optuna", reason="the extra `optuna` is not installed")
    spec = spec_of(
        sweep={"space": {"tau": {"uniform": [0.1, 0.2]}}},
        search={"method": "optuna", "num_samples": 3},
        resources={"max_concurrent": limit} if limit else {},
    )
    before = searched(spec, tmp_path)
    trial = before.search_alg.next_trial()
    write_rows(tmp_path, trial.trial_id, {100: 4.0, 900: 5.0})
    trial.status = Trial.TERMINATED
    for _ in range(2):  # a second restart has nothing to tell
        controller = resumed(spec, tmp_path, before)
        PausingFIFO().on_trial_add(controller, trial)
        searcher = controller.search_alg.searcher
        study = getattr(searcher, "searcher", searcher)._ot_study
        assert [(t.state.name, t.value) for t in study.trials] == [("COMPLETE", 5.0)]
        before = controller
    assert controller.search_alg.next_trial() is not None
    unknown = SimpleNamespace(trial_id="z", status=Trial.TERMINATED, storage=trial.storage)
    unknown.set_storage = lambda storage: None
    PausingFIFO().on_trial_add(controller, unknown)
    assert len(study.trials) == 2
    assert "already finished" not in caplog.text


def test_asha_compares_with_what_trials_reached_before_a_restart(tmp_path: Path) -> None:
    spec = spec_of(search={"method": "asha", "grace_steps": 100})
    controller = searched(spec, tmp_path)
    storage = StorageContext(tmp_path, TUNE_DIRECTORY)
    reached = {"a": {100: 1.0, 200: 2.0, 300: 3.0, 900: 9.0}, "b": {100: 10.0, 200: 20.0}, "c": {}}
    schedulers = [_scheduler(spec, "qvpo") for _ in range(2)]
    trials = [
        SimpleNamespace(
            trial_id=name, status=Trial.PENDING, storage=storage, set_storage=lambda storage: None
        )
        for name in reached
    ]
    for trial in trials:
        schedulers[0].on_trial_add(controller, trial)
        for env_steps, value in reached[trial.trial_id].items():
            result = {"num_env_steps_sampled_lifetime": env_steps, EVALUATION: value}
            schedulers[0].on_trial_result(controller, trial, result)
        write_rows(tmp_path, trial.trial_id, reached[trial.trial_id])
    for trial in trials:
        schedulers[1].on_trial_add(controller, trial)
    assert isinstance(schedulers[1], PausingASHA)
    rungs = [dict(scheduler._brackets[0]._rungs) for scheduler in schedulers]
    assert rungs[1] == rungs[0]
    assert rungs[1][100] == {"a": 1.0, "b": 10.0}
    assert rungs[1][300] == {"a": 3.0}
    worse = {"num_env_steps_sampled_lifetime": 100, EVALUATION: 0.0}
    assert schedulers[1].on_trial_result(controller, trials[2], worse) == "STOP"


# --- the experiment ----------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path: Path) -> Callable[..., tuple[Experiment, Path]]:
    """An experiment that was started, with these ids in Tune's state."""

    def make(**trials: str) -> tuple[Experiment, Path]:
        experiment = Experiment(spec_of(storage=str(tmp_path)))
        [part] = experiment.parts
        experiment._record(experiment.parts)
        experiment._fresh(part, [])
        directory = experiment.directory / part.name
        data = [[json.dumps({"trial_id": n, "status": s}), "{}"] for n, s in trials.items()]
        state = json.dumps({"trial_data": data, "runner_data": {}})
        (directory / TUNE_DIRECTORY / "experiment_state-2026-01-01.json").write_text(state)
        return experiment, directory

    return make


def test_trials_that_tune_has_lost_are_dropped_unless_they_have_ended(begun: Any) -> None:
    experiment, directory = begun(known="RUNNING", ended="TERMINATED")
    statuses = {"known": "running", "ended": "finished", "lost": "running", "broken": "failed",
                "stopped": "stopped early", "unknown": "finished"}  # fmt: skip
    write_trials(directory, {name: {**ENTRY, "status": s} for name, s in statuses.items()})
    for name in statuses:
        write_rows(directory, name, {100: 1.0})
    assert experiment._restored(experiment.parts[0]) is not None
    kept = ["ended", "known", "stopped", "unknown"]
    assert sorted(read_trials(directory)) == kept
    assert sorted(file.stem for file in (directory / "results").iterdir()) == kept


def test_a_logger_may_be_added_when_an_experiment_goes_on(begun: Any) -> None:
    class Logger(LoggerCallback):  # type: ignore[misc]
        pass

    experiment, _ = begun()
    tuner = experiment._restored(experiment.parts[0], [Logger()])
    assert [type(callback) for callback in callbacks_of(tuner)] == [TrialLedger, Logger]
    handed_on = tuner._local_tuner._get_tune_run_arguments(tuner._local_tuner.trainable)
    assert handed_on["callbacks"] == callbacks_of(tuner)


def test_results_without_tunes_state_are_not_deleted(begun: Any) -> None:
    """As of an experiment that was copied without its checkpoints."""
    experiment, directory = begun()
    (directory / TUNE_DIRECTORY / "experiment_state-2026-01-01.json").unlink()
    write_trials(directory, {"a": ENTRY})
    experiment._fresh(experiment.parts[0], [])  # no trial got to an evaluation
    write_trials(directory, {"a": ENTRY})
    write_rows(directory, "a", {100: 1.0})
    assert experiment._restored(experiment.parts[0]) is None
    with pytest.raises(ValueError, match=r"'tune' directory is missing.*another --storage"):
        experiment._fresh(experiment.parts[0], [])
    assert len(read_rows(directory, "a")) == 1


@pytest.mark.parametrize(("first", "second"), [({"goal": 1}, {}), ({}, {"goal": 1})])
def test_other_arguments_of_the_environment_are_another_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: dict[str, int], second: dict[str, int]
) -> None:
    monkeypatch.setattr("qvpo_rllib.tuning.spec._check_tasks", lambda spec: None)
    experiment = Experiment(spec_of(env_config=first, storage=str(tmp_path)))
    experiment._record(experiment.parts)
    Experiment(spec_of(env_config=first, storage=str(tmp_path)))
    with pytest.raises(ValueError, match="other values of env_config"):
        Experiment(spec_of(env_config=second, storage=str(tmp_path)))
