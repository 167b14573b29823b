"""Rooms of the package import only rooms below them, and no modules import each other in a ring."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qvpo_rllib"
# A room imports rooms of the floors below its own, and itself.
FLOORS = (
    ("core", "files", "version"),
    ("ray_session",),
    ("rollout", "serving", "paper"),
    ("checkpoints",),
    ("runtime",),
    ("algorithms",),
    ("training",),
    ("tuning", "play"),
    ("report",),
    ("bench",),
    ("cli",),
    ("__init__", "__main__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def read_package() -> dict[str, str]:
    """Module, such as "core.losses" or "core", → its source."""
    sources = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        sources[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = (
            file.read_text()
        )
    return sources


def imports_of(source: str) -> Iterator[tuple[int, str]]:
    """Line and name, without "qvpo_rllib.", of every import of ours, wherever it stands.

    A text that names a module, "qvpo_rllib.room.module:Name", counts: it is imported some time.
    """
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides where it goes"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = node.value.replace(":", ".").split(".")
            names = [".".join(words)] if all(word.isidentifier() for word in words) else []
        for name in names:
            if name.startswith("qvpo_rllib."):
                yield node.lineno, name.removeprefix("qvpo_rllib.")


def back_arrows(sources: Mapping[str, str]) -> list[str]:
    """The imports that do not go down; a room that has no floor raises `KeyError`."""
    found = []
    for module, source in sources.items():
        room = module.split(".")[0]
        for line, name in imports_of(source):
            target = name.split(".")[0]
            if target != room and FLOOR.get(target, FLOOR["__init__"]) >= FLOOR[room]:
                found.append(f"{module}, line {line}: {name}")
    return found


def first_circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a ring, at their tops or later; empty if none do."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = [name for _, name in imports_of(source)]
        targets = {n for name in names for n in (name, name.rpartition(".")[0]) if n in sources}
        # A package's `__init__` is what its modules are reached through, no import of theirs.
        graph[module] = {t for t in targets if t != module and not module.startswith(f"{t}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_import_goes_down() -> None:
    assert back_arrows(read_package()) == []


def test_no_modules_import_each_other_in_a_ring() -> None:
    assert first_circle(read_package()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("core.losses", "from qvpo_rllib.runtime.base import BaseAlgorithm"),
        ("rollout.pool", "def f():\n    from qvpo_rllib.runtime import config"),
        ("serving.api", "import qvpo_rllib.rollout.policy"),
        ("training.plan", "HOME = 'qvpo_rllib.tuning.spec:ExperimentSpec'"),
        ("tuning.spec", "from qvpo_rllib.play.evaluation import evaluate_checkpoint"),
        ("algorithms.td3", "from qvpo_rllib import QVPO"),
    ],
)
def test_an_import_that_goes_up_is_found(module: str, line: str) -> None:
    sources = read_package()
    sources[module] += f"\n{line}\n"
    (found,) = back_arrows(sources)
    assert found.startswith(module)


def test_a_ring_is_found() -> None:
    sources = read_package()
    sources["core.seeding"] += "\ndef late():\n    import qvpo_rllib.core.replay\n"
    assert {"core.seeding", "core.replay"} <= set(first_circle(sources))
