"""A client of the server with the standard library and NumPy alone."""

import http.client
import json
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

RETRIES = 5  # of a request that a busy server turned away, or whose connection was lost


class ServerError(RuntimeError):
    """The server's refusal, with its sentence; `status` is the HTTP status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(f"The server replied {status}: {sentence}")
        self.status = status


def _plain(value: Any) -> Any:
    """Returns an observation as JSON has it; a tuple's parts are named "0", "1", …"""
    if isinstance(value, tuple):
        value = {str(number): part for number, part in enumerate(value)}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return np.asarray(value).tolist()


class Client:
    """One connection, kept open. Not for several threads at once.

    Args:
        url: such as "http://127.0.0.1:8000".

    Raises:
        ValueError: `url` is no http:// or https:// address.
    """

    def __init__(self, url: str, *, timeout_s: float = 60.0) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not a server's address, such as 'http://127.0.0.1:8000'.")
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._prefix = parts.path.rstrip("/")
        self._connection = kind(parts.hostname, parts.port, timeout=timeout_s)

    def act(
        self,
        model: str,
        observations: NDArray[np.floating] | Sequence[Any],
        k: int | None = None,
        seed: int | None = None,
    ) -> NDArray[np.float64]:
        """Returns the best of k actions in the environment's box: [B, O] → [B, A] float64.

        Args:
            model: name or name@version.
            observations: [B, O], or of a model with parts B observations as its environment gives
                them, dicts or tuples.

        Raises:
            ServerError: the server refused.
            OSError: it cannot be reached.
        """
        body = {"observations": [_plain(obs) for obs in observations], "k": k, "seed": seed}
        path = f"/v1/models/{urllib.parse.quote(model, safe='@')}/act"
        return np.array(self._call("POST", path, body)["actions"])

    def models(self) -> list[dict[str, Any]]:
        """Returns every name and version served, each as `serving.schema.ModelInfo`.

        Raises:
            ServerError, OSError: as `act`.
        """
        found: list[dict[str, Any]] = self._call("GET", "/v1/models")["models"]
        return found

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        content = None if body is None else json.dumps(body).encode()
        headers = {} if content is None else {"Content-Type": "application/json"}
        for attempt in range(RETRIES + 1):
            try:
                self._connection.request(method, self._prefix + path, content, headers)
                response = self._connection.getresponse()
                text = response.read()
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                # The server's process died, or the connection was idle for too long.
                lost = isinstance(error, ConnectionError | http.client.IncompleteRead)
                if lost and not isinstance(error, ConnectionRefusedError) and attempt < RETRIES:
                    time.sleep(0.1 * 2**attempt)
                    continue
                if isinstance(error, OSError):
                    raise
                raise OSError(f"{self._connection.host} speaks no proper HTTP: {error}") from error
            if response.status != 503 or attempt == RETRIES:
                break
            time.sleep(0.1 * 2**attempt)
        try:
            reply = json.loads(text)
        except ValueError:
            reply = {"error": text[:200].decode(errors="replace")}
        if response.status != 200 or not isinstance(reply, dict):
            sentence = reply.get("error", "") if isinstance(reply, dict) else str(reply)
            raise ServerError(response.status, str(sentence))
        return reply
