"""`--log`: Weights & Biases and MLflow beside a run's own files, for `qvpo train` and `qvpo tune`.

Each is imported when it is asked for. Where it sends what it gets is its own affair: WANDB_MODE,
MLFLOW_TRACKING_URI and its other variables say so.
"""

import importlib.util
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qvpo_rllib.files import read_json, write_json

if TYPE_CHECKING:
    from ray.tune import Callback

LOGGERS = ("wandb", "mlflow")
LOG_HELP = "log to Weights & Biases or MLflow too; repeatable (TensorBoard is always written)"
PROJECT = "qvpo_rllib"  # of Weights & Biases; MLflow's experiment for runs of `qvpo train`
IDS_FILE = "trackers.json"  # in a run directory: under which id each tracker knows the run

logger = logging.getLogger(__name__)


def require(package: str, wanted_by: str) -> None:
    """Raises `ValueError` with the command that installs it if `package` is missing."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{wanted_by} needs the package {package!r}, which is not installed. Install it with: "
            f"pip install 'qvpo_rllib[{package}]'"
        )


def check_loggers(names: Sequence[str]) -> None:
    """Raises `ValueError` for a tracker that does not exist or is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"--log {name!r} is not allowed: it must be one of {LOGGERS}.")
        require(name, f"--log {name}")


def tune_callback(name: str, experiment: str) -> "Callback":
    """Returns what logs the trials of a Ray Tune experiment. Raises as `check_loggers`."""
    check_loggers([name])
    if name == "wandb":
        from ray.air.integrations.wandb import WandbLoggerCallback

        return WandbLoggerCallback(project=PROJECT, group=experiment)
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    return MLflowLoggerCallback(experiment_name=experiment, save_artifact=False)


class Tracker(Protocol):
    """One run, at one tracker."""

    run_id: str

    def log(self, numbers: Mapping[str, float], env_steps: int) -> None: ...

    def close(self, *, finished: bool) -> None: ...


class Trackers:
    """All trackers of a run of `qvpo train`; a resumed run goes on under the same ids.

    A tracker that fails is dropped with a warning: training goes on.

    Args:
        names: of `LOGGERS`.
        directory: the run's.
        config: the content of its `config.json`.
    """

    def __init__(self, names: Sequence[str], directory: Path, config: Mapping[str, Any]) -> None:
        self._trackers: dict[str, Tracker] = {}
        file = directory / IDS_FILE
        ids = read_json(file, dict, "Delete it to log under new ids.") if file.exists() else {}
        for name in names:
            try:
                self._trackers[name] = KINDS[name](ids.get(name), directory, config)
            except Exception as error:  # a network, an account, a disk
                _warn(name, error)
        ids |= {name: tracker.run_id for name, tracker in self._trackers.items()}
        if ids:
            write_json(file, ids)

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends the numbers of a metrics row."""
        numbers = {n: float(v) for n, v in row.items() if isinstance(v, int | float)}
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(numbers, int(row["env_steps"]))
            except Exception as error:
                _warn(name, error)
                del self._trackers[name]

    def close(self, *, finished: bool) -> None:
        """Ends the logging. May be called again.

        Args:
            finished: whether the run has done all its env steps.
        """
        while self._trackers:
            name, tracker = self._trackers.popitem()
            try:
                tracker.close(finished=finished)
            except Exception as error:
                _warn(name, error)


def _warn(name: str, error: Exception) -> None:
    logger.warning(
        "--log %s: %s: %s. The run goes on without it; its own files have every number.",
        name,
        type(error).__name__,
        error,
    )


class _Wandb:
    def __init__(self, run_id: str | None, directory: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self.run_id = run_id or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=PROJECT,
            name=directory.name,
            id=self.run_id,
            resume="allow",
            dir=str(directory),
            config=dict(config),
        )
        # Of a resumed run rows may come again, which W&B's own count of steps does not allow.
        self._run.define_metric("*", step_metric="env_steps")

    def log(self, numbers: Mapping[str, float], env_steps: int) -> None:
        self._run.log(dict(numbers))

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _MLflow:
    def __init__(self, run_id: str | None, directory: Path, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if run_id is not None:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(PROJECT)
        number = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        self.run_id = self._client.create_run(number, run_name=directory.name).info.run_id
        for name, value in {**config, **config["hyperparameters"]}.items():
            if name != "hyperparameters":
                self._client.log_param(self.run_id, name, value)

    def log(self, numbers: Mapping[str, float], env_steps: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, env_steps) for name, value in numbers.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


KINDS: dict[str, Callable[[str | None, Path, Mapping[str, Any]], Tracker]] = {
    "wandb": _Wandb,
    "mlflow": _MLflow,
}
