"""Dict and Tuple observations as a vector: Gymnasium's order and widths, and what is refused."""

import json
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from environments import PARTS
from gymnasium import spaces

from qvpo_rllib.core.observation_parts import ObservationParts, Part
from qvpo_rllib.rollout.observation_spaces import parts_of

SPACES: dict[str, gym.Space] = {
    "nested": PARTS,
    "goal": spaces.Dict(
        {
            "observation": spaces.Box(-np.inf, np.inf, (10,), np.float64),
            "achieved_goal": spaces.Box(-np.inf, np.inf, (3,), np.float64),
            "desired_goal": spaces.Box(-np.inf, np.inf, (3,), np.float64),
        }
    ),
    "tuple": spaces.Tuple((spaces.Discrete(4, start=-2), spaces.Box(-1, 1, (2, 2), np.float32))),
    "choices alone": spaces.Dict({"a": spaces.MultiDiscrete([[2, 3], [4, 2]])}),
    "first values": spaces.Dict({"a": spaces.MultiDiscrete([2, 3], start=[5, -1])}),
}
GOOD = {
    "velocity": [0.5, -1.5],
    "goal": {"kind": 3, "at": 0.25},
    "legs": {"0": [1, 0], "1": [0, 2]},
}


@pytest.mark.parametrize("name", SPACES)
def test_the_vector_is_gymnasiums(name: str) -> None:
    space = SPACES[name]
    parts = parts_of(space)
    space.seed(3)
    assert parts.size == spaces.flatdim(space)
    for _ in range(20):
        sample = space.sample()
        np.testing.assert_array_equal(parts.flatten(sample), spaces.flatten(space, sample))


def test_names_and_widths_are_recorded_in_order() -> None:
    content = parts_of(PARTS).to_json()
    assert [(part["name"], part["width"]) for part in content] == [
        ("goal.at", 1), ("goal.kind", 3), ("legs.0", 2), ("legs.1", 5), ("velocity", 2),
    ]  # fmt: skip
    again = ObservationParts.from_json(json.loads(json.dumps(content)))
    assert again.to_json() == content
    sample = PARTS.sample()
    np.testing.assert_array_equal(again.flatten(sample), spaces.flatten(PARTS, sample))


def test_json_names_a_tuples_parts_by_number() -> None:
    vector = parts_of(PARTS).flatten(GOOD)
    assert vector.tolist() == [0.25, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 0.5, -1.5]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"velocity": [0.5]}, r"part 'velocity' has shape \[1\], not shape \[2\]"),
        ({"velocity": [[0.5], [1, 2]]}, "part 'velocity' has no numbers"),
        ({"velocity": "fast"}, "part 'velocity' has no numbers"),
        ({"velocity": [10**400, 0]}, "part 'velocity' has no numbers"),
        ({"goal": {"kind": 4, "at": 0.0}}, "part 'goal.kind' has the value 4.* from 1 to 3"),
        ({"goal": {"kind": 0, "at": 0.0}}, "part 'goal.kind' has the value 0"),
        ({"goal": {"kind": 1.5, "at": 0.0}}, "part 'goal.kind' has the value 1.5"),
        ({"goal": {"at": 0.0}}, "part 'goal' must have the parts 'at', 'kind', not 'at'"),
        ({"goal": 3}, "part 'goal' must have the parts .* not int"),
        ({"more": 3}, "it must have the parts"),
        ({"legs": ([1, 0],)}, "part 'legs' must have the parts '0', '1', not '0'"),
    ],
)
def test_what_does_not_fit_is_refused_by_part(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parts_of(PARTS).flatten({**GOOD, **change})


def part(path: Any = ("a",), shape: Any = (), choices: Any = None, width: int = 1) -> Any:
    one = {"path": list(path), "shape": list(shape), "choices": choices, "first": None}
    return [{**one, "name": ".".join(path), "width": width}]


@pytest.mark.parametrize(
    "content",
    [
        3,
        [{}],
        part(shape=[2], width=3),
        part(shape=[-2], width=-2),
        part(choices=[3], width=3),
        part(shape=[1.0]),
        part(path=["a"] * 99),
    ],
    ids=["number", "empty", "width", "negative", "first", "float", "deep"],
)
def test_damaged_parts_are_refused(content: Any) -> None:
    with pytest.raises(ValueError, match=r"part|path|choices|sizes|fit"):
        ObservationParts.from_json(content)


def test_a_part_in_anothers_place_is_refused() -> None:
    with pytest.raises(ValueError, match="place"):
        ObservationParts([Part(path=("a",)), Part(path=("a", "b"))])
