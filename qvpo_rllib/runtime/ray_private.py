"""What training needs of Ray and has no public name, but the methods that `base` overrides.

An upgrade of Ray fails here in one place: `tests/test_private_ray.py` asserts what is relied on.
"""

import contextlib
import copy
import difflib
import importlib
import inspect
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import psutil
import ray
import torch
from pyarrow.fs import LocalFileSystem
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory
from ray.exceptions import RayError
from ray.experimental import internal_kv
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env.env_context import EnvContext
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.evaluation.episode_v2 import EpisodeV2
from ray.rllib.evaluation.rollout_worker import RolloutWorker
from ray.rllib.utils.actor_manager import FaultTolerantActorManager
from ray.train._internal.checkpoint_manager import _TrainingResult
from ray.tune import Checkpoint
from ray.tune.registry import ENV_CREATOR, _global_registry

from qvpo_rllib.rollout.env_batch import as_batch
from qvpo_rllib.rollout.environments import name_of
from qvpo_rllib.rollout.families import register_family
from qvpo_rllib.rollout.wrapping import entry_point, wrapped

logger = logging.getLogger(__name__)

KV_NAMESPACE = "qvpo_rllib"
LOOK_EVERY_S = 1.0  # a look at Ray's key-value store takes about half a millisecond


class StopSignal:
    """Whether the driver of a Ray Tune trial has asked it to stop; once it has, it stays so.

    Between two steps a trial takes no message, so the driver leaves a word in Ray's key-value store
    under the number of its job, and each trial looks for it now and then.
    """

    def __init__(self) -> None:
        self._asked = False
        self._looked_s = float("-inf")

    @property
    def asked(self) -> bool:
        """The answer of at most `LOOK_EVERY_S` ago."""
        if not self._asked and time.monotonic() - self._looked_s >= LOOK_EVERY_S:
            self.look()
        return self._asked

    def look(self) -> None:
        """Looks at once."""
        with contextlib.suppress(RayError):  # not to be reached just now: at the next look
            found = internal_kv._internal_kv_get(_key("stop"), namespace=KV_NAMESPACE)
            self._asked = found is not None
        self._looked_s = time.monotonic()


def note_failure(text: str) -> None:
    """Leaves word of why this worker ends; what it logs may be seen by nobody."""
    with contextlib.suppress(RayError):
        key = _key("failure")
        internal_kv._internal_kv_put(key, text.encode(), overwrite=True, namespace=KV_NAMESPACE)


def last_failure() -> str:
    """Returns the last word of a worker of this job; "" if there is none."""
    found: bytes | None = internal_kv._internal_kv_get(_key("failure"), namespace=KV_NAMESPACE)
    return (found or b"").decode()


def ask_trials_to_stop() -> None:
    """Asks all those that this process, the driver, has started or will start."""
    internal_kv._internal_kv_put(_key("stop"), b"1", namespace=KV_NAMESPACE)


def _key(of: str) -> str:
    return f"{of}-{ray.get_runtime_context().get_job_id()}"


def available_bytes(device: torch.device) -> int:
    """Returns the free bytes on `device`, on a CPU within the container's limit and the
    machine's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    in_container = get_system_memory() - get_used_memory()  # Ray reads the cgroup's figures
    return int(max(0, min(psutil.virtual_memory().available, in_container)))


def random_policy() -> type:
    """Returns RLlib's policy that acts at random, on its old API stack."""
    from ray.rllib.examples._old_api_stack.policy.random_policy import RandomPolicy

    found: type = RandomPolicy
    return found


def worker_manager(group: EnvRunnerGroup) -> FaultTolerantActorManager:
    """Returns what holds the handles of a group's remote workers, and knows who is healthy."""
    return group._worker_manager


def make_episodes(worker: RolloutWorker, new_episode: Callable[[int], EpisodeV2]) -> None:
    """Lets RLlib's loop, in a worker that steps environments with it, play other episodes.

    Args:
        new_episode: of the environment with this index; it has yet to be reset.
    """
    runner = worker.sampler._env_runner_obj

    def create_episode(env_id: int) -> EpisodeV2:
        episode = new_episode(env_id)
        worker.callbacks.on_episode_created(
            worker=worker,
            base_env=worker.async_env,
            policies=worker.policy_map,
            env_index=env_id,
            episode=episode,
        )
        return episode

    runner.create_episode = create_episode


def check_resources(processes: Sequence[Mapping[str, float]], advice: str) -> None:
    """Compares what processes need at once with what the Ray cluster and its nodes have.

    Ray would wait for the rest without a word. A Ray that this process has started gets no more; to
    another cluster an autoscaler, or a person, may add nodes: then a warning says what is missing.

    Args:
        processes: amounts by Ray's names, such as {"CPU": 1, "GPU": 0.5}, each on one node.
        advice: what to change.

    Raises:
        ValueError: this process's own Ray has less.
    """
    lack = _lack_of_resources([{n: a for n, a in p.items() if a} for p in processes])
    if not lack:
        return
    node = ray._private.worker._global_node  # None under Ray Client
    if node is not None and node.is_head():
        raise ValueError(f"The Ray cluster is too small: {lack}. {advice}")
    logger.warning("The Ray cluster is too small now: %s. This waits for more. %s", lack, advice)


def _lack_of_resources(processes: Sequence[Mapping[str, float]]) -> str:
    """Returns "8 CPU are needed, of 4", or what one process needs and no node has; else ""."""
    if not any(processes):
        return ""
    total, needed = ray.cluster_resources(), Counter[str]()
    for process in processes:
        needed.update(process)
    missing = [n for n, a in needed.items() if round(a, 4) > total.get(n, 0)]  # as Ray rounds
    if missing:
        return ", ".join(f"{needed[n]:g} {n} are needed, of {total.get(n, 0):g}" for n in missing)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for process in processes:
        if not any(all(node.get(n, 0) >= a for n, a in process.items()) for node in nodes):
            found = dict.fromkeys(_amounts({n: node.get(n, 0) for n in process}) for node in nodes)
            return (
                f"a process needs {_amounts(process)} on one node, and the nodes have "
                f"{'; '.join(found)}"
            )
    return ""


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def environment_maker(
    env: Any, frame_skip: int = 1, wrappers: Sequence[str] = (), *, num_envs: int | None = None
) -> Callable[[EnvContext], Any]:
    """Returns what makes an environment of its arguments: the same in training and afterwards.

    A vector environment is made as an `EnvBatch`.

    Args:
        env: a class, which is called with the arguments as a dict; or a text: a name registered by
            `ray.tune.register_env`, an id of Gymnasium's, "module:Id-v0", or "module.Class".
        frame_skip, wrappers: the options of these names; vector environments take neither.
        num_envs: the sub-environments of a vector environment; what takes no argument `num_envs`
            has its own number. None: of an id that makes both kinds, the single one, which is also
            made where it is wrapped.

    Raises:
        ValueError: nobody knows the text or a wrapper here; it names the nearest ids.
    """
    create = _creator_of(env, None if frame_skip > 1 or wrappers else num_envs)
    for path in wrappers:
        entry_point(path)

    def make(context: EnvContext) -> Any:
        # RLlib shares what is nested in the context among a worker's environments.
        made = create(copy.deepcopy(context))
        if not hasattr(made, "observation_space"):
            raise ValueError(
                f"{name_of(env)} returned {made!r}, but must make and return a gymnasium.Env."
            )
        if not isinstance(made, gym.vector.VectorEnv):
            return wrapped(made, frame_skip, wrappers)
        where = f"{name_of(env)} (worker {context.worker_index})"
        if frame_skip > 1 or wrappers:
            made.close()
            raise ValueError(
                f"{where} is a vector environment, for which frame_skip={frame_skip} and "
                f"wrappers={list(wrappers)} are not possible: they wrap single environments. Let "
                "what makes it repeat actions and wrap it."
            )
        return as_batch(made, where)

    return make


def _creator_of(env: Any, num_envs: int | None) -> Callable[[EnvContext], Any]:
    if not isinstance(env, str):
        return lambda context: _make_by(env, context, num_envs)
    if _global_registry.contains(ENV_CREATOR, env):
        registered = _global_registry.get(ENV_CREATOR, env)
        return lambda context: registered(context, **_number_for(registered, num_envs))
    register_family(env)
    if env in gym.registry or ":" in env:
        return lambda context: _make_id(env, context, num_envs)
    if "." in env:
        return lambda context: _make_by(_class_at(env), context, num_envs)
    latest = {(spec.namespace, spec.name): spec.id for spec in gym.registry.values()}
    close = difflib.get_close_matches(env, latest.values(), n=3, cutoff=0.5)
    suggestion = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"There is no environment {env!r}.{suggestion} Allowed are Gymnasium's ids (such as "
        "'Ant-v5'), 'module:Id-v0', 'module.Class', and names that this process has registered "
        "with ray.tune.register_env: elsewhere use 'module:Id-v0', whose module calls "
        "gymnasium.register."
    )


def makes_vectors(env: Any) -> bool:
    """Returns whether a class or an id makes vector environments alone.

    What a registered function makes is known only when it has made one.

    Raises:
        ValueError: as `environment_maker`'s environments do.
    """
    if isinstance(env, str):
        spec = gym.registry.get(env.rpartition(":")[2])
        if _global_registry.contains(ENV_CREATOR, env) or spec is not None or ":" in env:
            return spec is not None and spec.entry_point is None
        env = _class_at(env)
    return isinstance(env, type) and issubclass(env, gym.vector.VectorEnv)


def _make_by(create: Any, context: EnvContext, num_envs: int | None) -> Any:
    """Calls a class or function with env_config: as RLlib does, as one dict, or by keyword."""
    number = _number_for(create, num_envs)
    if _takes_keywords(create, context):
        return create(**{**number, **context})
    return create(context, **number)


def _takes_keywords(create: Any, context: EnvContext) -> bool:
    """Returns whether the first parameter is not meant for a dict.

    It is optional and no "config", and: has another default, or is `render_mode` as in Gymnasium's
    environments, or an argument in `context` has a parameter of its own.
    """
    try:
        parameters = inspect.signature(create).parameters
    except (TypeError, ValueError):  # not all that is written in C says
        return False
    if not parameters:
        return False
    first = next(iter(parameters.values()))
    if first.default is first.empty or "config" in first.name:
        return False
    named = not parameters.keys().isdisjoint(context)
    return first.name == "render_mode" or not isinstance(first.default, dict | None) or named


def _number_for(create: Any, num_envs: int | None) -> dict[str, int]:
    """Returns the argument `num_envs` for a class or a function that takes one."""
    try:
        takes_it = "num_envs" in inspect.signature(create).parameters
    except (TypeError, ValueError):  # not all that is written in C says
        takes_it = False
    return {"num_envs": num_envs or 1} if takes_it else {}


def _make_id(env: str, context: EnvContext, num_envs: int | None) -> Any:
    register_family(env)  # a worker is another process
    module, _, name = env.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"{error}. The module of {env!r} must be installed, or in the working directory "
                f"({str(Path.cwd())!r}), and all that it imports."
            ) from error
    spec = gym.registry.get(name)
    has_vector = spec is not None and spec.vector_entry_point is not None
    if has_vector and (num_envs is not None or spec.entry_point is None):
        return gym.make_vec(env, **{"num_envs": num_envs or 1, **context})
    return gym.make(env, **context)


def _class_at(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        found: Callable[..., Any]
        found = getattr(importlib.import_module(module), name)
        return found
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"There is no class {path!r} to be imported here ({error}). A class must stand at the "
            "top of a module that is installed or in the working directory; or register it there "
            "with gymnasium.register and name it 'module:Id-v0'."
        ) from None


def check_setting(name: str, config: AlgorithmConfig) -> None:
    """Raises `ValueError` with the nearest name if `config` has no setting `name`."""
    known = set(vars(config)) | {n for n in dir(type(config)) if not n.startswith("_")}
    translated = config._translate_special_keys(name, warn_deprecated=False)
    if name.startswith("__") or translated in known or name in known:
        return
    close = difflib.get_close_matches(name, sorted(known), n=1)
    raise ValueError(
        f"There is no setting {name!r}." + (f" Did you mean {close[0]!r}?" if close else "")
    )


def is_frozen(config: AlgorithmConfig) -> bool:
    """Returns whether `config` can be changed no more."""
    return bool(config._is_frozen)


def is_local(storage: Any) -> bool:
    """Returns whether a trainable can write its storage's files itself; None is no storage."""
    return storage is not None and isinstance(storage.storage_filesystem, LocalFileSystem)


def save_in_place(algorithm: Any) -> Any:
    """Saves a trial as `Trainable.save()` does and returns the same, but writes to where it stays.

    Tune's own writes a checkpoint to a temporary directory and copies all of it to the trial's: a
    replay of gigabytes twice each time, though little of it is new. `save_checkpoint` links what
    the trial's checkpoint before it has (`replay_files`).

    Raises:
        RuntimeError: from Tune: the storage's directory is not the one of the driver's machine.
    """
    storage, metrics = algorithm._storage, dict(algorithm._last_result or {})
    storage._check_validation_file()
    storage._update_checkpoint_index(metrics)
    directory = Path(storage.checkpoint_fs_path)
    algorithm.save_checkpoint(str(directory))
    storage.persist_artifacts(force=storage.sync_config.sync_artifacts_on_checkpoint)
    saved = Checkpoint(str(directory), storage.storage_filesystem)
    return _TrainingResult(checkpoint=saved, metrics=metrics)
