"""The application over real HTTP, on Ray Serve as `serve run` and RayService start it."""

import http.client
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from request_bodies import BODIES, OBS_DIM, REFUSED

from qvpo_rllib import cli
from qvpo_rllib.play.evaluation import evaluate_checkpoint, evaluate_server
from qvpo_rllib.ray_session import LOOPBACK
from qvpo_rllib.serving import ServedPolicy, load
from qvpo_rllib.serving.client import Client, ServerError
from qvpo_rllib.serving.schema import MAX_BODY_BYTES, MAX_K, MAX_ROWS

MODEL = "InvertedPendulum-v5"
PATH = f"/v1/models/{MODEL}/act"
RELOAD_TIMEOUT_S = 30


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def checkpoint(save_trained: Any, tiny_config: Any) -> Path:
    return Path(save_trained(tiny_config(MODEL)))


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.parent / "bundle"
    assert cli.main(["export", str(checkpoint), str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def live(checkpoint: Path) -> Path:
    """A bundle that a test will replace while it is served."""
    out = checkpoint.parent / "live"
    assert cli.main(["export", str(checkpoint), str(out), "--name", "live", "--version", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def url(bundle: Path, live: Path) -> Any:
    from ray import serve

    from qvpo_rllib.serving.app import AppArguments, build

    port = free_port()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": LOOPBACK, "port": port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    # As on the command line of `serve run`: one text for all paths.
    arguments = AppArguments(bundles=f"{bundle}{os.pathsep}{live}")
    serve.run(build(arguments), name="qvpo")
    yield f"http://{LOOPBACK}:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def policy(bundle: Path) -> ServedPolicy:
    return load(bundle)


@pytest.fixture
def client(url: str) -> Any:
    with Client(url) as client:
        yield client


def observations(num: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(num, OBS_DIM)).astype(np.float32)


def locally(policy: ServedPolicy, obs: Any, k: int | None, seed: int) -> Any:
    return policy.act(obs, k, torch.Generator().manual_seed(seed))


class Raw:
    """Requests that `Client` would never make, over one connection while that lasts."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.connection = http.client.HTTPConnection(host, int(port), timeout=60)

    def __call__(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, Any]:
        try:
            self.connection.request(method, path, body, headers)
            reply = self.connection.getresponse()
            text = reply.read()
        except (http.client.HTTPException, OSError):
            self.connection.close()
            raise
        return reply.status, json.loads(text), reply.headers


@pytest.fixture
def raw(url: str) -> Raw:
    return Raw(url)


def assert_refused(reply: tuple[int, Any, Any], *statuses: int) -> str:
    status, content, _ = reply
    assert status in statuses, content
    assert set(content) == {"error"}
    assert content["error"].endswith((".", "Not Found", "Not Allowed"))
    return str(content["error"])


# --- acting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "k"), [(1, None), (1, 1), (5, 4), (MAX_ROWS, 2), (2, MAX_K)])
def test_actions_are_the_bundles_to_the_last_bit(
    client: Any, policy: Any, num: int, k: int | None
) -> None:
    obs = observations(num)
    np.testing.assert_array_equal(client.act(MODEL, obs, k, 7), locally(policy, obs, k, 7))
    version = policy.description.version
    pinned = client.act(f"{MODEL}@{version}", obs, k, 7)
    np.testing.assert_array_equal(pinned, locally(policy, obs, k, 7))


def test_a_reply_says_what_it_is(raw: Any, policy: Any) -> None:
    body = json.dumps({"observations": observations(2).tolist(), "seed": 3})
    status, reply, _ = raw("POST", PATH, body)
    assert status == 200
    assert reply["model"] == MODEL
    assert reply["version"] == policy.description.version
    assert (reply["k"], reply["seed"]) == (4, 3)
    assert reply["time_ms"]["computing"] > 0
    assert reply["time_ms"]["queued"] >= 0


def test_without_a_seed_the_noise_is_fresh(client: Any) -> None:
    obs = observations(1)
    assert len({float(client.act(MODEL, obs, 1)[0, 0]) for _ in range(5)}) > 1


def test_seeded_requests_are_exact_whatever_batch_they_fall_into(url: str, policy: Any) -> None:
    """Eight clients at once with different sizes, K and models; every reply is the lone one's."""

    def one_client(number: int) -> None:
        rng = np.random.default_rng(number)
        with Client(url) as client:
            for _ in range(15):
                num, k = int(rng.integers(1, 9)), int(rng.choice([1, 4, 4, 4, 8]))
                seed = int(rng.integers(2**63))
                obs = rng.normal(size=(num, OBS_DIM)).astype(np.float32)
                model = [MODEL, "live"][number % 2]
                reply = client.act(model, obs, k, seed)
                np.testing.assert_array_equal(reply, locally(policy, obs, k, seed))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one_client, range(8)))


def test_episodes_over_http_return_what_local_ones_do(
    url: str, bundle: Path, checkpoint: Path, capsys: Any
) -> None:
    # Over HTTP through the command line, locally from the bundle and from the RLlib checkpoint.
    command = ["evaluate", "--server", url, "--model", MODEL, "--env", MODEL, "--episodes", "3"]
    assert cli.main([*command, "--seed", "5", "--json"]) == 0
    over_http = json.loads(capsys.readouterr().out)
    for path in (bundle, checkpoint):
        local = evaluate_checkpoint(path, episodes=3, seed=5)
        assert [e.episode_return for e in local.episodes] == over_http["returns"]
        assert [e.length for e in local.episodes] == over_http["lengths"]
    assert over_http["k"] == 4
    other = evaluate_server(url, MODEL, episodes=3, seed=6, k=1)
    assert other.to_dict()["returns"] != over_http["returns"]


# --- the other paths ----------------------------------------------------------------------------


def test_health_models_and_documentation(raw: Any, policy: Any) -> None:
    assert raw("GET", "/healthz")[:2] == (200, {"status": "ok"})
    assert raw("GET", "/readyz")[:2] == (200, {"status": "ready"})
    _, content, _ = raw("GET", "/v1/models")
    models = {model["name"]: model for model in content["models"]}
    assert set(models) == {MODEL, "live"}
    assert models[MODEL]["version"] == policy.description.version
    assert models[MODEL]["default"]
    assert (models[MODEL]["obs_dim"], models[MODEL]["act_high"]) == (OBS_DIM, [3.0])
    _, openapi, _ = raw("GET", "/openapi.json")
    body = openapi["paths"]["/v1/models/{name}/act"]["post"]["requestBody"]["content"]
    assert set(body["application/json"]["schema"]["properties"]) == {"observations", "k", "seed"}


def test_wrong_paths_methods_and_models(raw: Any, client: Any) -> None:
    assert_refused(raw("GET", "/nothing"), 404)
    assert_refused(raw("GET", PATH), 405)
    assert_refused(raw("DELETE", "/v1/models"), 405)
    for name in ("none", f"{MODEL}@0", "%00", "x" * 5000):
        reply = raw("POST", f"/v1/models/{name}/act", b"{}")
        assert_refused(reply, 404)
    with pytest.raises(ServerError, match=f"Served are: {MODEL}"):
        client.act("none", observations(1))


def test_a_header_that_is_not_utf_8_is_refused(raw: Any) -> None:
    raw.connection.putrequest("GET", "/healthz")
    raw.connection.putheader("X-Name", b"\xff\xfe")
    raw.connection.endheaders()
    reply = raw.connection.getresponse()
    assert (reply.status, json.loads(reply.read())) == (400, {"error": "A header is not UTF-8."})


# --- bad bodies ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "words"), REFUSED)
def test_refuses_with_a_sentence(raw: Any, body: str, words: str) -> None:
    error = assert_refused(raw("POST", PATH, body.encode("latin-1")), 422)
    assert re.search(words, error), error


def test_answers_the_largest_numbers_with_a_finite_action_or_a_sentence(raw: Any) -> None:
    """Whether the networks overflow depends on how their sums are rounded."""
    body = '{"observations": [[3e38, 3e38, 3e38, 3e38]]}'
    reply = raw("POST", PATH, body)
    if reply[0] == 200:
        assert np.isfinite(reply[1]["actions"]).all()
    else:
        assert "too large for this policy" in assert_refused(reply, 422)


def test_refuses_too_many_samples_at_once(raw: Any) -> None:
    body = {"observations": observations(MAX_ROWS).tolist(), "k": MAX_K}
    assert "samples" in assert_refused(raw("POST", PATH, json.dumps(body)), 413)


def test_counts_a_body_while_it_comes(url: str) -> None:
    """No length is announced, and the last byte never comes: the refusal cannot wait for it."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        part = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        for _ in range(MAX_BODY_BYTES // 0x10000 + 2):
            connection.sendall(part)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_refuses_a_body_by_its_announced_length(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


@pytest.fixture(scope="module")
def shared_raw(url: str) -> Raw:
    return Raw(url)


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(body=BODIES)
def test_any_body_gets_finite_actions_or_a_sentence(shared_raw: Any, body: Any) -> None:
    content = body.encode() if isinstance(body, str) else body
    reply = shared_raw("POST", PATH, content)
    if reply[0] != 200:
        assert_refused(reply, 413, 422)
        return
    request = json.loads(content)
    actions = np.array(reply[1]["actions"])
    assert actions.shape == (len(request["observations"]), 1)
    assert (np.abs(actions) <= 3).all()  # the box; False for a NaN
    assert np.isfinite(np.float32(request["observations"])).all()


# --- overload and replacement -------------------------------------------------------------------


def test_overload_is_refused_and_nothing_else_is(url: str, policy: Any) -> None:
    obs = observations(MAX_ROWS)

    def one(seed: int) -> int:
        reply = Raw(url)(
            "POST", PATH, json.dumps({"observations": obs.tolist(), "k": 32, "seed": seed})
        )
        if reply[0] == 503:
            assert "try again later" in assert_refused(reply, 503)
            assert int(reply[2]["Retry-After"]) >= 1
        else:
            assert reply[0] == 200
            np.testing.assert_array_equal(reply[1]["actions"], locally(policy, obs, 32, seed))
        return reply[0]

    statuses: set[int] = set()
    deadline = time.monotonic() + 60  # how many wait at once depends on who gets the cores
    with ThreadPoolExecutor(32) as threads:
        while 503 not in statuses and time.monotonic() < deadline:
            statuses |= set(threads.map(one, range(32)))
    assert statuses == {200, 503}
    assert Raw(url)("GET", "/readyz")[0] == 200
    with Client(url) as client:
        client.act(MODEL, observations(1))


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + RELOAD_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def live_models(client: Any) -> dict[str, Any]:
    return {m["version"]: m for m in client.models() if m["name"] == "live"}


@contextmanager
def clients_that_keep_asking(url: str, model: str) -> Iterator[tuple[list[str], list[Any]]]:
    """Yields the versions that have answered so far, in order, and every reply but 200."""
    seen: list[str] = []
    failures: list[Any] = []
    stop = threading.Event()

    def keep_asking() -> None:
        ask = Raw(url)
        body = json.dumps({"observations": observations(1).tolist()})
        while not stop.is_set():
            try:
                status, reply, _ = ask("POST", f"/v1/models/{model}/act", body)
            except (OSError, http.client.HTTPException, ValueError) as error:
                status, reply = 0, error
            if status == 200:
                seen.append(reply["version"])
            else:
                failures.append((status, reply))

    threads = [threading.Thread(target=keep_asking) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(seen) > 10)
        yield seen, failures
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_replacing_a_bundle_fails_no_request(
    url: str, live: Path, checkpoint: Path, client: Any, tmp_path: Path
) -> None:
    new = live.parent / "next"
    assert cli.main(["export", str(checkpoint), str(new), "--name", "live", "--version", "2"]) == 0
    with clients_that_keep_asking(url, "live") as (seen, failures):
        os.rename(live, tmp_path / "old")
        time.sleep(0.2)  # for a moment there is no bundle
        os.rename(new, live)
        wait_for(lambda: seen[-1:] == ["2"])
    assert failures == []
    assert set(seen) == {"1", "2"}
    models = live_models(client)
    assert models["2"]["default"]
    assert not models["1"]["default"]
    assert client.act("live@1", observations(1)).shape == (1, 1)  # for who asked for that one

    # A damaged one is not taken; what serves goes on and says so.
    parameters = live / "policy.safetensors"
    whole = parameters.read_bytes()
    parameters.write_bytes(whole[:-1])
    os.utime(live / "policy.json")
    wait_for(lambda: live_models(client)["2"]["problem"] is not None)
    assert "SHA-256" in live_models(client)["2"]["problem"]
    assert client.act("live", observations(1)).shape == (1, 1)
    parameters.write_bytes(whole)  # as when the last file of a copy arrives
    wait_for(lambda: live_models(client)["2"]["problem"] is None)


def test_deploying_other_arguments_fails_no_request(url: str, bundle: Path, client: Any) -> None:
    """What a changed RayService does: Serve replaces the replica."""
    from ray import serve

    from qvpo_rllib.serving.app import AppArguments, build

    copy = bundle.parent / "copy"
    shutil.copytree(bundle, copy)
    with clients_that_keep_asking(url, MODEL) as (_, failures):
        serve.run(build(AppArguments(bundles=[str(copy)])), name="qvpo")
        wait_for(lambda: [m["name"] for m in client.models()] == [MODEL])
    assert failures == []
    with pytest.raises(ServerError, match="404"):
        client.act("live", observations(1))
