"""Environments of other packages, which Gymnasium knows only once they are imported."""

import importlib
import importlib.util
import re
from typing import NamedTuple

import gymnasium as gym


class Family(NamedTuple):
    """Environments that other packages bring.

    Attributes:
        ids: a pattern of their ids' beginning.
        modules: all must be installed; the import of the first registers the ids.
        extra: of this package, which installs it.
        ends_itself: its environments cut their episodes off without a `TimeLimit`.
    """

    ids: str
    modules: tuple[str, ...]
    extra: str
    ends_itself: bool = False


FAMILIES = (
    Family(r"dm_control/", ("shimmy", "dm_control"), "dm-control", ends_itself=True),
    Family(
        r"(Fetch(Reach|Push|Slide|PickAndPlace)|HandReach|HandManipulate|AdroitHand|FrankaKitchen"
        r"|PointMaze_|AntMaze_)",
        ("gymnasium_robotics",),
        "robotics",
    ),
)


def family_of(env_id: str) -> Family | None:
    """Returns the family that an id of Gymnasium's belongs to, if it is one of `FAMILIES`."""
    return next((family for family in FAMILIES if re.match(family.ids, env_id)), None)


def register_family(env_id: str) -> None:
    """Makes the ids of `env_id`'s family known to Gymnasium in this process.

    Raises:
        ValueError: a package is missing; the text says how to install it.
    """
    family = family_of(env_id)
    if family is None or env_id in gym.registry:
        return
    missing = [name for name in family.modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"The environment {env_id!r} comes from the package {missing[0]!r}, which is not "
            f"installed. Install it with: pip install 'qvpo_rllib[{family.extra}]' (in a checkout: "
            f"pip install -e '.[{family.extra}]')."
        )
    gym.register_envs(importlib.import_module(family.modules[0]))
