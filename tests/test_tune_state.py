"""Ray Tune's state files: a driver killed while it writes them loses nothing."""

import inspect
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import ray.tune.tune
from ray.tune.callback import CallbackList
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.search_generator import SearchGenerator

from qvpo_rllib.tuning import tuner
from qvpo_rllib.tuning.experiment import Experiment
from qvpo_rllib.tuning.spec import ExperimentSpec
from qvpo_rllib.tuning.tune_state import (
    KEPT_DIRECTORY,
    TUNE_DIRECTORY,
    _kind_and_start,
    back_up,
    correct,
    has_state,
    repair,
)

STATE, SEARCH = "experiment_state-2026-01-01.json", "basic-variant-state-2026-01-01.json"


@pytest.fixture
def part(tmp_path: Path) -> Path:
    (tmp_path / TUNE_DIRECTORY).mkdir()
    (tmp_path / TUNE_DIRECTORY / "tuner.pkl").write_bytes(b"not a state")
    write(tmp_path, 1)
    return tmp_path


def write(part: Path, step: int) -> None:
    (part / TUNE_DIRECTORY / STATE).write_text(json.dumps({"step": step}))
    (part / TUNE_DIRECTORY / SEARCH).write_bytes(pickle.dumps({"step": step}))


def steps(part: Path) -> list[int]:
    directory = part / TUNE_DIRECTORY
    return [
        json.loads((directory / STATE).read_text())["step"],
        pickle.loads((directory / SEARCH).read_bytes())["step"],
    ]


@pytest.mark.parametrize("name", [STATE, SEARCH])
@pytest.mark.parametrize("length", [0, 5])
def test_the_last_whole_state_takes_the_place_of_one_cut_short(
    part: Path, name: str, length: int
) -> None:
    back_up(part)
    write(part, 2)
    back_up(part)
    file = part / TUNE_DIRECTORY / name
    whole = file.read_bytes()
    os.truncate(file, length)
    back_up(part)  # while it is being written
    assert file.read_bytes() == whole[:length]
    repair(part)
    assert steps(part) == [2, 2]
    assert (part / TUNE_DIRECTORY / "tuner.pkl").read_bytes() == b"not a state"


def test_whole_states_stay(part: Path) -> None:
    back_up(part)
    write(part, 2)
    repair(part)
    assert steps(part) == [2, 2]


def test_what_was_never_whole_is_refused(part: Path) -> None:
    os.truncate(part / TUNE_DIRECTORY / STATE, 4)
    back_up(part)
    with pytest.raises(ValueError, match=r"experiment_state-.*cut short.*another --storage"):
        repair(part)
    assert [file.name for file in (part / KEPT_DIRECTORY).iterdir()] == [SEARCH]


@pytest.mark.parametrize("name", [STATE, SEARCH])
def test_an_earlier_starts_state_takes_the_place_of_what_was_never_whole(
    part: Path, name: str
) -> None:
    """All of it does: the search and the trials fit together."""
    later = [file.replace("-01-01.", "-01-02.") for file in (STATE, SEARCH)]
    for file, content in zip(later, (b'{"step": 2}', pickle.dumps({"step": 2})), strict=True):
        (part / TUNE_DIRECTORY / file).write_bytes(content)
    os.truncate(part / TUNE_DIRECTORY / name.replace("-01-01.", "-01-02."), 4)
    repair(part)
    assert steps(part) == [1, 1]
    found = {file.name for file in (part / TUNE_DIRECTORY).iterdir()}
    assert found == {STATE, SEARCH, "tuner.pkl"}


def test_what_was_left_of_a_crash_while_a_state_was_replaced_is_no_state(part: Path) -> None:
    back_up(part)
    for name in (STATE, SEARCH):
        (part / TUNE_DIRECTORY / f".{Path(name).stem}.tmp-12.json").write_text("{")
    repair(part)
    back_up(part)
    assert steps(part) == [1, 1]
    assert {file.name for file in (part / KEPT_DIRECTORY).iterdir()} == {STATE, SEARCH}


def test_a_trial_that_has_ended_is_not_run_again(part: Path) -> None:
    assert has_state(part)
    trials = {"a": "RUNNING", "b": "RUNNING", "c": "ERROR"}
    data = [[json.dumps({"trial_id": n, "status": s, "x": 1}), "{}"] for n, s in trials.items()]
    file = part / TUNE_DIRECTORY / STATE
    runner = {"_cached_trial_decisions": {"b": "STOP"}, "_queued_trial_decisions": {"b": "STOP"}}
    runner["_iteration"] = 3
    file.write_text(json.dumps({"trial_data": data, "runner_data": runner, "stats": 7}))
    correct(part, {"a", "c"})
    state = json.loads(file.read_text())
    assert state["stats"] == 7
    assert list(state["runner_data"].values()) == [{}, {}, 3]
    found = [json.loads(trial) for trial, _ in state["trial_data"]]
    assert [trial["status"] for trial in found] == ["TERMINATED", "RUNNING", "TERMINATED"]
    assert all(trial["x"] == 1 for trial in found)
    file.unlink()
    assert not has_state(part)


def test_an_experiment_begun_by_an_earlier_version_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose trials knew fewer options: Tune refuses settings that it has not seen."""
    values = {"name": "x", "task": "InvertedPendulum-v5", "preset": "quick",
              "sweep": {"grid": {"tau": [0.1, 0.2]}}, "storage": str(tmp_path)}  # fmt: skip
    experiment = Experiment(ExperimentSpec.from_dict(values))
    [part] = experiment.parts
    whole = tuner.fixed_config

    def earlier(spec: ExperimentSpec, algorithm: str) -> dict[str, Any]:
        space = whole(spec, algorithm)
        return {n: v for n, v in space.items() if n not in ("frame_skip", "wrappers")}

    with monkeypatch.context() as patched:
        patched.setattr(tuner, "fixed_config", earlier)
        experiment._fresh(part, [])
    state = {"trial_data": [], "runner_data": {}}
    directory = experiment.directory / part.name
    (directory / TUNE_DIRECTORY / STATE).write_text(json.dumps(state))
    restored = experiment._restored(part)
    assert restored is not None
    space = restored._local_tuner.param_space
    assert {"tau", "callbacks_class", "env_config"} <= space.keys()
    assert "frame_skip" not in space


def test_ray_tune_has_what_is_relied_upon() -> None:
    """A Ray that fails here needs another `tuning/tune_state.py`."""
    assert list(inspect.signature(TuneController.pause_trial).parameters)[:2] == ["self", "trial"]
    assert list(inspect.signature(TuneController.get_trials).parameters) == ["self"]
    assert isinstance(Trial.is_saving, property)
    assert (Trial.RUNNING, Trial.TERMINATED) == ("RUNNING", "TERMINATED")
    assert TuneController.CKPT_FILE_TMPL == "experiment_state-{}.json"
    source = inspect.getsource(TuneController.save_to_dir)
    assert '"trial_data": list(self._get_trial_checkpoints().values())' in source
    assert '"runner_data": self.__getstate__()' in source
    for name in ("_cached_trial_decisions", "_queued_trial_decisions"):
        assert f"self.{name}" in inspect.getsource(TuneController.__init__)
        assert name not in inspect.getsource(TuneController.__getstate__)
    assert "self._scheduler_alg.on_trial_add(self._wrapped(), trial)" in inspect.getsource(
        TuneController.add_trial
    )
    assert {"_time_attr", "_metric"} <= vars(AsyncHyperBandScheduler()).keys()
    assert "_completed_trials" in inspect.getsource(OptunaSearch.on_trial_complete)
    for name, kind in {"experiment_state": TuneController, "search_gen_state": SearchGenerator,
                       "basic-variant-state": BasicVariantGenerator,
                       "callback-states": CallbackList}.items():  # fmt: skip
        file = Path(kind.CKPT_FILE_TMPL.format("2026-01-01_10-00-00"))
        assert _kind_and_start(file) == (name, "2026-01-01_10-00-00")
    assert "signal.SIGUSR1" in inspect.getsource(ray.tune.tune._setup_signal_catching)
