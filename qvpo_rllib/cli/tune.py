"""`qvpo tune`."""

import argparse
import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvpo_rllib.cli.terminal import EXIT_FAILED, EXIT_INTERRUPTED
from qvpo_rllib.core.options import require_at_least
from qvpo_rllib.ray_session import start_ray
from qvpo_rllib.training.trackers import LOG_HELP, LOGGERS, require, tune_callback

if TYPE_CHECKING:
    from qvpo_rllib.tuning.spec import ExperimentSpec


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    tune = commands.add_parser(
        "tune",
        help="run an experiment file: seeds, sweeps, searches",
        description="Run an experiment file (see tune_configs/) with Ray Tune. Run the same "
        "command again after a crash or Ctrl-C and it goes on; a finished experiment says so.",
        allow_abbrev=False,
    )
    tune.add_argument("file", type=Path, metavar="FILE", help="such as tune_configs/smoke.yaml")
    tune.add_argument(
        "--resume", action="store_true", help="go on, and refuse to start: there must be something"
    )
    tune.add_argument(
        "--smoke", action="store_true", help="shrink it to minutes: does the whole path work?"
    )
    tune.add_argument(
        "--address", metavar="ADDR", help="of a running Ray cluster, or auto (default: start one)"
    )
    tune.add_argument(
        "--num-samples", type=int, metavar="N", help="settings to draw, for a search that draws"
    )
    tune.add_argument(
        "--storage", type=Path, metavar="DIR", help="where experiments go (default: the file's)"
    )
    tune.add_argument("--max-concurrent", type=int, metavar="N", help="trials at a time")
    tune.add_argument(
        "--log",
        choices=LOGGERS,
        action="append",
        default=[],
        help=LOG_HELP,
    )
    tune.set_defaults(run=_tune)


def _tune(options: argparse.Namespace) -> int:
    from qvpo_rllib.tuning.experiment import EXPERIMENT_FILE, Experiment
    from qvpo_rllib.tuning.interruption import INTERRUPTION
    from qvpo_rllib.tuning.tuner import check_trial_resources

    spec = _spec(options)
    callbacks = [tune_callback(name, spec.name) for name in options.log]
    command = ["qvpo", *sys.argv[1:]]
    experiment = Experiment(spec)
    if options.resume and not (experiment.directory / EXPERIMENT_FILE).exists():
        raise ValueError(
            f"There is nothing to resume: {str(experiment.directory)!r} holds no experiment. Leave "
            "--resume out to start it, or give the --storage it was started with."
        )
    if experiment.complete:
        print(f"Finished already: {experiment.directory}\n{_report_hint(experiment.directory)}")
        return 0
    with INTERRUPTION.watching(), experiment.writing():
        try:
            _start_ray(options.address, spec)
            check_trial_resources(spec)
            INTERRUPTION.listen()
            print(f"Experiment: {experiment.directory}", flush=True)
            complete = experiment.run(callbacks, command)
        except OSError as error:
            error.add_note(
                f"Trials in {str(experiment.directory)!r} go on from their last checkpoints: see "
                f"to the disk, then run the same command again: `{shlex.join(command)}`."
            )
            raise
        finally:
            import ray

            ray.shutdown()
    if complete:
        print(f"Done.\n{_report_hint(experiment.directory)}")
        return 0
    if INTERRUPTION.asked:
        for name in INTERRUPTION.unsaved:
            print(f"Not saved in time, goes on from its last checkpoint: {name}")
        print(f"Saved. To go on, the same command again: {shlex.join(command)}")
        return EXIT_INTERRUPTED
    failures = experiment.failures()
    if failures:
        print("\n".join(["Failed trials:", *(f"  {line}" for line in failures)]))
        print("Run the same command again to go on with them from their last checkpoints.")
        return EXIT_FAILED
    print("Interrupted. Run the same command again to go on.")
    return EXIT_INTERRUPTED


def _spec(options: argparse.Namespace) -> "ExperimentSpec":
    """Returns the file's experiment with what the command line changes, checked."""
    from qvpo_rllib.tuning.smoke import shrink
    from qvpo_rllib.tuning.spec import ExperimentSpec

    spec = ExperimentSpec.load(options.file)
    for name in ("num_samples", "max_concurrent"):
        require_at_least("--" + name.replace("_", "-"), getattr(options, name), 1)
    if options.num_samples is not None:
        if spec.search.num_samples is None:
            raise ValueError(
                f"--num-samples {options.num_samples} is not used here: {options.file} has search "
                f"method {spec.search.method!r}, which does not draw settings."
            )
        search = dataclasses.replace(spec.search, num_samples=options.num_samples)
        spec = dataclasses.replace(spec, search=search)
    if options.smoke:
        spec = shrink(spec)
    spec = dataclasses.replace(
        spec,
        storage=str(options.storage or spec.storage),
        max_concurrent=options.max_concurrent or spec.max_concurrent,
    )
    if not options.address and not os.environ.get("RAY_ADDRESS"):
        _check_gpu(spec, options.file)
    if spec.search.method == "optuna":
        require("optuna", "search.method: optuna")
    return spec


def _check_gpu(spec: "ExperimentSpec", file: Path) -> None:
    """Raises `ValueError` for a GPU that this machine lacks: Ray would wait for it for ever."""
    import torch

    if spec.num_gpus > 0 and not torch.cuda.is_available():
        raise ValueError(
            f"{file} asks for num_gpus={spec.num_gpus:g} for each trial, but PyTorch "
            f"{torch.__version__} finds no CUDA device here. Take a _light.yaml file, set "
            "resources.num_gpus to 0, give --smoke, or give the --address of a cluster with GPUs."
        )


def _start_ray(address: str | None, spec: "ExperimentSpec") -> None:
    # The new output would print a banner beside the table of trials.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # The metric of a search is in every result; RLlib's have more columns than Tune expects.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    # Tune warns when its state is saved often; every checkpoint saves it.
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    # Ctrl-C is ours (`tuning.interruption`); Tune then ends at SIGUSR1 alone.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    start_ray(spec.num_cpus + spec.num_env_runners, address)


def _report_hint(directory: Path) -> str:
    command = ["qvpo", "report", str(directory), "--out", str(directory / "report")]
    return f"  Report: {shlex.join(command)}"
