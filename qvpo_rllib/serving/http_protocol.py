"""uvicorn's HTTP, without patience for clients that connect and send no whole request head."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from qvpo_rllib.serving.schema import READ_TIMEOUT_S


class ImpatientProtocol(HttpToolsProtocol):
    """Closes a connection whose request head is not whole in time; `api.py` times the body."""

    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait()

    def on_headers_complete(self) -> None:
        self._wait_no_more()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._wait_no_more()
        self._clock = self.loop.call_later(READ_TIMEOUT_S, self.transport.close)

    def _wait_no_more(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
