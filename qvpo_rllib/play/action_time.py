"""The time of one action, as in the paper's Table 4."""

import time
from pathlib import Path

import numpy as np

from qvpo_rllib.report.runs import Run

WARM_UP, REPEATS = 20, 200


def action_time_ms(run: Run) -> float | None:
    """Median milliseconds for one observation's action, the best of `k_eval` where there is one.

    Measured on this machine with the run's newest checkpoint; None if it has none. Loading a
    checkpoint runs code: load only your own.
    """
    import torch

    from qvpo_rllib.play.trained_policy import load_player

    directory = Path(run.directory)
    found = sorted(directory.glob("checkpoint_*")) or [directory / "checkpoints" / "last"]
    if not (found[-1] / "policies" / "default_policy").is_dir():
        return None
    player = load_player(found[-1])
    generator = torch.Generator()
    obs = np.zeros((1, player.obs_dim), np.float32)
    times_s = []
    for _ in range(WARM_UP + REPEATS):
        start = time.perf_counter()
        player.act(obs, None, generator)
        times_s.append(time.perf_counter() - start)
    return float(np.median(times_s[WARM_UP:])) * 1e3
