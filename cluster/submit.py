"""Runs a `qvpo` command on the cluster that this machine is a node of.

    ray submit cluster/aws.yaml cluster/submit.py -- tune k_sweep.yaml
    ray submit cluster/aws.yaml cluster/submit.py -- train --env Ant-v5 --run-dir runs/ant
    ray job submit --working-dir . -- python cluster/submit.py tune my_sweep.yaml

`train` and `tune` attach to the running cluster and never start a Ray of their own. A relative
--run-dir or --storage is below the home directory of the node, however the command got there. The
same command given again goes on where the first one stopped. A YAML file that is not there is
looked for among the package's tune_configs.

`ray submit` copies this file alone: it needs nothing but the installed package.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

ON_THE_CLUSTER = ("train", "tune")
ELSEWHERE = ("serve",)


def main(arguments: Sequence[str]) -> int:
    """The exit code of the `qvpo` command: 2 for bad input, and if there is no cluster."""
    # Ray reads it when it is imported; the nodes were started with it.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    command = arguments[0] if arguments else None
    if command in ELSEWHERE:
        return _refuse(f"{command!r} would start a Ray of its own; deploy a RayService instead.")
    words = [_found(word) for word in arguments]
    if command in ON_THE_CLUSTER:
        options = [word.partition("=")[0] for word in words]
        if "--address" not in options:
            words += ["--address", "auto"]
        if command == "train" and "--resume" not in options and "--help" not in options:
            if "--run-dir" not in options:
                return _refuse(
                    "'train' needs --run-dir DIR here, so that the same command given again goes "
                    "on with the run instead of starting another."
                )
            if "--or-resume" not in options:
                words.append("--or-resume")
    os.chdir(Path.home())
    from qvpo_rllib.cli import main as qvpo

    sys.argv = ["qvpo", *words]  # for the records of the run
    return qvpo(words)


def _found(word: str) -> str:
    """An experiment file as an absolute path: one that is here, else one of the package's."""
    if not word.endswith((".yaml", ".yml")):
        return word
    if Path(word).exists():
        return str(Path(word).absolute())
    import qvpo_rllib

    shipped = Path(qvpo_rllib.__file__).parents[1] / "tune_configs" / Path(word).name
    return str(shipped) if shipped.exists() else word


def _refuse(reason: str) -> int:
    print(f"submit.py: error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
