"""The same `qvpo train` command given twice: a scheduler's retry, a node that was taken away."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvpo_rllib.experiments.directory_lock import DirectoryLock


def begun(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether `path` holds a run of `config` that can be gone on with.

    A run that ended before its first checkpoint cannot: its directory is renamed, with "-unsaved-"
    and the time, and the run begins anew.

    Args:
        config: what `config.json` would hold for a new run.

    Raises:
        ValueError: `path` holds a run with other settings, or one that another program is still
            writing. Nothing is changed.
    """
    file = path / "config.json"
    if not file.exists():
        return False
    found = json.loads(file.read_text())
    own = json.loads(json.dumps(dict(config)))
    changed = sorted(name for name in {*own, *found} if own.get(name) != found.get(name))
    if changed:
        raise ValueError(
            f"{str(path)!r} holds a run with other values of {', '.join(changed)}: --or-resume "
            "goes on only with the very run that was begun there. Give the same options as then, "
            f"another --run-dir, or `--resume {path}`, which takes the run's own options."
        )
    if (path / "checkpoints" / "last").is_dir():
        return True
    with DirectoryLock(path):
        path.rename(path.with_name(f"{path.name}-unsaved-{time.strftime('%Y%m%d-%H%M%S')}"))
    return False
