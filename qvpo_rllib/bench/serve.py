"""`qvpo bench serve`: latency and throughput over HTTP beside the same policy called in-process."""

import argparse
import asyncio
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

CLIENTS = (1, 16, 64)


def add(subcommands: Any) -> None:
    serve = subcommands.add_parser(
        "serve",
        help="requests over HTTP, beside the direct call",
        description="Serve a policy on loopback and load it with clients that send one "
        "observation at a time; then call the same policy directly. Without BUNDLE: a fresh policy "
        "of Hopper's sizes and the paper's networks.",
        allow_abbrev=False,
    )
    serve.add_argument("bundle", type=Path, nargs="?", help="a directory of qvpo export")
    serve.add_argument("--k", type=int, default=4, metavar="K", help="default 4")
    serve.add_argument("--seconds", type=float, default=8.0, metavar="S", help="each (default 8)")
    serve.add_argument("--port", type=int, default=8765, help="default 8765")
    serve.add_argument("--json", action="store_true", help="print one JSON object")
    serve.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> int:
    from qvpo_rllib.bench.http_load import fresh_bundle, measure_direct, measure_load
    from qvpo_rllib.serving import load
    from qvpo_rllib.serving.server import serving

    if not 0 < options.seconds <= 3600:
        raise ValueError(f"--seconds {options.seconds:g} is not allowed: from 0 to 3600.")
    with tempfile.TemporaryDirectory(prefix="qvpo-bench-") as scratch:
        bundle = options.bundle or fresh_bundle(Path(scratch) / "hopper")
        policy = load(bundle)
        before = measure_direct(policy, options.k, options.seconds / 2)
        with serving([bundle], host="127.0.0.1", port=options.port) as (host, port):
            loads = [
                asyncio.run(measure_load(host, port, policy, options.k, clients, options.seconds))
                for clients in CLIENTS
            ]
        after = measure_direct(policy, options.k, options.seconds / 2)
    if options.json:
        report = {
            "k": options.k,
            "direct": [asdict(before), asdict(after)],
            "load": [asdict(load) for load in loads],
        }
        print(json.dumps(report))
        return 0
    d = policy.description
    print(f"{d.env}, {d.obs_dim} -> {d.act_dim}, T = {d.diffusion_steps}, K = {options.k}")
    for when, direct in (("before", before), ("after", after)):
        print(
            f"direct call, {when:6s}   p50 {direct.p50_ms:7.2f} ms   p99 {direct.p99_ms:7.2f} ms   "
            f"{direct.observations_per_s:7.0f} observations/s, {direct.rows} at a time"
        )
    for measured in loads:
        print(
            f"{measured.clients:3d} clients           p50 {measured.p50_ms:7.2f} ms   "
            f"p99 {measured.p99_ms:7.2f} ms   {measured.requests_per_s:7.0f} requests/s, "
            f"{measured.failed} failed"
        )
    return 0
