"""uvicorn's HTTP connection with the bounds that it lacks: on headers, on time for them, on clients that stop reading.

A client that trickles its headers, or never reads its answer, would otherwise hold a connection, and with it a
sequence in a worker's batch, for ever.
"""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from router.http.errors import error_json

MAX_HEADER_BYTES = 64 * 1024
HEADER_TIMEOUT_S = 10.0  # from the connection's, or the request's, first byte to the end of the headers
STALL_TIMEOUT_S = 60.0  # a client takes nothing of what is written to it
LINGER_S = 5.0  # the rest of a body that was refused is thrown away this long, so that the client reads why


class BoundedHttpConnection(HttpToolsProtocol):
    _header_timer: TimerHandle | None = None
    _stall_timer: TimerHandle | None = None
    _linger_timer: TimerHandle | None = None
    _in_headers = True
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._stall_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_headers and not self.transport.is_closing():
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(431, f"the headers are larger than {MAX_HEADER_BYTES} bytes")
            elif self._header_timer is None:
                self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        self._header_bytes = 0

    def on_headers_complete(self) -> None:
        self._in_headers = False
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.cycle.more_body and not self.transport.is_closing():
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Not HTTP at all. In OpenAI's shape like every other error."""
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        body = error_json(message, "invalid_request_error")
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(
            body
        )
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
