"""`qvpo serve`."""

import argparse
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qvpo_rllib.core.options import require_at_least
from qvpo_rllib.ray_session import LOOPBACK, start_ray

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a terminal's; Kubernetes' and systemd's

# Serve's own defaults keep user code and router in threads of their own, for user code that blocks
# the event loop. Ours never does, and each hop between threads costs time. And a proxy that is not
# ready within 5 s is killed and started anew: on a busy machine that need not end.
SETTINGS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}


def direct_ingress(port: int) -> dict[str, str]:
    """Settings by which a single replica listens on `port` itself.

    Through Serve's proxy a request makes four calls between two Ray actors, several milliseconds of
    the two cores; the proxy stays for several replicas, among which it divides the requests.
    """
    return {
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 1),  # exclusive
        # For load balancers, of which there is none: a replica may stop and start at once.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_PORT_QUARANTINE_S": "0",
    }


def add(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve policies over HTTP with Ray Serve",
        description="Serve bundles over HTTP: POST /v1/models/NAME/act. A bundle that is replaced "
        "while the server runs is taken up without a failed request.",
        allow_abbrev=False,
    )
    serve.add_argument(
        "bundles",
        type=Path,
        nargs="+",
        metavar="BUNDLE",
        help="directories of qvpo export; with --trust-checkpoint also checkpoints or runs",
    )
    serve.add_argument(
        "--host",
        default=LOOPBACK,
        help=f"address to listen on (default {LOOPBACK}, which only this machine reaches); "
        "there is no authentication",
    )
    serve.add_argument("--port", type=int, default=8000, help="default 8000")
    serve.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="processes that compute (default 1)"
    )
    serve.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="also take RLlib checkpoints; loading one runs code that is in it: only your own",
    )
    serve.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    if not 1 <= options.port <= 65535:
        raise ValueError(f"--port {options.port} is not allowed: it must be from 1 to 65535.")
    require_at_least("--replicas", options.replicas, 1)
    with tempfile.TemporaryDirectory(prefix="qvpo-serve-") as scratch:
        bundles = _as_bundles(options.bundles, options.trust_checkpoint, Path(scratch))
        return _run(bundles, options.host, options.port, options.replicas)


def _as_bundles(paths: list[Path], trust: bool, scratch: Path) -> list[Path]:
    """The bundles meant; a checkpoint becomes a bundle in `scratch`: replicas see no pickle."""
    from qvpo_rllib.serving.bundle import DESCRIPTION_FILE, load

    bundles = []
    for number, path in enumerate(paths):
        is_checkpoint = (
            path.is_dir()
            and not (path / DESCRIPTION_FILE).exists()
            and ((path / "qvpo.json").exists() or (path / "checkpoints").is_dir())
        )
        if is_checkpoint and not trust:
            raise ValueError(
                f"{str(path)!r} is an RLlib checkpoint, and loading one runs code that is in it. "
                f"If it is your own, give --trust-checkpoint; else export it where it was made "
                f"(qvpo export {path} OUT) and serve the bundle."
            )
        if is_checkpoint:
            from qvpo_rllib.play.export import export_checkpoint

            export_checkpoint(path, scratch / str(number))
            path = scratch / str(number)
        load(path)  # refused here, before anything starts
        bundles.append(path.expanduser().absolute())
    return bundles


def _run(bundles: list[Path], host: str, port: int, replicas: int) -> int:
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        _stop_on_signals(stop)
        with serving(bundles, host=host, port=port, replicas=replicas):
            _stop_on_signals(stop)  # Ray has put a handler of its own for SIGTERM, which aborts
            _print_models(host, port)
            stop.wait()
            print("Stopping: requests that have begun are finished.", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _stop_on_signals(stop: threading.Event) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: stop.set())


@contextmanager
def serving(
    bundles: Sequence[Path], *, host: str = LOOPBACK, port: int, replicas: int = 1
) -> Iterator[tuple[str, int]]:
    """Serves bundles as long as the block runs; yields host and port.

    On the cluster of RAY_ADDRESS if that is set, else on a Ray of its own.

    Raises:
        ValueError: Ray Serve is missing, the address is taken, or a bundle is refused.
    """
    direct = replicas == 1 and not os.environ.get("RAY_ADDRESS")
    # Before Serve is imported, which reads them once; Ray's processes inherit them.
    os.environ.update(SETTINGS | (direct_ingress(port) if direct else {}))
    try:
        import ray
        from ray import serve

        from qvpo_rllib.serving.app import AppArguments, build
    except ImportError as error:
        raise ValueError(
            f"Serving needs Ray Serve, which is not installed ({error}): pip install "
            "'qvpo_rllib[serve]'."
        ) from error
    _check_address(host, port)
    paths = [str(bundle.expanduser().absolute()) for bundle in bundles]
    application = build(AppArguments(bundles=paths, num_replicas=replicas))
    try:
        start_ray(replicas + 1)
        start_serve(host, _free_port(host) if direct else port)
        serve.run(application, name="qvpo")
        yield host, port
        serve.delete("qvpo")  # finishes the requests that have begun
    finally:
        ray.shutdown()


def start_serve(host: str, port: int) -> None:
    """Serve's proxy on the Ray that runs, without a line per request in its logs."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )


def _check_address(host: str, port: int) -> None:
    """Raises `ValueError` if nothing could listen there; Serve itself would try for a minute."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port} cannot be listened on: {error}. Give another --port."
        ) from error


def _free_port(host: str) -> int:
    """For the proxy, which Serve starts even if nobody uses it."""
    with socket.create_server((host, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _print_models(host: str, port: int) -> None:
    from qvpo_rllib.serving.client import Client

    url = f"http://{host if host != '0.0.0.0' else LOOPBACK}:{port}"
    with Client(url) as client:
        for model in client.models():
            print(
                f"{model['name']}@{model['version']}   {model['env']}, "
                f"{model['obs_dim']} -> {len(model['act_low'])}, K = {model['k_eval']}"
            )
    print(f"Serving at {url}, documentation at {url}/docs. Ctrl-C stops.", flush=True)
