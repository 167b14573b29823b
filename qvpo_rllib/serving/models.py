"""The models being served: several names and versions side by side, replaced while in use."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qvpo_rllib.serving.bundle import DESCRIPTION_FILE, load
from qvpo_rllib.serving.description import Description
from qvpo_rllib.serving.policy import ServedPolicy

logger = logging.getLogger(__name__)

Stamp = tuple[int, int, int]  # changes when a bundle is replaced


@dataclass
class _Place:
    """A directory that holds a bundle, now this one, later perhaps another."""

    path: Path
    stamp: Stamp | None
    policy: ServedPolicy
    previous: ServedPolicy | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """What is served at one moment. A request keeps the one it began with."""

    by_reference: dict[str, ServedPolicy] = field(default_factory=dict)  # name, name@version
    policies: tuple[ServedPolicy, ...] = ()
    problems: tuple[str | None, ...] = ()  # in the order of `policies`

    def is_default(self, policy: ServedPolicy) -> bool:
        return self.by_reference.get(policy.description.name) is policy


def reference(policy: ServedPolicy) -> str:
    return f"{policy.description.name}@{policy.description.version}"


class Models:
    """Bundles by name. `open` and `refresh` take time and belong into a thread of their own.

    A name alone means the bundle that was given last. When another bundle takes a directory's
    place, it takes over the name, and the one before stays at `name@version` until the next one.
    """

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self._places: list[_Place] = []

    def open(self, paths: Sequence[str | Path]) -> None:
        """Serves exactly these bundles. Raises `ValueError`, and changes nothing, if one is bad."""
        held = {place.path: place for place in self._places}
        places = []
        for path in (Path(p).expanduser().absolute() for p in paths):
            if path in held:
                self._renew(held[path])
            places.append(held.get(path) or _Place(path, _stamp(path), _load_warm(path)))
        snapshot = _snapshot(places)
        self._places, self.snapshot = places, snapshot

    def refresh(self) -> None:
        """Takes up the bundles that were replaced; a bad one is reported and not taken."""
        if any([self._renew(place) for place in self._places]):
            self.snapshot = _snapshot(self._places)

    def _renew(self, place: _Place) -> bool:
        stamp = _stamp(place.path)
        # Absent for a moment while somebody swaps directories: the old one goes on.
        if stamp is None or stamp == place.stamp:
            return False
        try:
            policy = _load_warm(place.path)
            others = [(p.path, p.policy) for p in self._places if p is not place]
            check_references([*others, (place.path, policy)])
        except Exception as error:  # whatever a bundle may do, the next one is looked at
            # The stamp stays as it was, so that a bundle still being copied is tried again.
            changed = place.problem != str(error)
            if changed:
                place.problem = str(error)
                logger.error("%s goes on as %s: %s", place.path, reference(place.policy), error)
            return changed
        place.stamp = stamp
        place.problem = None
        if reference(policy) != reference(place.policy):
            place.previous = place.policy
        place.policy = policy
        logger.info("%s: now %s", place.path, reference(policy))
        return True


def check_references(bundles: Sequence[tuple[str | Path, ServedPolicy]]) -> None:
    """Raises `ValueError` if two different policies, each given with its path, have one name."""
    by_reference: dict[str, Description] = {}
    for path, policy in bundles:
        # The same policy may have been exported twice, at another time or on another machine.
        essence = dataclasses.replace(policy.description, created="", versions={})
        if by_reference.setdefault(reference(policy), essence) != essence:
            raise ValueError(
                f"Two different bundles call themselves {reference(policy)}; the second is "
                f"{str(path)!r}. Give one another --name or --version in qvpo export."
            )


def _load_warm(path: Path) -> ServedPolicy:
    policy = load(path)
    policy.warm_up(policy.description.k_eval, policy.description.k_behavior)
    return policy


def _stamp(path: Path) -> Stamp | None:
    try:
        status = os.stat(path / DESCRIPTION_FILE)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _snapshot(places: Sequence[_Place]) -> Snapshot:
    by_reference: dict[str, ServedPolicy] = {}
    served: list[tuple[ServedPolicy, str | None]] = []
    check_references([(place.path, place.policy) for place in places])
    for place in places:
        policy = by_reference.setdefault(reference(place.policy), place.policy)
        by_reference[policy.description.name] = policy
        if policy is place.policy:  # else it was exported twice
            served.append((policy, place.problem))
    for place in places:
        if place.previous is not None and reference(place.previous) not in by_reference:
            by_reference[reference(place.previous)] = place.previous
            served.append((place.previous, None))
    policies, problems = zip(*served, strict=True) if served else ((), ())
    return Snapshot(by_reference, tuple(policies), tuple(problems))
