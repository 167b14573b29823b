"""`qvpo serve`'s server: processes of this machine, until a signal asks it to stop.

    this process     holds the listening socket and starts the next one again if it dies
    HTTP process     checks requests and batches them; see `api.py`
    workers          compute; see `workers.py`

A process that is killed is replaced in a moment: by a fork of one that has imported everything.
Connections wait meanwhile, for the socket stays open.
"""

import contextlib
import functools
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

import torch
import uvicorn

from qvpo_rllib.core.options import require_at_least
from qvpo_rllib.serving.api import create_api
from qvpo_rllib.serving.batcher import Batcher
from qvpo_rllib.serving.bundle import load
from qvpo_rllib.serving.client import Client
from qvpo_rllib.serving.http_protocol import ImpatientProtocol
from qvpo_rllib.serving.models import check_references
from qvpo_rllib.serving.workers import Workers, name_process, work

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
            url = f"http://{host if host != '0.0.0.0' else '127.0.0.1'}:{port}"
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
    bundles: Sequence[Path], *, host: str, port: int, replicas: int = 1
) -> Iterator[tuple[str, int]]:
    """Serves bundles as long as the block runs, and yields host and port.

    Args:
        replicas: processes that compute.

    Raises:
        ValueError: the address is not allowed or taken, or a bundle is refused.
    """
    require_at_least("--replicas", replicas, 1)
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
    """Keeps the HTTP process and the workers running."""

    def __init__(self, listener: socket.socket, paths: Sequence[Path], replicas: int) -> None:
        # Forks one that has imported everything and has no threads, which takes milliseconds.
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["__main__", "qvpo_rllib.serving.api"])
        self._arguments = (listener, paths, replicas)
        self._stopping = threading.Event()
        self._http = self._start_http()
        self._threads = [threading.Thread(target=self._keep_http, daemon=True)]
        for _ in range(replicas):
            self._threads.append(threading.Thread(target=self._keep_worker, daemon=True))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Lets the HTTP process finish what it has begun; the workers end with it."""
        self._stopping.set()
        self._http.terminate()
        self._http.join(STOP_TIMEOUT_S + 5)
        self._http.kill()
        for thread in self._threads:
            thread.join()

    def _start_http(self) -> "ForkServerProcess":
        self._supply, theirs = socket.socketpair()
        process = self._processes.Process(target=_serve_http, args=(*self._arguments, theirs))
        process.start()
        theirs.close()
        return process

    def _keep_http(self) -> None:
        while True:
            self._http.join()
            # A signal to all processes ends that one first.
            if self._stopping.wait(RESTART_DELAY_S):
                return
            logger.error("The HTTP process ended; another one is started.")
            self._supply.close()
            self._http = self._start_http()

    def _keep_worker(self) -> None:
        """A worker's pipe goes to the HTTP process of the moment; the worker ends with that."""
        while not self._stopping.is_set():
            ours, theirs = self._processes.Pipe()
            process = self._processes.Process(target=work, args=(theirs,))
            process.start()
            theirs.close()
            with contextlib.suppress(OSError):  # there is none for a moment: it ends at once
                socket.send_fds(self._supply, [b"w"], [ours.fileno()])
            ours.close()
            process.join()
            self._stopping.wait(RESTART_DELAY_S)


def _serve_http(
    listener: socket.socket, paths: Sequence[Path], replicas: int, supply: socket.socket
) -> None:
    """Serves HTTP until SIGTERM, or until the process that started this one has ended."""
    name_process("qvpo-http")
    torch.set_num_threads(1)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # connections that stall are many

    def stop() -> None:
        server.should_exit = True

    batcher = functools.partial(Batcher, Workers(supply, at_end=stop), replicas)
    server = uvicorn.Server(
        uvicorn.Config(
            create_api(paths, batcher),
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
    server.run(sockets=[listener])
