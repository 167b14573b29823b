"""Asks a server for actions while its processes are killed and clients stall, at random.

    python tests/soak_server.py --minutes 10 --strike-every 20

Ends with a line of JSON and exit code 0 if every answer was the seeded policy's own, none was a
5xx, and none was longer in coming than `MAX_OUTAGE_S`. Run by hand; `test_serving_cli.py` runs a
short one.
"""

import argparse
import http.client
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from qvpo_rllib.bench.http_load import fresh_bundle
from qvpo_rllib.serving import load
from qvpo_rllib.serving.server import serving

CLIENTS, REPLICAS, STALLED = 4, 2, 300
HOST = "127.0.0.1"
SEEDS, K = 20, 4
MAX_OUTAGE_S = 5.0
STRIKES = ("qvpo-worker", "qvpo-http", "stall")
PATH = "/v1/models/hopper/act"


class Client(threading.Thread):
    """Asks again and again; a lost connection is opened again and its request sent again."""

    def __init__(self, port: int, number: int, expected: dict[int, Any], end: float) -> None:
        super().__init__()
        self.port, self.expected, self.end = port, expected, end
        self.rng = random.Random(number)
        self.counts: Counter[str] = Counter()
        self.longest_s = 0.0  # between two answers

    def run(self) -> None:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        last = time.monotonic()
        while last < self.end:
            seed = self.rng.choice(list(self.expected))
            body = json.dumps({"observations": [[0.0] * 11], "k": K, "seed": seed})
            try:
                connection.request("POST", PATH, body)
                reply = connection.getresponse()
                text = reply.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                self.counts["lost"] += 1
                time.sleep(0.01)
                continue
            self.counts[f"{reply.status // 100}xx"] += 1
            if reply.status == 200:
                wrong = json.loads(text)["actions"] != self.expected[seed]
                self.counts["wrong"] += wrong
                now = time.monotonic()
                self.longest_s, last = max(self.longest_s, now - last), now


def strike(kind: str, port: int, rng: random.Random) -> list[socket.socket]:
    """Kills one of this server's processes, or returns clients that begin and go silent."""
    if kind != "stall":
        victims = [c for c in psutil.Process().children(recursive=True) if c.name() == kind]
        if victims:
            os.kill(rng.choice(victims).pid, signal.SIGKILL)
        return []
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n{{".encode()
    stalled = [socket.create_connection((HOST, port), timeout=60) for _ in range(STALLED)]
    for connection in stalled:
        connection.sendall(head)
    return stalled


def soak(minutes: float, strike_every_s: float, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch, socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
        free.close()
        bundle = fresh_bundle(Path(scratch) / "hopper")
        policy, obs = load(bundle), np.zeros((1, 11))
        expected = {
            s: policy.act(obs, K, torch.Generator().manual_seed(s)).tolist() for s in range(SEEDS)
        }
        strikes: Counter[str] = Counter()
        with serving([bundle], host=HOST, port=port, replicas=REPLICAS):
            end = time.monotonic() + 60 * minutes
            clients = [Client(port, number, expected, end) for number in range(CLIENTS)]
            for client in clients:
                client.start()
            stalled: list[socket.socket] = []
            while time.monotonic() + strike_every_s < end:
                time.sleep(strike_every_s)
                kind = STRIKES[sum(strikes.values()) % len(STRIKES)]
                stalled = strike(kind, port, rng)
                strikes[kind] += 1
            for client in clients:
                client.join()
            del stalled
        counts = sum((client.counts for client in clients), Counter())
    return {
        "minutes": minutes,
        "strikes": dict(strikes),
        "answers": counts["2xx"],
        "wrong": counts["wrong"],
        "5xx": counts["5xx"],
        "4xx": counts["4xx"],
        "lost_connections": counts["lost"],
        "longest_outage_s": round(max(client.longest_s for client in clients), 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--strike-every", type=float, default=20, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    summary = soak(options.minutes, options.strike_every, options.seed)
    print(json.dumps(summary))
    bad = summary["wrong"] + summary["5xx"] + summary["4xx"]
    return 0 if not bad and summary["longest_outage_s"] < MAX_OUTAGE_S else 1


if __name__ == "__main__":
    sys.exit(main())
