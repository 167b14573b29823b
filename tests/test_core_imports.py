"""The mathematics needs torch and numpy alone, the command line's help neither."""

import json
import subprocess
import sys

PROGRAM = """
import importlib, json, pkgutil, sys
import qvpo_rllib.core
names = [m.name for m in pkgutil.walk_packages(qvpo_rllib.core.__path__, "qvpo_rllib.core.")]
for name in names:
    importlib.import_module(name)
print(json.dumps({"imported": names, "loaded": sorted({m.split(".")[0] for m in sys.modules})}))
"""


def test_core_imports_neither_ray_nor_gymnasium():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    report = json.loads(run.stdout)
    modules = {name.rsplit(".", 1)[-1] for name in report["imported"]}
    assert {"diffusion", "learner", "losses", "networks", "replay", "sampler"} <= modules
    assert "torch" in report["loaded"]  # the report does list what was loaded
    assert not {"ray", "gymnasium", "gym", "mujoco"} & set(report["loaded"])


def test_the_help_of_every_command_needs_neither_ray_nor_torch():
    program = """
import sys
from qvpo_rllib import cli
cli.build_parser().format_help()
print(*sorted({m.split(".")[0] for m in sys.modules}))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "qvpo_rllib" in run.stdout.split()
    assert not {"ray", "torch", "gymnasium", "mujoco"} & set(run.stdout.split())


def test_a_learner_on_a_cpu_loads_no_triton():
    """It takes a third of a second, and its LLVM and Mesa's cannot be in one process."""
    program = "import sys, qvpo_rllib.core.qvpo; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "qvpo_rllib.core.sampler" in run.stdout.split()
    assert "triton" not in run.stdout.split()
