"""Three files use Ray's private API, and it is as they rely on: an upgrade fails here first."""

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory
from ray.experimental import internal_kv
from ray.rllib.algorithms import algorithm as rllib
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env.env_context import EnvContext
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.evaluation.env_runner_v2 import EnvRunnerV2
from ray.rllib.evaluation.rollout_worker import RolloutWorker
from ray.rllib.evaluation.sampler import SyncSampler
from ray.rllib.utils.actor_manager import FaultTolerantActorManager
from ray.train._internal.checkpoint_manager import _TrainingResult
from ray.train._internal.storage import StorageContext
from ray.tune.execution.tune_controller import TrialRunnerWrapper, TuneController
from ray.tune.registry import _global_registry
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.trainable import Trainable

from qvpo_rllib.runtime import ray_private

PACKAGE = Path(__file__).parents[1] / "qvpo_rllib"
BASE, PRIVATE, TUNE = "runtime/base.py", "runtime/ray_private.py", "tuning/tune_state.py"

Algorithm = rllib.Algorithm
# File to open, what it relies on, and the parameters that it is called with or overridden with.
RELIED_ON: list[tuple[str, Callable[..., Any], tuple[str, ...]]] = [
    (BASE, Algorithm._run_one_training_iteration_old_api_stack, ("self",)),
    (BASE, Algorithm._run_one_training_iteration_and_evaluation_in_parallel, ("self",)),
    (BASE, Algorithm._run_one_evaluation, ("self", "parallel_train_future")),
    (BASE, Algorithm._evaluate_on_local_env_runner, ("self", "env_runner")),
    (BASE, Algorithm._evaluate_with_fixed_duration, ("self",)),
    (BASE, Algorithm._get_env_id_and_creator, ("env_specifier", "config")),
    (
        BASE,
        Algorithm._compile_iteration_results_old_api_stack,
        ("self", "episodes_this_iter", "step_ctx", "iteration_results"),
    ),
    (
        BASE,
        Algorithm._make_on_env_runners_recreated_callbacks,
        ("self", "config", "env_runner_group", "restored_env_runner_indices"),
    ),
    (BASE, rllib.TrainIterCtx.__init__, ("self", "algo")),
    (PRIVATE, internal_kv._internal_kv_get, ("key", "namespace")),
    (PRIVATE, internal_kv._internal_kv_put, ("key", "value", "overwrite", "namespace")),
    (PRIVATE, get_system_memory, ("memory_limit_filename", "memory_limit_filename_v2")),
    (PRIVATE, get_used_memory, ()),
    (PRIVATE, type(_global_registry).contains, ("self", "category", "key")),
    (PRIVATE, AlgorithmConfig._translate_special_keys, ("key", "warn_deprecated")),
    (PRIVATE, _TrainingResult.__init__, ("self", "checkpoint", "metrics")),
    (PRIVATE, StorageContext._check_validation_file, ("self",)),
    (PRIVATE, StorageContext._update_checkpoint_index, ("self", "metrics")),
    (PRIVATE, StorageContext.persist_artifacts, ("self", "force")),
    (PRIVATE, FaultTolerantActorManager.set_actor_state, ("self", "actor_id", "healthy")),
    (PRIVATE, EnvRunnerV2.create_episode, ("self", "env_id")),
    (TUNE, TuneController.get_trials, ("self",)),
    (TUNE, TuneController.pause_trial, ("self", "trial", "should_checkpoint")),
]
# Attributes that Ray's objects get in their `__init__` or `setup`.
ATTRIBUTES = {
    BASE: {
        "_counters", "_env_id", "_episode_history", "_iteration", "_last_result", "_storage",
        "_time_total", "_timers",
    },
    TUNE: {"_metric", "_storage", "_time_attr", "_tune_controller"},
    PRIVATE: {"_env_runner_obj", "_is_frozen", "_last_result", "_storage", "_worker_manager"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "function", "parameters"),
    RELIED_ON,
    ids=[f"{file}: {function.__qualname__}" for file, function, _ in RELIED_ON],
)
def test_signatures_that_are_relied_on(
    file: str, function: Callable[..., Any], parameters: tuple[str, ...]
) -> None:
    # Ray's tracing adds a parameter to the methods of classes that have become actors.
    found = tuple(p for p in inspect.signature(function).parameters if p != "_ray_trace_ctx")
    assert found == parameters, (
        f"Ray {ray.__version__}: {function.__qualname__}{found} is not {parameters} any more. Open "
        f"qvpo_rllib/{file}, read Ray's new source, and mend what calls or overrides it."
    )


@pytest.mark.parametrize("file", ATTRIBUTES)
def test_attributes_that_are_relied_on(file: str) -> None:
    owners = (rllib, Trainable, AlgorithmConfig, EnvRunnerGroup, SyncSampler)
    owners += (TuneController, TrialRunnerWrapper, AsyncHyperBandScheduler)
    missing = ATTRIBUTES[file] - _own_private_names(*owners)
    assert not missing, f"Ray {ray.__version__} has no {missing}: open qvpo_rllib/{file}."


def test_private_api_is_used_in_three_files() -> None:
    """Imports of private names, private attributes of RLlib's classes, and overridden methods."""
    uses = set(_private_uses())
    assert {file for file, _ in uses} >= {BASE, PRIVATE}  # the search does find them
    assert sorted(use for use in uses if use[0] not in (BASE, PRIVATE, TUNE)) == []


def _private_uses() -> Iterator[tuple[str, str]]:
    """(file, what it uses) for every use of Ray's private API that can be seen in the source."""
    of_ray = _own_private_names(rllib, Trainable, RolloutWorker, AlgorithmConfig, EnvRunnerGroup)
    for path in sorted(PACKAGE.rglob("*.py")):
        file, tree = path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())
        ours = {n.attr for n in ast.walk(tree) if _is_assigned(n)}  # type: ignore[attr-defined]
        ours |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        for node in ast.walk(tree):
            for name in _names_of_ray(node, of_ray - ours):
                if any(part.startswith("_") for part in name.split(".")):
                    yield file, name
    yield from _overridden_methods()


def _names_of_ray(node: ast.AST, attributes: set[str]) -> list[str]:
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.split(".")[0] == "ray"]
    if isinstance(node, ast.Attribute):
        known = node.attr in attributes or node.attr.startswith("_internal_kv")
        return [node.attr] if known else []
    return []


def _overridden_methods() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.parts[0] not in ("rollout", "runtime", "algorithms", "tuning", "checkpoints"):
            continue
        name = ".".join(("qvpo_rllib", *relative.with_suffix("").parts)).removesuffix(".__init__")
        for kind in vars(importlib.import_module(name)).values():
            if not (inspect.isclass(kind) and kind.__module__ == name):
                continue
            bases = [base for base in kind.__mro__ if base.__module__.startswith("ray.")]
            for method in vars(kind):
                private = method.startswith("_") and not method.startswith("__")
                if private and method != "_abc_impl" and any(method in vars(b) for b in bases):
                    yield relative.as_posix(), f"{kind.__name__}.{method}"


def _is_assigned(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)


def _own_private_names(*owners: Any) -> set[str]:
    """The private names that the classes or modules define or assign to `self`."""
    names = set()
    for owner in owners:
        for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(owner) or owner))):
            if _is_assigned(node) and node.attr.startswith("_"):  # type: ignore[attr-defined]
                names.add(node.attr)  # type: ignore[attr-defined]
            elif isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
                names.add(node.name)
    return {name for name in names if not name.startswith("__")}


@pytest.mark.parametrize(
    ("create", "config", "found"),
    [
        (lambda config: config, {"goal": 9}, {"goal": 9}),
        (lambda config, goal=1: config, {"goal": 9}, {"goal": 9}),
        (lambda config=None: config, {"goal": 9}, {"goal": 9}),
        (lambda config=None, goal=1: config, {"goal": 9}, {"goal": 9}),
        (lambda options=None: options, {}, {}),
        (lambda render_mode=None, goal=1: (render_mode, goal), {"goal": 9}, (None, 9)),
        (lambda render_mode=None, goal=1: (render_mode, goal), {}, (None, 1)),
        (lambda goal=1, render_mode=None: (goal, render_mode), {}, (1, None)),
        (lambda xml=None, goal=1: (xml, goal), {"goal": 9}, (None, 9)),
    ],
)
def test_a_class_gets_env_config_as_one_dict_or_by_keyword(
    create: Any, config: dict[str, Any], found: Any
) -> None:
    assert ray_private._make_by(create, EnvContext(config, worker_index=0), None) == found


def test_a_module_that_is_not_here_is_named_with_where_it_is_looked_for() -> None:
    make = ray_private.environment_maker("not_here_envs:Robot-v0")
    with pytest.raises(ImportError, match=r"No module named 'not_here_envs'.*working directory"):
        make(EnvContext({}, worker_index=0))
