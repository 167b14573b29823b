"""Measuring a server under load, beside the same policy called in-process."""

import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator

from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.serving import Description, ServedPolicy, write_bundle
from qvpo_rllib.serving.batcher import MAX_PENDING_REQUESTS
from qvpo_rllib.serving.bundle import encode_parameters
from qvpo_rllib.serving.policy import PolicyNetworks

WARM_UP_S = 1.0
OBS_DIM, ACT_DIM = 11, 3  # Hopper-v5


@dataclass(frozen=True)
class Load:
    """What a number of clients got, each with one request of one observation at a time."""

    clients: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    failed: int  # replies other than 200


@dataclass(frozen=True)
class Direct:
    """The policy called in this process, one observation per call and `rows` per call."""

    p50_ms: float
    p99_ms: float
    rows: int
    observations_per_s: float  # with `rows` per call: what no server on one core can exceed


def fresh_bundle(directory: Path) -> Path:
    """Writes a bundle of Hopper's sizes with the default networks, not trained."""
    hp = QVPOHyperparameters()
    description = Description(
        name="hopper",
        version="fresh",
        env="Hopper-v5",
        env_config={},
        obs_dim=OBS_DIM,
        obs_dtype="float64",
        obs_low=[None] * OBS_DIM,
        obs_high=[None] * OBS_DIM,
        act_low=[-1.0] * ACT_DIM,
        act_high=[1.0] * ACT_DIM,
        act_dtype="float32",
        hidden=list(hp.hidden),
        diffusion_steps=hp.diffusion_steps,
        noise_schedule=hp.noise_schedule,
        k_behavior=hp.k_behavior,
        k_eval=hp.k_eval,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parameters = encode_parameters(PolicyNetworks(description).state_dict())
    return write_bundle(directory, description, parameters)


def measure_direct(policy: ServedPolicy, k: int, seconds: float) -> Direct:
    """Times the call in this process, for half of `seconds` each way and once at least."""
    rows = 16
    policy.warm_up(k)
    generator = Generator().manual_seed(0)
    one, many = (
        np.random.default_rng(0).normal(size=(n, policy.description.obs_dim)) for n in (1, rows)
    )

    def times(obs: Any) -> list[float]:
        taken: list[float] = []
        end = time.perf_counter() + seconds / 2
        while time.perf_counter() < end or not taken:
            start = time.perf_counter()
            policy.act(obs, k, generator)
            taken.append(time.perf_counter() - start)
        return taken

    single, batched = times(one), times(many)
    return Direct(
        p50_ms=float(np.percentile(single, 50)) * 1e3,
        p99_ms=float(np.percentile(single, 99)) * 1e3,
        rows=rows,
        observations_per_s=rows * len(batched) / sum(batched),
    )


async def measure_load(
    host: str, port: int, policy: ServedPolicy, k: int, clients: int, seconds: float
) -> Load:
    """Loads a server with clients that send their next request when they have the last reply.

    Each sends one that counts, however long the server takes.
    """
    assert clients <= MAX_PENDING_REQUESTS
    rng = np.random.default_rng(clients)
    begin = time.perf_counter() + WARM_UP_S
    end = begin + seconds
    taken: list[float] = []
    failed = 0

    async def client(number: int) -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection(host, port)
        obs = rng.normal(size=(1, policy.description.obs_dim)).tolist()
        message = _message(policy.description.name, {"observations": obs, "k": k, "seed": number})
        counted = False
        while (start := time.perf_counter()) < end or not counted:
            writer.write(message)
            status = await _status(reader)
            now = time.perf_counter()
            if counted := start >= begin:
                taken.append(now - start)
                failed += status != 200
        writer.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    measured_s = max(seconds, time.perf_counter() - begin)
    return Load(
        clients=clients,
        requests_per_s=len(taken) / measured_s,
        p50_ms=float(np.percentile(taken, 50)) * 1e3,
        p99_ms=float(np.percentile(taken, 99)) * 1e3,
        failed=failed,
    )


def _message(name: str, body: dict[str, Any]) -> bytes:
    """Returns a request as bytes: a client library would take more of the cores than the server."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/models/{name}/act HTTP/1.1\r\nHost: bench\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def _status(reader: asyncio.StreamReader) -> int:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = head.split(b"content-length:")[1].split(b"\r\n")[0]
    await reader.readexactly(int(length))
    return int(head.split(b" ")[1])
