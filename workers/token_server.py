"""The token plane's server: one connection for each router replica, one frame for each engine step."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from workers.protocol.frames import (
    MAX_GREETING_BYTES,
    ProtocolError,
    encode,
    judge_hello,
    new_challenge,
    read_frame,
    to_worker,
)
from workers.protocol.messages import (
    Cancel,
    Heartbeat,
    Ping,
    Prefill,
    Refused,
    Reserve,
    StatusReply,
    StatusRequest,
    WorkerInfo,
)
from workers.serving import Serving

logger = logging.getLogger(__name__)

# A router that reads more slowly than its tokens are made is cut off here instead of filling our memory.
_MAX_UNSENT_BYTES = 64 << 20


class Connection:
    """One router. It owns the requests that came over it, and they end with it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, writer: asyncio.StreamWriter, peer: str) -> None:
        self._loop = loop
        self._writer = writer
        self.peer = peer
        self.last_heard = time.monotonic()

    def send(self, message: Any) -> None:
        """From any thread; in order."""
        frame = encode(message)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is going down
            self._loop.call_soon_threadsafe(self._write, frame)

    def _write(self, frame: bytes) -> None:
        transport = self._writer.transport
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            logger.warning("router %s does not read its tokens: connection cut", self.peer)
            transport.abort()
            return
        self._writer.write(frame)

    def cut(self) -> None:
        self._writer.transport.abort()


class TokenServer:
    """Runs in an event loop on a thread of its own."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        secret: bytes,
        heartbeat_s: float,
        timeout_s: float,
        status: Callable[[StatusRequest], StatusReply],
    ) -> None:
        self._host = host
        self._port = port
        self._secret = secret
        self._heartbeat_s = heartbeat_s
        self._timeout_s = timeout_s
        self._status = status
        self._serving: Serving | None = None
        self._info: WorkerInfo | None = None
        self._connections: set[Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="token-server", daemon=True)

    def bind(self) -> str:
        """Take the port, without serving yet. Returns host:port; raises OSError."""
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(self._listen(), self._loop)
        self._server = listening.result(timeout=10)
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    def start(self, serving: Serving, info: WorkerInfo) -> None:
        self._serving = serving
        self._info = info
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(timeout=10)

    def stop(self) -> None:
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def broadcast_load(self) -> None:
        """From any thread: tell every router how things stand."""
        assert self._serving is not None
        beat = Heartbeat(self._serving.load())
        for connection in list(self._connections):
            connection.send(beat)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(
            self._accept, self._host, self._port, start_serving=False, limit=1 << 20
        )

    async def _start(self) -> None:
        assert self._server is not None
        await self._server.start_serving()
        self._beating = asyncio.create_task(self._beat())

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.cut()
        if hasattr(self, "_beating"):
            self._beating.cancel()
        await asyncio.sleep(0)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            self.broadcast_load()
            oldest = time.monotonic() - self._timeout_s
            for connection in list(self._connections):
                if connection.last_heard < oldest:
                    logger.warning(
                        "router %s was silent for %g s: connection cut", connection.peer, self._timeout_s
                    )
                    connection.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving = self._serving
        assert serving is not None
        connection: Connection | None = None
        try:
            peer = await asyncio.wait_for(self._handshake(reader, writer), self._timeout_s)
            if peer is None:
                return
            connection = Connection(self._loop, writer, peer)
            self._connections.add(connection)
            connection.send(Heartbeat(serving.load()))
            while True:
                message = await read_frame(reader, to_worker)
                connection.last_heard = time.monotonic()
                self._handle(serving, connection, message)
        except ProtocolError as error:
            logger.warning("router connection closed: %s", error)
        except (OSError, EOFError, TimeoutError):
            pass  # the router left; what it owned is dropped below
        finally:
            if connection is not None:
                self._connections.discard(connection)
                serving.drop_owner(connection)
            writer.close()

    async def _handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str | None:
        """The peer's name, or None after a refusal."""
        assert self._info is not None
        challenge = new_challenge()
        writer.write(encode(challenge))
        hello = await read_frame(reader, to_worker, max_bytes=MAX_GREETING_BYTES)
        answer = judge_hello(self._secret, challenge, hello, self._info)
        writer.write(encode(answer))
        await writer.drain()
        if isinstance(answer, Refused):
            logger.warning("router refused: %s", answer.reason)
            return None
        return str(getattr(hello, "peer_id", ""))

    def _handle(self, serving: Serving, connection: Connection, message: Any) -> None:
        match message:
            case Reserve():
                serving.reserve(connection, message)
            case Prefill():
                serving.prefill(connection, message)
            case Cancel():
                serving.cancel(message.request_id)
            case Ping():
                pass  # its arrival is all it says
            case StatusRequest():
                connection.send(self._status(message))
            case _:
                raise ProtocolError(f"{type(message).__name__} is not expected here")
