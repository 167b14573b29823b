"""`qvpo serve`'s server: processes of this machine, until a signal asks it to stop.

    this process     holds the listening socket and starts the next one again if it dies
    HTTP process     checks requests and batches them; see `api.py`
    workers          compute; see `workers.py`

A process that is killed is replaced in a moment: by a fork of one that has imported everything.
Connections wait meanwhile, for the socket stays open.
"""

import logging
import multiprocessing
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qvpo_rllib.core.options import require_at_least
from qvpo_rllib.ray_session import LOOPBACK
from qvpo_rllib.serving.bundle import load
from qvpo_rllib.serving.client import Client
from qvpo_rllib.serving.models import check_references

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a terminal's; Kubernetes' and systemd's
START_TIMEOUT_S = 120.0
KEEP_ALIVE_S = 75  # longer than most proxies' own
STOP_TIMEOUT_S = 20  # for the requests that have begun; longer than any may take to arrive
RESTART_DELAY_S = 0.1
CONNECTIONS_WAITING = 1024


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
    try:
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: stop.set())
        with serving(bundles, host=host, port=port, replicas=replicas):
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

    Args:
        replicas: processes that compute.

    Raises:
        ValueError: the extra `serve` is missing, the address is not allowed or taken, or a bundle
            is refused.
    """
    require_at_least("--replicas", replicas, 1)
    try:
        import uvicorn  # noqa: F401

        from qvpo_rllib.serving import api  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"Serving needs packages that are not installed ({error}): pip install "
            "'qvpo_rllib[serve]'."
        ) from error
    paths = [bundle.expanduser().absolute() for bundle in bundles]
    with _listen(host, port) as listener:
        check_references([(path, load(path)) for path in paths])
        supervisor = _Supervisor(listener, paths, replicas)
        try:
            with Client(f"http://{host}:{port}", timeout_s=START_TIMEOUT_S) as client:
                client.models()  # waits until it answers
            yield host, port
        finally:
            listener.close()  # before the HTTP process stops: nobody connects any more
            supervisor.stop()


def _listen(host: str, port: int) -> socket.socket:
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port} is not allowed: it must be from 1 to 65535.")
    try:
        return socket.create_server((host, port), backlog=CONNECTIONS_WAITING)
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port} cannot be listened on: {error}. Give another --port."
        ) from error


class _Supervisor:
    """Keeps one HTTP process running."""

    def __init__(self, listener: socket.socket, paths: Sequence[Path], replicas: int) -> None:
        self._arguments = (listener, paths, replicas)
        self._stopping = threading.Event()
        self._process = self._start()
        self._thread = threading.Thread(target=self._watch, name="qvpo-serve", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Lets the process finish what it has begun."""
        self._stopping.set()
        self._process.terminate()
        self._thread.join(STOP_TIMEOUT_S + 10)
        self._process.kill()

    def _start(self) -> "ForkServerProcess":
        from qvpo_rllib.serving.workers import PROCESSES

        process = PROCESSES.Process(target=_serve_http, args=self._arguments)
        process.start()
        return process

    def _watch(self) -> None:
        while True:
            self._process.join()
            # A signal to all processes ends that one first.
            if self._stopping.wait(RESTART_DELAY_S):
                return
            logger.error("The HTTP process ended; another one is started.")
            self._process = self._start()


def _serve_http(listener: socket.socket, paths: Sequence[Path], replicas: int) -> None:
    """Serves HTTP until SIGTERM, or until the process that started this one has ended."""
    import torch
    import uvicorn

    from qvpo_rllib.serving.api import create_api
    from qvpo_rllib.serving.http_protocol import ImpatientProtocol
    from qvpo_rllib.serving.workers import name_process

    name_process("qvpo-http")
    torch.set_num_threads(1)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # connections that stall are many
    server = uvicorn.Server(
        uvicorn.Config(
            create_api(paths, replicas),
            http=ImpatientProtocol,
            ws="none",
            log_config=None,
            log_level="critical",  # it warns of every bad request
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=STOP_TIMEOUT_S,
        )
    )

    def follow_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        server.should_exit = True

    threading.Thread(target=follow_parent, daemon=True).start()
    server.run(sockets=[listener])
