"""What an experiment is: algorithms x tasks x settings x seeds, and how they are run.

An experiment file is YAML; `ExperimentSpec.from_dict` takes the same keys from Python. Everything
is checked here, before anything starts.
"""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qvpo_rllib.algorithms import ALGORITHMS, entry_of
from qvpo_rllib.core.env_config import encode_env_config
from qvpo_rllib.core.options import RUN_DEFAULTS, Options, Range, Setting
from qvpo_rllib.core.options.shared import EnvironmentOptions
from qvpo_rllib.training.plan import check_environment, warn_of_no_update
from qvpo_rllib.tuning.search_space import Distribution, parse_space
from qvpo_rllib.tuning.spec_file import KeyPath, Section, SpecError, is_number, read_yaml

METHODS = ("grid", "random", "asha", "pbt", "optuna")
NAME = Range(
    "letters, digits, '-', '_' and '.' (it names a directory)",
    lambda value: isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*", value) is not None,
)
DIRECTORY = Range(
    "a directory (on a cluster, one all nodes share)",
    lambda value: (
        isinstance(value, str)
        and value != ""
        and "://" not in value
        and not os.path.expanduser(value).startswith("~")  # as of a user without a home
    ),
)
GPUS = Range("one GPU or a fraction of one", lambda value: is_number(value) and 0 <= value <= 1)
QUANTILE = Range(
    "a number above 0 and at most 0.5", lambda value: is_number(value) and 0 < value <= 0.5
)


@dataclass(frozen=True, kw_only=True)
class Search:
    """How settings are found.

    Attributes:
        method: grid: every setting of the sweep; random: `num_samples` drawn from the space; asha:
            either of them, the worst stopped early; pbt: a population, one member per seed; optuna:
            `num_samples`, each chosen from the results before it.
        num_samples: settings drawn from the space.
        seed: of the draws.
        grace_steps: asha: env steps before a trial can be stopped.
        reduction: asha: one in so many goes on at each rung.
        interval_steps: pbt: env steps between two perturbations.
        quantile: pbt: share of the population that copies, and is copied.
    """

    method: str = "grid"
    num_samples: int | None = None
    seed: int = 0
    grace_steps: int | None = None
    reduction: int = 3
    interval_steps: int | None = None
    quantile: float = 0.25


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """A second stage: the `top` settings of the search, run anew on `seeds` it never saw."""

    seeds: tuple[int, ...]
    top: int = 1


class Made(NamedTuple):
    """How an environment is made: see `check_environment`."""

    frame_skip: int
    wrappers: tuple[str, ...]
    takes_vectors: bool


@dataclass(frozen=True, kw_only=True)
class ExperimentSpec:
    """A checked experiment; see `tune_configs/` and its README for files and keys."""

    name: str
    algorithms: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    env_steps: int
    preset: str
    training: Setting  # options of every algorithm
    per_algorithm: dict[str, Setting]  # and of one
    settings: tuple[Setting, ...]
    space: dict[str, Distribution]
    search: Search
    confirm: Confirmation | None
    evaluation_interval: int  # env steps
    evaluation_episodes: int
    num_env_runners: int
    num_envs_per_env_runner: int
    num_cpus: int
    num_gpus: float
    max_concurrent: int | None
    max_failures: int
    checkpoint_every: int  # evaluations
    checkpoint_replay: bool
    storage: str
    env_config: dict[str, Any]  # arguments of every task's environment

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ExperimentSpec":
        """The experiment with these keys, as in a file. Raises `SpecError`, a `ValueError`."""
        return _read(Section(values))

    @classmethod
    def load(cls, path: Path | str) -> "ExperimentSpec":
        """The experiment in a YAML file. Raises `ValueError` with file, line and key."""
        return read_yaml(Path(path), cls.from_dict)

    def training_of(self, algorithm: str) -> Setting:
        """Returns what the file gives for an algorithm's every trial, beside the preset."""
        return {**self.training, **self.per_algorithm.get(algorithm, {})}

    def options(self, algorithm: str, setting: Setting | None = None) -> Options:
        """Returns an algorithm's options in the trials of a setting. Raises `ValueError`.

        What they leave to the task stays none, since an experiment may have several tasks.
        """
        given = {**self.training_of(algorithm), **(setting or {})}
        kind = entry_of(algorithm).hyperparameters
        return kind.resolve(self.preset, given, env_steps=self.env_steps)

    @property
    def swept(self) -> tuple[str, ...]:
        """The options that differ between settings, in the order of the file."""
        names = [name for setting in self.settings for name in setting]
        return tuple(dict.fromkeys([*names, *self.space]))

    def left_out(self, algorithm: str) -> Setting:
        """Returns the values of swept options that some settings leave out; none if all have all.

        A setting that leaves one out takes the preset's value, or that of `training`.
        """
        if all(len(setting) == len(self.swept) for setting in self.settings) or self.space:
            return {}
        options = self.options(algorithm).to_json()
        return {name: options[name] for name in self.swept}

    @property
    def made(self) -> list[Made]:
        """Returns how the trials make their environments, each way once."""
        space = {n: d for n, d in self.space.items() if n in EnvironmentOptions.__annotations__}
        drawn: list[Setting] = [{n: value} for n, d in space.items() for value in d.values]
        found: dict[Made, None] = {}
        for algorithm, setting in itertools.product(self.algorithms, (*self.settings, *drawn)):
            takes_vectors = entry_of(algorithm).load().config_class.takes_vectors
            options = self.options(algorithm, setting).to_dict()
            found[Made(options["frame_skip"], options["wrappers"], takes_vectors)] = None
        return list(found)

    @property
    def steps_together(self) -> int:
        """Env steps taken at once: the environments of all workers."""
        return self.num_envs_per_env_runner * max(1, self.num_env_runners)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; equal for equal experiments, wherever they are kept."""
        values = asdict(self)
        del values["storage"]
        if not self.env_config:  # as experiments of earlier versions are recorded
            del values["env_config"]
        else:
            values["env_config"] = encode_env_config(self.env_config)
        values["space"] = {name: str(d) for name, d in self.space.items()}
        return values


def _read(root: Section) -> ExperimentSpec:
    with (
        root,
        root.section("sweep") as sweep,
        root.section("search") as search,
        root.section("evaluation") as evaluation,
        root.section("workers") as workers,
        root.section("resources") as resources,
        root.section("checkpoints") as checkpoints,
    ):
        algorithms = root.items("algorithm", "qvpo")
        for algorithm in algorithms:
            if algorithm not in ALGORITHMS:
                root.refuse("algorithm", algorithm, f"it must be one of {', '.join(ALGORITHMS)}")
        preset = root.word("preset", "default", RUN_DEFAULTS)
        defaults = entry_of(algorithms[0]).hyperparameters.runs[preset]
        seeds = _seeds(root, "seeds")
        env_steps = root.integer("env_steps", defaults.env_steps, least=1)
        space = parse_space(sweep.section("space"))
        interval = evaluation.integer("interval", min(defaults.eval_interval, env_steps), least=1)
        checkpoint_interval = checkpoints.integer("every", interval, least=1)
        spec = ExperimentSpec(
            name=root.take("name", allow=NAME),
            algorithms=tuple(algorithms),
            tasks=tuple(root.items("task", defaults.env)),
            seeds=seeds,
            env_steps=env_steps,
            preset=preset,
            training=root.section("training").take_all(),
            per_algorithm=_per_algorithm(root.section("per_algorithm"), algorithms),
            settings=_settings(sweep),
            space=space,
            search=_search(search, bool(space), env_steps),
            confirm=_confirmation(root, seeds),
            evaluation_interval=interval,
            evaluation_episodes=evaluation.integer("episodes", 10, least=1),
            num_env_runners=workers.integer("num_env_runners", 0),
            num_envs_per_env_runner=workers.integer(
                "num_envs_per_env_runner", defaults.num_envs, least=1
            ),
            num_cpus=resources.integer("num_cpus", 1, least=1),
            num_gpus=float(resources.take("num_gpus", 0.0, GPUS)),
            max_concurrent=resources.integer("max_concurrent", None, least=1),
            max_failures=resources.integer("max_failures", 0),
            checkpoint_every=max(1, checkpoint_interval // interval),
            checkpoint_replay=checkpoints.flag("replay", True),
            storage=root.take("storage", "results", DIRECTORY),
            env_config=dict(root.section("env_config").take_all()),
        )
    _check_steps(spec, checkpoint_interval)
    _check_search(spec)
    _check_options(spec)
    _check_tasks(spec)
    for algorithm in spec.algorithms:
        warn_of_no_update(spec.env_steps, spec.options(algorithm, {}).to_json())
    return spec


def _check_tasks(spec: ExperimentSpec) -> None:
    """Every task must be an environment that suits, wrapped as its trials wrap it."""
    try:
        encode_env_config(spec.env_config)
    except ValueError as error:
        raise SpecError(("env_config",), str(error)) from error
    for task, made in itertools.product(spec.tasks, spec.made):
        try:
            check_environment(
                task,
                spec.env_config,
                made.frame_skip,
                made.wrappers,
                num_envs=spec.num_envs_per_env_runner,
                takes_vectors=made.takes_vectors,
            )
        except ValueError as error:
            raise SpecError(("task",), str(error)) from error


def _per_algorithm(section: Section, algorithms: Sequence[str]) -> dict[str, Setting]:
    """`per_algorithm: {ppo: {lr: 1e-3}}`"""
    with section:
        found = {name: section.section(name).take_all() for name in algorithms}
    return {name: options for name, options in found.items() if options}


def _seeds(section: Section, name: str) -> tuple[int, ...]:
    seeds = section.take(name, [0])
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        several = list(range(max(2, min(seeds, 9))))
        section.refuse(
            name, seeds, f"seeds are a list: [{seeds}] is that one, {several} are several"
        )
    seeds = section.listed(name, seeds)
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            section.refuse(name, seed, "seeds are integers of 0 or more, such as [0, 1, 2, 3, 4]")
    return tuple(seeds)


def _settings(sweep: Section) -> tuple[Setting, ...]:
    """Returns the combinations that `settings` lists, each with every point of `grid`'s axes."""
    listed = sweep.items("settings", {})
    for number, setting in enumerate(listed):
        if not isinstance(setting, Mapping):
            raise SpecError(
                (*sweep.key, "settings", number),
                f"{setting!r} is not allowed: it must be a mapping, such as {{k_behavior: 4}}.",
            )
    grid = sweep.section("grid")
    values = grid.take_all()
    axes = {name: Section(values, grid.key).items(name) for name in values}
    for name in axes:
        if any(name in setting for setting in listed):
            raise SpecError((*grid.key, name), "it is in `settings` too; keep one of them.")
    points = [dict(zip(axes, p, strict=True)) for p in itertools.product(*axes.values())]
    return tuple({**setting, **point} for setting in listed for point in points)


def _search(section: Section, has_space: bool, env_steps: int) -> Search:
    search = Search(
        method=section.word("method", "random" if has_space else "grid", METHODS),
        num_samples=section.integer("num_samples", None, least=1),
        seed=section.integer("seed", 0),
        grace_steps=section.integer("grace_steps", None, least=1),
        reduction=section.integer("reduction", 3, least=2),
        interval_steps=section.integer("interval_steps", None, least=1),
        quantile=float(section.take("quantile", 0.25, QUANTILE)),
    )
    for name, method in (("grace_steps", "asha"), ("interval_steps", "pbt")):
        value = getattr(search, name)
        if value is not None and (search.method != method or value > env_steps):
            section.refuse(name, value, f"it is for {method}, and at most {env_steps:,}")
    return search


def _confirmation(root: Section, seeds: tuple[int, ...]) -> Confirmation | None:
    if "confirm" not in root:
        root.take("confirm", None)  # so that it is named where a key is refused
        return None
    with root.section("confirm") as section:
        top = section.integer("top", 1, least=1)
        confirm = Confirmation(seeds=_seeds(section, "seeds"), top=top)
        seen = sorted(set(confirm.seeds) & set(seeds))
        if seen:
            reason = "the search has used them; a setting is confirmed on seeds it never saw"
            section.refuse("seeds", seen, reason)
    return confirm


def _check_steps(spec: ExperimentSpec, checkpoint_every: int) -> None:
    """Evaluations, checkpoints and the end fall on whole iterations: exactly these env steps.

    But where resets take the place of steps (vector environments, NEXT_STEP): soon after them.
    """
    together, interval = spec.steps_together, spec.evaluation_interval
    if interval % together:
        raise SpecError(
            ("evaluation", "interval"),
            f"{interval} is not allowed: {together} environments step together, so it must be a "
            f"multiple of {together}, such as {-(-interval // together) * together}.",
        )
    if spec.env_steps % interval:
        raise SpecError(
            ("env_steps",),
            f"{spec.env_steps} is not allowed: it must be a multiple of the evaluation interval, "
            f"{interval}, so that the last evaluation is at the end.",
        )
    if checkpoint_every % interval:
        raise SpecError(
            ("checkpoints", "every"),
            f"{checkpoint_every} is not allowed: it must be a multiple of the evaluation interval, "
            f"{interval} env steps.",
        )


def _check_search(spec: ExperimentSpec) -> None:
    method, search = spec.search.method, spec.search
    swept = len(spec.settings) > 1 or any(spec.settings)
    needs_samples = method in ("random", "optuna") or (method == "asha" and bool(spec.space))
    at = ("search", "method")
    if method in ("random", "pbt", "optuna") and not spec.space:
        raise SpecError(at, f"{method} draws settings: it needs sweep.space.")
    if method == "grid" and spec.space:
        raise SpecError(at, "grid runs every setting: it cannot draw from sweep.space.")
    if method != "grid" and spec.space and swept:
        raise SpecError(at, f"{method} draws from sweep.space; leave settings and grid out.")
    if needs_samples and search.num_samples is None:
        raise SpecError(("search",), f"num_samples is missing: how many settings {method} draws.")
    if not needs_samples and search.num_samples is not None:
        raise SpecError(
            ("search", "num_samples"),
            f"{search.num_samples} is not used by {method}"
            + (": its population has one member per seed." if method == "pbt" else "."),
        )
    if method in ("asha", "optuna") and len(spec.seeds) > 1:
        raise SpecError(
            ("seeds",),
            f"{method} compares trials with each other, so with several seeds it would keep lucky "
            "ones: give one seed, and `confirm: {seeds: [...]}` to run the best on fresh seeds.",
        )
    if method in ("asha", "optuna", "pbt") and len(spec.tasks) * len(spec.algorithms) > 1:
        raise SpecError(at, f"{method} searches one task with one algorithm.")
    if method == "pbt" and len(spec.seeds) < 2:
        raise SpecError(("seeds",), "pbt needs a population: a seed for each of its members.")
    if spec.confirm is not None and method == "pbt":
        raise SpecError(("confirm",), "pbt finds a schedule, not a setting: it has none to rerun.")
    if method == "pbt":
        for name in spec.space:
            if name in entry_of(spec.algorithms[0]).hyperparameters.fixed_by_checkpoint:
                raise SpecError(
                    ("sweep", "space", name), "pbt cannot change it: a checkpoint fits one value."
                )


def _check_options(spec: ExperimentSpec) -> None:
    """Every algorithm must know every option and allow every value it could get."""
    for algorithm in spec.algorithms:
        for name in spec.training_of(algorithm):
            if name in spec.swept:
                raise SpecError(("training", name), "it is in the sweep too; keep one of them.")
        try:
            entry_of(algorithm).hyperparameters.preset(spec.preset)
        except ValueError as error:
            raise SpecError(("preset",), str(error)) from error
        _check_setting(spec, algorithm, {}, ("training",))
        for setting in spec.settings:
            _check_setting(spec, algorithm, setting, ("sweep", "grid"))
        for name, distribution in spec.space.items():
            for value in distribution.values:
                _check_setting(spec, algorithm, {name: value}, ("sweep", "space"))


def _check_setting(spec: ExperimentSpec, algorithm: str, setting: Setting, key: KeyPath) -> None:
    """Raises `SpecError` at the option that is wrong in the trials of a setting."""
    try:
        spec.options(algorithm, setting)
    except ValueError as error:
        own = spec.per_algorithm.get(algorithm, {})
        given = {**spec.training, **own, **setting}
        wrong = (n for n in given if str(error).startswith((f"{n}=", f"There is no option {n!r}")))
        named = tuple(wrong)
        if own and not setting and not (named and named[0] not in own):
            key = ("per_algorithm", algorithm)
        raise SpecError((*key, *named), str(error)) from error
