"""Trains on a cluster of this machine while workers and nodes are killed, at random.

    python tests/soak.py --minutes 10 --kill-every 30

Ends with a line of JSON and exit code 0 if training went on to the end with an exact ledger, no
transition taken in twice and flat memory. Run by hand; `test_faults.py` runs a short one.
`soak_server.py` does the same to a server.
"""

import argparse
import json
import logging
import os
import random
import signal
import statistics
import sys
import time
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [os.path.dirname(os.path.abspath(__file__)), os.environ.get("PYTHONPATH", "")]
)

import psutil
import ray
from ray.cluster_utils import Cluster

from qvpo_rllib import QVPOConfig
from qvpo_rllib.ray_session import LOOPBACK

NODES, CPUS_PER_NODE, WORKERS = 2, 2, 3
WORKER_TITLE = "ray::ColumnarRolloutWorker"
NODE = {"num_cpus": CPUS_PER_NODE, "object_store_memory": 100 * 2**20}
MAX_GROWTH_MIB = 30  # of the driver, from the run's second fifth to its last


class Saboteur:
    """Kills a worker or a node of its own cluster, and replaces the node."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster, self.rng = cluster, random.Random(seed)
        self.nodes = [self._add_node() for _ in range(NODES)]
        self.kills = {"worker": 0, "node": 0}

    def strike(self) -> str:
        kind = self.rng.choice(list(self.kills))
        if kind == "worker":
            workers = self._worker_processes()
            if not workers:
                return "nothing: all workers are restarting"
            self.rng.choice(workers).send_signal(signal.SIGKILL)
        else:
            victim = self.nodes.pop(self.rng.randrange(len(self.nodes)))
            self.cluster.remove_node(victim, allow_graceful=False)
            self.nodes.append(self._add_node())
        self.kills[kind] += 1
        return kind

    def _add_node(self) -> Any:
        return self.cluster.add_node(node_ip_address=LOOPBACK, **NODE)

    def _worker_processes(self) -> list[psutil.Process]:
        raylets = [node.all_processes["raylet"][0].process.pid for node in self.nodes]
        children = [c for pid in raylets for c in psutil.Process(pid).children(recursive=True)]
        return [c for c in children if c.is_running() and _title(c).startswith(WORKER_TITLE)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def make_algorithm(mode: str, seed: int) -> Any:
    from conftest import TINY

    config = QVPOConfig().environment("environments:Traceable-v0")
    config.training(**{**TINY, "update_ratio": 0.25, "sampling_mode": mode})
    config.env_runners(num_env_runners=WORKERS, num_envs_per_env_runner=4)
    config.reporting(min_sample_timesteps_per_iteration=1000)
    config.debugging(seed=seed, log_level="ERROR")
    config.evaluation(evaluation_interval=None)
    return config.build_algo()


def soak(minutes: float, kill_every_s: float, mode: str, seed: int) -> dict[str, Any]:
    """Trains for `minutes`. Raises `AssertionError` as soon as a count is off."""
    from tracing import Trace

    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "node_ip_address": LOOPBACK}
    )
    try:
        saboteur = Saboteur(cluster, seed)
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        algorithm = make_algorithm(mode, seed)
        trace = Trace(algorithm)
        start = next_kill = time.monotonic()
        next_kill += kill_every_s
        memory: list[float] = []
        while time.monotonic() < start + 60 * minutes:
            result = algorithm.train()
            trace.check()
            memory.append(psutil.Process().memory_info().rss / 2**20)
            if time.monotonic() >= next_kill:
                struck = saboteur.strike()
                next_kill = time.monotonic() + kill_every_s
                print(
                    f"{time.monotonic() - start:.0f} s: killed {struck}; "
                    f"{algorithm.ledger.ingested:,} env steps, {memory[-1]:.0f} MiB, "
                    f"{result['faults']}",
                    flush=True,
                )
        algorithm.drain()
        trace.check()
        fifth = max(1, len(memory) // 5)
        growth = statistics.median(memory[-fifth:]) - statistics.median(memory[fifth : 2 * fifth])
        summary = {
            "minutes": round((time.monotonic() - start) / 60, 1),
            "mode": mode,
            "kills": saboteur.kills,
            "ledger": algorithm.ledger.state_dict(),
            "faults": algorithm.collector.faults.to_dict(),
            "memory_mib": round(memory[-1]),
            "memory_growth_mib": round(growth, 1),
        }
        algorithm.stop()
        return summary
    finally:
        ray.shutdown()
        cluster.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kill-every", type=float, default=30, metavar="SECONDS")
    parser.add_argument("--mode", choices=("async", "sync"), default="async")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    summary = soak(options.minutes, options.kill_every, options.mode, options.seed)
    print(json.dumps(summary))
    return 0 if summary["memory_growth_mib"] < MAX_GROWTH_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
