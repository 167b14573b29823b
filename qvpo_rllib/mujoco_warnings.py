"""MuJoCo's warnings: kept, except those about the text of Gymnasium's model files."""

import sys

import mujoco

# MuJoCo 4 says this for every HalfCheetah it makes, on stderr and in a file MUJOCO_LOG.TXT.
MODEL_FILE_NOTICE = "is deprecated and will be removed"


def filter_warnings() -> None:
    """Prints MuJoCo's warnings on stderr, without those a user can do nothing about."""
    mujoco.set_mju_user_warning(_show)


def _show(message: str) -> None:
    if MODEL_FILE_NOTICE not in message:
        print(f"MuJoCo: {message}", file=sys.stderr)
