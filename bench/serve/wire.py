"""HTTP/1.1 for a load generator: connections that are kept, answers whose every piece is stamped as it arrives.

A client library would cost more processor time per request than many servers do, and would then be what is measured:
this is a parser in C (httptools) behind a bare asyncio protocol.
"""

from __future__ import annotations

import asyncio
import ssl
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import cast

import httptools
import msgspec

_CONNECT_S = 5.0  # seconds that opening a connection may take


class WireError(Exception):
    """The request failed under way; `kind` is a short name to count by."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


OnBody = Callable[[bytes, float], None]


class _Connection(asyncio.Protocol):
    """One at a time: `send`, then await what it returns."""

    def __init__(self) -> None:
        self.closed = False
        self.used = False
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._done: asyncio.Future[int] | None = None
        self._on_body: OnBody = lambda data, now: None
        self._now = 0.0

    def send(self, request: bytes, on_body: OnBody) -> asyncio.Future[int]:
        """The status, once the whole answer has come; `on_body(data, time)` for each piece of its body."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._on_body = on_body
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            return self.close()  # nobody asked
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(WireError("protocol", f"the answer is no HTTP: {error}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._fail(WireError("disconnected", f"the server closed the connection: {error or 'no reason'}"))

    def _fail(self, error: WireError) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    # --- httptools ---

    def on_body(self, data: bytes) -> None:
        self._on_body(data, self._now)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if not self._parser.should_keep_alive():
            self.closed = True
        status, self._parser = self._parser.get_status_code(), None
        if self._done is not None and not self._done.done():
            self._done.set_result(status)


class Wire:
    """A server's connections: as many as there are requests under way, kept for the next."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        """Raises ValueError for what is no http(s) URL."""
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url is {url!r}, it must be http://HOST[:PORT] or https://HOST[:PORT]")
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        lines = {"Host": parts.netloc.rpartition("@")[2], "Accept": "*/*", "Content-Type": "application/json"}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in (lines | dict(headers or {})).items())
        self._idle: list[_Connection] = []
        self.opened = 0  # connections, in all

    async def request(
        self, method: str, path: str, body: bytes, on_body: OnBody, timeout_s: float
    ) -> tuple[int, float]:
        """(status, when the request was written). Raises WireError."""
        head = f"{method} {self._base}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n"
        data = head.encode() + body
        connection = await self._connection()
        heard = False

        def body_came(piece: bytes, now: float) -> None:
            nonlocal heard
            heard = True
            on_body(piece, now)

        finished = False
        try:
            sent = time.perf_counter()
            async with asyncio.timeout(timeout_s):
                try:
                    status = await connection.send(data, body_came)
                except WireError:
                    # A kept connection may have been closed by the server while it was idle: that is no error of its.
                    if heard or not connection.used:
                        raise
                    connection.close()
                    connection = await self._open()
                    status = await connection.send(data, body_came)
            finished = True
        except TimeoutError:
            raise WireError("timeout", f"no whole answer within {timeout_s:g} s") from None
        finally:
            if not finished:
                connection.close()
        connection.used = True
        if not connection.closed:
            self._idle.append(connection)
        return status, sent

    async def get(self, path: str, timeout_s: float = 10.0) -> object:
        """What a JSON document at `path` holds. Raises WireError."""
        return await self._whole("GET", path, b"", timeout_s)

    async def post(self, path: str, content: object, timeout_s: float = 60.0) -> object:
        """Raises WireError; the text of a refusal is its message."""
        return await self._whole("POST", path, msgspec.json.encode(content), timeout_s)

    async def _whole(self, method: str, path: str, body: bytes, timeout_s: float) -> object:
        pieces: list[bytes] = []
        status, _ = await self.request(method, path, body, lambda data, now: pieces.append(data), timeout_s)
        text = b"".join(pieces)
        if status != 200:
            raise WireError(
                f"http {status}", f"{path} answered {status}: {text.decode(errors='replace'):.300}"
            )
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise WireError("protocol", f"{path} did not answer JSON: {error}") from error

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()  # the last one used is the likeliest to be open still
            if not connection.closed:
                return connection
        return await self._open()

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_S):
                _, connection = await loop.create_connection(
                    _Connection, self._host, self._port, ssl=self._tls
                )
        except TimeoutError:
            raise WireError("connect", f"no connection within {_CONNECT_S:g} s") from None
        except OSError as error:
            raise WireError("connect", f"no connection: {error}") from error
        self.opened += 1
        return connection

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()


class Events:
    """Server-sent events out of pieces of a body: the data of each, as it becomes whole."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
