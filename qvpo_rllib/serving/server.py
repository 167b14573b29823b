"""`qvpo serve`'s server: Ray Serve on this machine or a cluster, until a signal asks it to stop."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qvpo_rllib.core.options import require_at_least
from qvpo_rllib.ray_session import LOOPBACK, start_ray
from qvpo_rllib.serving.client import Client

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a terminal's; Kubernetes' and systemd's
APPLICATION = "qvpo"

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
    """Returns the settings by which a single replica listens on `port` itself.

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


def serve_until_stopped(
    bundles: Sequence[Path], *, host: str, port: int, replicas: int, say: Callable[[str], None]
) -> None:
    """Serves bundles until SIGINT or SIGTERM comes, and finishes the requests that have begun.

    Args:
        say: takes lines for the user: the models served and the address, then that it stops.

    Raises:
        ValueError: as `serving`.
    """
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def listen() -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: stop.set())

    try:
        listen()
        with serving(bundles, host=host, port=port, replicas=replicas):
            listen()  # Ray has put a handler of its own for SIGTERM, which aborts
            url = f"http://{host if host != '0.0.0.0' else LOOPBACK}:{port}"
            with Client(url) as client:
                for model in client.models():
                    say(
                        f"{model['name']}@{model['version']}   {model['env']}, "
                        f"{model['obs_dim']} -> {len(model['act_low'])}, K = {model['k_eval']}"
                    )
            say(f"Serving at {url}, documentation at {url}/docs. Ctrl-C stops.")
            stop.wait()
            say("Stopping: requests that have begun are finished.")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def serving(
    bundles: Sequence[Path], *, host: str = LOOPBACK, port: int, replicas: int = 1
) -> Iterator[tuple[str, int]]:
    """Serves bundles as long as the block runs, and yields host and port.

    It uses the cluster of RAY_ADDRESS if that is set, else a Ray of its own.

    Raises:
        ValueError: Ray Serve is missing, the address is not allowed or taken, or a bundle is
            refused.
    """
    _check_address(host, port)
    require_at_least("--replicas", replicas, 1)
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
    paths = [str(bundle.expanduser().absolute()) for bundle in bundles]
    application = build(AppArguments(bundles=paths, num_replicas=replicas))
    try:
        start_ray(replicas + 1)
        start_serve(host, _free_port(host) if direct else port)
        serve.run(application, name=APPLICATION)
        yield host, port
        serve.delete(APPLICATION)  # finishes the requests that have begun
    finally:
        ray.shutdown()


def start_serve(host: str, port: int) -> None:
    """Starts Serve's proxy on the Ray that runs, without a line per request in its logs."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )


def _check_address(host: str, port: int) -> None:
    """Raises `ValueError` if nothing could listen there; Serve itself would try for a minute."""
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port} is not allowed: it must be from 1 to 65535.")
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port} cannot be listened on: {error}. Give another --port."
        ) from error


def _free_port(host: str) -> int:
    """Returns a port for the proxy, which Serve starts even if nobody uses it."""
    with socket.create_server((host, 0)) as server:
        port: int = server.getsockname()[1]
        return port
