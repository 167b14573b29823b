"""`qvpo train`."""

import argparse
import dataclasses
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvpo_rllib.algorithms import ALGORITHMS
from qvpo_rllib.cli.terminal import EXIT_FAILED, EXIT_INTERRUPTED
from qvpo_rllib.core.options import RUN_DEFAULTS
from qvpo_rllib.training.trackers import LOG_HELP, LOGGERS

if TYPE_CHECKING:
    from qvpo_rllib.training.plan import TrainingPlan
    from qvpo_rllib.training.run import TrainingRun
    from qvpo_rllib.training.run_directory import RunDirectory

# Numbers in a hidden layer for all the samples of an update from which a second one of PyTorch's
# threads is worth its synchronisation: beside other programs an update of `quick` took 15 ms on two
# of them and 6 ms on one.
NUMBERS_FOR_THREADS = 200_000
ANEW = ("resume", "env_steps", "num_gpus", "address", "run")  # may be given with --resume
# The other options of the command are the arguments of `make_plan`.
NOT_OF_THE_PLAN = ("command", "run", "run_dir", "resume", "or_resume", "address")


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    train = commands.add_parser(
        "train",
        help="train a policy; without options, a quick start of a few minutes",
        description="Train a policy. Without options: a quick start on InvertedPendulum-v5 that "
        "takes a few minutes on two CPU cores. The run directory holds configuration, metrics, "
        "learning curve and checkpoints.",
        allow_abbrev=False,
    )
    train.add_argument(
        "--algo",
        default="qvpo",
        metavar="NAME",
        help="qvpo (default), or a rival: " + ", ".join(n for n in ALGORITHMS if n != "qvpo"),
    )
    train.add_argument("--env", metavar="ID", help="Gymnasium environment, such as Ant-v5")
    train.add_argument(
        "--env-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument of the environment, its value in YAML; repeatable",
    )
    train.add_argument(
        "--preset",
        choices=tuple(RUN_DEFAULTS),
        help="quick: the quick start; light: locomotion on a laptop CPU; default: the paper's "
        "setting with time limits bootstrapped (a GPU helps); paper: the letter of the paper; "
        "authors: the released program's values; rivals have the first three",
    )
    train.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    train.add_argument("--env-steps", type=int, metavar="N", help="environment steps in all")
    train.add_argument(
        "--num-env-runners",
        type=int,
        default=0,
        metavar="N",
        help="remote rollout workers; 0 (default) samples in the learner's process",
    )
    train.add_argument(
        "--num-envs-per-env-runner", type=int, metavar="N", help="environments per worker"
    )
    train.add_argument(
        "--num-gpus",
        type=float,
        metavar="N",
        help="0, a fraction, or 1 (default: 1 if there is one)",
    )
    train.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="where the run goes (default runs/<env>-<algo>-<time>)",
    )
    train.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with the run in directory RUN; only --env-steps, --num-gpus and --address can "
        "be given anew",
    )
    train.add_argument(
        "--or-resume",
        action="store_true",
        help="go on with the run in --run-dir if this very run was begun there: for a command that "
        "a cluster runs again",
    )
    train.add_argument(
        "--address",
        metavar="ADDR",
        help="of a running Ray cluster for the rollout workers, or auto (default: start one here)",
    )
    train.add_argument(
        "--eval-interval", type=int, metavar="N", help="env steps between two evaluations"
    )
    train.add_argument(
        "--checkpoint-interval",
        metavar="N|Nmin",
        help="a checkpoint every N env steps or N minutes, beside the one at every evaluation",
    )
    train.add_argument(
        "--keep-checkpoints",
        type=int,
        default=1,
        metavar="N",
        help="how many of the newest checkpoints are kept (default 1), the best apart; they share "
        "the replay's files: against a broken disk, copy the run elsewhere",
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="any hyperparameter, such as k_behavior=8 or hidden=256,256; repeatable",
    )
    train.add_argument("--log", choices=LOGGERS, action="append", default=[], help=LOG_HELP)
    train.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    from qvpo_rllib.checkpoints.metadata import Metadata
    from qvpo_rllib.checkpoints.run_state import check_whole
    from qvpo_rllib.training.plan import TrainingPlan, gpus_here, make_plan
    from qvpo_rllib.training.run_directory import RunDirectory, can_resume

    command = ["qvpo", *sys.argv[1:]]
    if options.or_resume and options.run_dir is None:
        raise ValueError(
            "--or-resume needs --run-dir: without it every start gets a directory of its own. Give "
            "the same --run-dir each time."
        )
    if options.resume is not None:
        _check_resume(options)
    else:
        plan = make_plan(**{n: v for n, v in vars(options).items() if n not in NOT_OF_THE_PLAN})
        name = f"{plan.env}-{plan.algo}-{time.strftime('%Y%m%d-%H%M%S')}"
        path = options.run_dir or Path("runs") / name
        if not (options.or_resume and can_resume(path, plan)):
            with RunDirectory.create(path, plan.to_dict(), command) as directory:
                return _run_plan(plan, directory, False, options.address)
        options.resume = path
    anew = {} if options.env_steps is None else {"env_steps": options.env_steps}

    def check(run: RunDirectory) -> None:
        nonlocal plan
        check_whole(run.checkpoint("last"))
        done = Metadata.read(run.checkpoint("last")).ledger["ingested"]
        if anew and not options.or_resume and options.env_steps < done:
            raise ValueError(
                f"--env-steps {options.env_steps} is not allowed: this run has done {done} env "
                "steps. Give more of them to go on."
            )
        plan = TrainingPlan.from_config(run.config | anew)
        plan = dataclasses.replace(plan, num_gpus=gpus_here(plan.num_gpus, options.num_gpus))
        plan.check()

    with RunDirectory.open(options.resume, command, check) as directory:
        return _run_plan(plan, directory, True, options.address)


def _check_resume(options: argparse.Namespace) -> None:
    parser = argparse.ArgumentParser()
    add(parser.add_subparsers(dest="command"))
    defaults = vars(parser.parse_args(["train"]))
    for name, value in vars(options).items():
        if name not in ANEW and value != defaults[name]:
            option = "--set" if name == "settings" else "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} cannot be changed on --resume: a run goes on with the settings in its "
                "config.json. Only --env-steps, --num-gpus and --address can be given anew."
            )


def _run_plan(
    plan: "TrainingPlan", directory: "RunDirectory", resume: bool, address: str | None
) -> int:
    from qvpo_rllib.training.run_directory import resume_command

    training = None
    try:
        with _interrupts_are_kept():
            from qvpo_rllib.training.run import TrainingRun

            _start_ray(plan, address)
            print(f"Run directory: {directory.path}")
            training = TrainingRun(plan, directory, resume=resume)
            _record_placement(training)
        return _run_training(training)
    except KeyboardInterrupt:
        if directory.discard_if_empty():
            print("Interrupted before training began: nothing was saved.")
        else:
            print(f"Saved. To go on: {resume_command(directory.path)}")
        return EXIT_INTERRUPTED
    except Exception as error:
        directory.discard_if_empty()
        if isinstance(error, OSError):
            error.add_note(_how_to_go_on(directory))
        raise
    finally:
        import ray

        if training is not None:
            training.close()
        ray.shutdown()


def _how_to_go_on(directory: "RunDirectory") -> str:
    """Returns what is left of a run that a disk's trouble has ended."""
    from qvpo_rllib.training.run_directory import resume_command

    try:
        last = directory.checkpoint("last")
    except ValueError:
        return "Training stopped before its first checkpoint. See to the disk and start it again."
    return (
        f"Training stopped. The last checkpoint, {str(last)!r}, is whole. See to the disk, then go "
        f"on from it: `{resume_command(directory.path)}`."
    )


@contextmanager
def _interrupts_are_kept() -> Iterator[None]:
    """Raises `KeyboardInterrupt` at the end of a block in which Ctrl-C was swallowed.

    An import or Ray's start may do that.
    """
    interrupted = False

    def handle(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt


def _run_training(training: "TrainingRun") -> int:
    path, planned = training.directory.path, training.plan.env_steps
    had_ended = training.env_steps >= planned
    try:
        training.run()
    except ValueError:  # not the user's input any more
        traceback.print_exc()
        return EXIT_FAILED
    _record_placement(training)
    evaluate = ["qvpo", "evaluate", str(path)]
    print(
        f"Done: best evaluation return {training.best:.1f}, last {training.last or 0:.1f}.\n"
        f"  {path}/learning_curve.png   the learning curve\n"
        f"  {path}/metrics.parquet      every number\n"
        f"  {path}/checkpoints/best     the best policy: {shlex.join(evaluate)}"
    )
    if had_ended:
        print(f"All its {planned:,} env steps were done before; --env-steps N takes it on to N.")
    return 0


def _record_placement(training: "TrainingRun") -> None:
    """Records and prints where the workers are; one whose node was lost may have moved since."""
    from qvpo_rllib.training.records import record_placement

    if training.plan.num_env_runners > 0:
        path = training.directory.path
        print(record_placement(path, training.algorithm, training.env_steps), flush=True)


def _start_ray(plan: "TrainingPlan", address: str | None) -> None:
    import torch

    from qvpo_rllib.ray_session import num_cores, start_ray

    start_ray(plan.num_env_runners + 1, address)
    on_own_ray = not address and not os.environ.get("RAY_ADDRESS")
    if on_own_ray and "OMP_NUM_THREADS" not in os.environ:
        # Beside a GPU the threads are for acting, which takes as many as are worth it.
        many = _numbers_in_a_layer(plan.hyperparameters) >= NUMBERS_FOR_THREADS
        threads = num_cores() - plan.num_env_runners if many or plan.num_gpus else 1
        torch.set_num_threads(max(1, threads))


def _numbers_in_a_layer(hp: Mapping[str, Any]) -> int:
    batch_size = hp["batch_size"] if "batch_size" in hp else hp["minibatch_size"]
    return int(batch_size * hp.get("num_policy_samples", 1) * max(hp["hidden"]))
