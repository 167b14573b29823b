"""Ray Tune's state files: a driver killed while it writes them loses nothing."""

import json
import os
import pickle
from pathlib import Path

import pytest

from qvpo_rllib.tuning.tune_state import KEPT_DIRECTORY, TUNE_DIRECTORY, back_up, repair

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
