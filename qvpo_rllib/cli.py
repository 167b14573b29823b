"""The command line: `qvpo train` and `qvpo evaluate`."""

import argparse
import difflib
import json
import logging
import os
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from qvpo_rllib.core.errors import NonFiniteError

# Ray replaces 127.0.0.1 by the machine's own address and would listen to the network.
LOOPBACK = "127.0.0.2"
EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Suggests the nearest option for a misspelt one."""

    def error(self, message: str) -> NoReturn:
        words = message.partition("unrecognized arguments: ")[2].split()
        known = [o for action in self._actions for o in action.option_strings]
        for word in words:
            close = difflib.get_close_matches(word.partition("=")[0], known, n=1)
            if close:
                message += f". Did you mean {close[0]}?"
                break
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message}\nSee {self.prog} --help.\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qvpo",
        description="Train a diffusion policy by online reinforcement learning: QVPO on Ray RLlib.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_evaluate(commands)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a policy; without options, a quick start of a few minutes",
        description="Train a policy. Without options: a quick start on InvertedPendulum-v5 that "
        "takes a few minutes on two CPU cores. The run directory holds configuration, metrics, "
        "learning curve and checkpoints.",
        allow_abbrev=False,
    )
    train.add_argument("--env", metavar="ID", help="Gymnasium environment, such as Ant-v5")
    train.add_argument(
        "--preset",
        choices=("quick", "light", "default", "paper", "authors"),
        help="quick: the quick start; light: locomotion on a laptop CPU; default: the paper's "
        "setting with time limits bootstrapped (a GPU helps); paper: the letter of the paper; "
        "authors: the released program's values",
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
        "--run-dir", type=Path, metavar="DIR", help="where the run goes (default runs/<env>-<time>)"
    )
    train.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with the run in directory RUN; only --env-steps can be given anew",
    )
    train.add_argument(
        "--eval-interval", type=int, metavar="N", help="env steps between two evaluations"
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="any hyperparameter, such as k_behavior=8 or hidden=256,256; repeatable",
    )
    train.set_defaults(run=_train)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="play episodes with a checkpoint's policy",
        description="Play whole episodes with a checkpoint's policy: the best of K actions in each "
        "state, scaled as in training. Loading a checkpoint runs code: load only your own.",
        allow_abbrev=False,
    )
    evaluate.add_argument(
        "checkpoint", type=Path, help="a checkpoint directory, or a run directory (its best)"
    )
    evaluate.add_argument("--episodes", type=int, default=10, metavar="N", help="default 10")
    evaluate.add_argument("--k", type=int, metavar="K", help="default: the checkpoint's k_eval")
    evaluate.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_evaluate)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if training failed; 2 for bad input; 130 if interrupted."""
    options, unknown = build_parser().parse_known_args(arguments)
    if unknown:
        _subparser(options.command).error(f"unrecognized arguments: {' '.join(unknown)}")
    _quiet()
    try:
        code: int = options.run(options)
    except ValueError as error:
        return _report(error, EXIT_BAD_INPUT)
    except NonFiniteError as error:
        return _report(error, EXIT_FAILED)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code


def _subparser(command: str) -> argparse.ArgumentParser:
    parser = build_parser()
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    found: argparse.ArgumentParser = action.choices[command]
    return found


def _report(error: Exception, code: int) -> int:
    print(textwrap.fill(f"qvpo: error: {error}", 100, break_on_hyphens=False), file=sys.stderr)
    return code


def _quiet() -> None:
    """RLlib announces on every start that the old API stack will go; the version is capped."""
    # Ray will stop hiding GPUs from actors that ask for none, and says so unless told which it is.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("ray").setLevel(logging.ERROR)


def _train(options: argparse.Namespace) -> int:
    from qvpo_rllib.experiments.plan import TrainingPlan, make_plan
    from qvpo_rllib.experiments.run_directory import RunDirectory

    command = ["qvpo", *sys.argv[1:]]
    if options.resume is not None:
        _check_resume(options)
        directory = RunDirectory.open(options.resume, command)
        values = dict(directory.config)
        if options.env_steps is not None:
            values["env_steps"] = options.env_steps
        try:
            plan = TrainingPlan(**values)
        except TypeError as error:
            raise ValueError(
                f"{directory.path}/config.json was written by another version of qvpo_rllib "
                f"({error}). Resume with that version; run.json names it."
            ) from error
    else:
        plan = make_plan(
            env=options.env,
            preset=options.preset,
            seed=options.seed,
            env_steps=options.env_steps,
            eval_interval=options.eval_interval,
            num_env_runners=options.num_env_runners,
            num_envs_per_env_runner=options.num_envs_per_env_runner,
            num_gpus=options.num_gpus,
            settings=options.settings,
        )
        path = options.run_dir or Path("runs") / f"{plan.env}-{time.strftime('%Y%m%d-%H%M%S')}"
        directory = RunDirectory.create(path, plan.to_dict(), command)
    with directory:
        return _run_plan(plan, directory, resume=options.resume is not None)


def _check_resume(options: argparse.Namespace) -> None:
    defaults = vars(build_parser().parse_args(["train"]))
    for name, value in vars(options).items():
        if name not in ("resume", "env_steps", "run") and value != defaults[name]:
            option = "--set" if name == "settings" else "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} cannot be changed on --resume: a run goes on with the settings in its "
                "config.json. Only --env-steps can be given anew."
            )


def _run_plan(plan: Any, directory: Any, *, resume: bool) -> int:
    training = None
    try:
        from qvpo_rllib.experiments.training import TrainingRun

        _start_ray(plan.num_env_runners)
        print(f"Run directory: {directory.path}")
        training = TrainingRun(plan, directory, resume=resume)
        return _run_training(training, directory.path)
    except KeyboardInterrupt:
        if directory.discard_if_empty():
            print("Interrupted before training began: nothing was saved.")
        else:
            print(f"Saved. To go on: qvpo train --resume {directory.path}")
        return EXIT_INTERRUPTED
    except Exception:
        directory.discard_if_empty()
        raise
    finally:
        _stop(training)


def _run_training(training: Any, path: Path) -> int:
    try:
        training.run()
    except ValueError:  # not the user's input any more
        traceback.print_exc()
        return EXIT_FAILED
    print(
        f"Done: best evaluation return {training.best:.1f}, last {training.last or 0:.1f}.\n"
        f"  {path}/learning_curve.png   the learning curve\n"
        f"  {path}/metrics.parquet      every number\n"
        f"  {path}/checkpoints/best     the best policy: qvpo evaluate {path}"
    )
    return 0


def _start_ray(num_env_runners: int) -> None:
    """The cluster of RAY_ADDRESS if that is set, else a Ray of its own on loopback."""
    import ray
    import torch

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return
    cores = len(os.sched_getaffinity(0))
    # Enough slots for every worker: on fewer cores they share, instead of waiting for ever.
    ray.init(
        address="local",
        num_cpus=max(cores, num_env_runners + 1),
        include_dashboard=False,
        _node_ip_address=LOOPBACK,
        **quiet,
    )
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores - num_env_runners))


def _stop(training: Any) -> None:
    import ray

    if training is not None:
        training.close()
    ray.shutdown()


def _evaluate(options: argparse.Namespace) -> int:
    from qvpo_rllib.experiments.evaluation import evaluate_checkpoint

    result = evaluate_checkpoint(
        options.checkpoint, episodes=options.episodes, k=options.k, seed=options.seed
    )
    if options.json:
        print(json.dumps(result.to_dict()))
        return 0
    print(f"{result.env}, best of K = {result.k} actions, seed {result.seed}")
    for number, episode in enumerate(result.episodes):
        print(
            f"  episode {number:3d}   return {episode.episode_return:10.1f}   "
            f"length {episode.length:5d}"
        )
    print(f"mean {result.mean:.1f}   std {result.std:.1f}   ({len(result.episodes)} episodes)")
    return 0
