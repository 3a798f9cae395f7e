"""A load generator that costs little: raw connections, prepared bytes, answers counted and hardly looked at.

Every connection sends its next request when the last one is answered. A stream's events are counted by the empty lines
that end them; of some the time is read that stands in their token (clock_tokens).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from bench.router.clock_tokens import age_s, tick

_SAMPLED = 31  # one of so many arrivals is looked into; prime, so that no stream is always the one
_STREAM_END = b"\r\n0\r\n\r\n"  # what chunked encoding ends with; no event has a bare line end
_TEXT = (b'"content":', b'"text":')


@dataclass
class Counts:
    answers: int = 0
    events: int = 0
    failures: list[bytes] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)  # of answers that are not streamed
    ages_s: list[float] = field(default_factory=list)  # of tokens, from being sent by who made them


class HttpLoad:
    def __init__(self, requests: Sequence[bytes], clock: dict[bytes, int], streams: bool) -> None:
        """`clock`: a token's text as JSON -> its tick."""
        self.counts = Counts()
        self.streams = streams
        self._requests = itertools.cycle(requests)
        self._clock = clock
        self._clients: list[_Client] = []
        self._arrivals = 0

    async def open(self, port: int, connections: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(connections):
            _, client = await loop.create_connection(lambda: _Client(self), "127.0.0.1", port)
            self._clients.append(client)

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def next_request(self) -> bytes:
        return next(self._requests)

    def arrived(self, data: bytes) -> None:
        self._arrivals += 1
        if self._arrivals % _SAMPLED == 0:
            self._look(data)

    def _look(self, data: bytes) -> None:
        for name in _TEXT:
            start = data.rfind(name)
            if start >= 0:
                start += len(name)
                then = self._clock.get(data[start : data.find(b'"', start + 1) + 1])
                if then is not None:
                    self.counts.ages_s.append(age_s(then, tick()))
                return


class _Client(asyncio.Protocol):
    __slots__ = ("_asked_at", "_begun", "_closing", "_left", "_load", "_tail", "_transport")

    def __init__(self, load: HttpLoad) -> None:
        self._load = load
        self._closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it
        self._ask()

    def close(self) -> None:
        self._closing = True
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closing:
            self._load.counts.failures.append(b"the connection was closed")

    def _ask(self) -> None:
        self._begun = False
        self._tail = b""
        self._left = 0
        self._asked_at = time.perf_counter()
        self._transport.write(self._load.next_request())

    def data_received(self, data: bytes) -> None:
        load = self._load
        if not self._begun:
            self._begun = True
            if not data.startswith(b"HTTP/1.1 200"):
                load.counts.failures.append(data)
                self.close()
                return
            if not load.streams:
                end = data.index(b"\r\n\r\n") + 4
                at = data.index(b"content-length: ") + 16
                self._left = end + int(data[at : data.index(b"\r", at)])
        if load.streams:
            self._stream(data)
            return
        self._left -= len(data)
        if self._left == 0:
            load.counts.answers += 1
            load.counts.latencies_s.append(time.perf_counter() - self._asked_at)
            self._ask()

    def _stream(self, data: bytes) -> None:
        load = self._load
        load.counts.events += data.count(b"\n\n")
        tail = self._tail
        if tail and tail[-1] == 10 and data[0] == 10:
            load.counts.events += 1
        load.arrived(data)
        self._tail = data[-7:] if len(data) >= 7 else (tail + data)[-7:]
        if self._tail == _STREAM_END:
            load.counts.answers += 1
            self._ask()
