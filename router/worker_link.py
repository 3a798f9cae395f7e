"""One token connection: from this router replica to one life of one worker.

A link connects once, and dies once: at the end of the stream, at a message that the protocol does not allow, or when
nothing was heard for `timeout_s`. When it dies every request on it is told at once (`LinkLost`). Connecting again is
a new link (router/fleet.py).

Messages are written once per turn of the event loop, however many requests wrote in it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any, Literal, cast

from router.inbox import Event, Inbox, LinkLost
from router.room import Refusal
from workers.protocol import frames
from workers.protocol.messages import (
    Accepted,
    Failed,
    Heartbeat,
    Load,
    Ping,
    PrefillDone,
    StatusReply,
    StatusRequest,
    Ticketed,
    Tokens,
    WorkerInfo,
)

log = logging.getLogger(__name__)

LinkState = Literal["connecting", "up", "down"]

_MAX_UNSENT_BYTES = 64 * 1024 * 1024  # a peer that reads so little is not alive, whatever it says


class LinkDown(Exception):
    """The link could not be made, or is gone."""


class WorkerLink:
    def __init__(
        self,
        info: WorkerInfo,
        *,
        secret: bytes,
        router_id: str,
        heartbeat_s: float,
        timeout_s: float,
        on_load: Callable[[WorkerLink, Load], None] = lambda link, load: None,
        on_late: Callable[[], None] = lambda: None,
    ) -> None:
        self.info = info
        self.state: LinkState = "connecting"
        self.reason = ""  # why it is down
        self.load = Load()  # as last reported
        self.refusal: Refusal | None = None  # it answered `busy`, and has not said since that there is room
        self.draining = False
        self.late_messages = 0  # for requests that are not on this link (any more)
        self._secret = secret
        self._router_id = router_id
        self._heartbeat_s = heartbeat_s
        self._timeout_s = timeout_s
        self._on_load = on_load
        self._on_late = on_late
        self._inboxes: dict[str, Inbox] = {}
        self._queries: dict[int, asyncio.Future[StatusReply]] = {}
        self._query_ids = itertools.count(1)
        self._unsent: list[bytes] = []
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._heard = False  # anything, since the watchdog last looked
        self._ended: asyncio.Event = asyncio.Event()

    @property
    def worker_id(self) -> str:
        return self.info.worker_id

    @property
    def busy(self) -> bool:
        return self.refusal is not None

    def may_take(self, num_blocks: int) -> bool:
        """A request of so many blocks, as far as is known."""
        return self.refusal is None or not self.refusal.refuses(num_blocks)

    @property
    def num_requests(self) -> int:
        return len(self._inboxes)

    def __repr__(self) -> str:
        return f"<link to {self.info.worker_id}:{self.info.epoch} {self.state}>"

    # --- life -------------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Connect and shake hands. Raises LinkDown; the link is dead then."""
        host, _, port = self.info.address.rpartition(":")
        try:
            async with asyncio.timeout(self._timeout_s):
                reader, self._writer = await asyncio.open_connection(host.strip("[]"), int(port))
                await self._shake_hands(reader, self._writer)
        except (OSError, EOFError, TimeoutError, ValueError, frames.ProtocolError) as error:
            self._die(f"can't connect to {self.info.address}: {error or type(error).__name__}")
            raise LinkDown(self.reason) from error
        except BaseException:
            self._die("given up while connecting")
            raise
        self.state = "up"
        self._tasks = [asyncio.create_task(self._read(reader)), asyncio.create_task(self._watch())]

    async def _shake_hands(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        challenge = await frames.read_frame(reader, frames.from_worker)
        hello = frames.answer_challenge(self._secret, challenge, self._router_id)
        writer.write(frames.encode(hello))
        answer = await frames.read_frame(reader, frames.from_worker)
        found = frames.check_welcome(self._secret, hello, answer)
        expected = (self.info.worker_id, self.info.epoch)
        if (found.worker_id, found.epoch) != expected:
            raise frames.ProtocolError(
                f"stale registration: expected worker {expected[0]} epoch {expected[1]}, "
                f"found {found.worker_id} epoch {found.epoch}"
            )
        self.info = found

    async def wait_down(self) -> None:
        await self._ended.wait()

    def close(self, reason: str = "closed by the router") -> None:
        """Idempotent. Requests on the link get `LinkLost`; the worker cancels them when it sees the end."""
        self._die(reason)

    def _die(self, reason: str) -> None:
        if self.state == "down":
            return
        self.state = "down"
        self.reason = reason
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if self._writer is not None:
            self._writer.transport.abort()
        self._unsent.clear()
        inboxes, self._inboxes = self._inboxes, {}
        for inbox in inboxes.values():
            inbox.put(self, LinkLost(reason))
        for query in self._queries.values():
            if not query.done():
                query.set_exception(LinkDown(reason))
        self._ended.set()

    # --- requests ---------------------------------------------------------------------------------------------------

    def open(self, request_id: str, inbox: Inbox) -> None:
        """From now on events of this request go to `inbox`. On a dead link the first one is `LinkLost`."""
        if self.state != "up":
            inbox.put(self, LinkLost(self.reason or "not connected yet"))
            return
        if request_id in self._inboxes:
            raise RuntimeError(f"request {request_id} is on {self.worker_id} already")
        self._inboxes[request_id] = inbox

    def forget(self, request_id: str) -> None:
        """What still comes for this request is late. Idempotent."""
        self._inboxes.pop(request_id, None)

    def send(self, message: Any) -> None:
        """Queue a message; never blocks. On a dead link it is dropped: whoever cares has got `LinkLost`.

        Raises ProtocolError when the message is larger than a frame.
        """
        if self.state != "up":
            return
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(frames.encode(message))

    def _flush(self) -> None:
        if self.state != "up" or not self._unsent:
            return
        data = b"".join(self._unsent)
        self._unsent.clear()
        transport = cast(asyncio.StreamWriter, self._writer).transport
        transport.write(data)
        if transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            self._die(f"{self.worker_id} reads nothing: {transport.get_write_buffer_size()} bytes unsent")

    async def query(
        self, *, want_hashes: bool = False, want_metrics: bool = False, timeout_s: float
    ) -> StatusReply:
        """Ask the worker about itself. Raises TimeoutError, LinkDown."""
        if self.state != "up":
            raise LinkDown(self.reason or "not connected yet")
        query_id = next(self._query_ids)
        reply: asyncio.Future[StatusReply] = asyncio.get_running_loop().create_future()
        self._queries[query_id] = reply
        try:
            self.send(StatusRequest(query_id, want_hashes=want_hashes, want_metrics=want_metrics))
            async with asyncio.timeout(timeout_s):
                return await reply
        finally:
            del self._queries[query_id]

    # --- tasks ------------------------------------------------------------------------------------------------------

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                message = await frames.read_frame(reader, frames.from_worker)
                self._heard = True
                self._route(message)
        except (OSError, EOFError) as error:
            self._die(f"{self.worker_id} closed the connection ({type(error).__name__})")
        except frames.ProtocolError as error:
            log.warning("%s: %s", self, error)
            self._die(f"{self.worker_id} broke the protocol: {error}")
        finally:
            self._die(f"the reader of {self.worker_id} ended")

    def _route(self, message: Any) -> None:
        if isinstance(message, Tokens):
            inboxes = self._inboxes
            for delta in message.deltas:  # what `_deliver` does, without a call for each token
                inbox = inboxes.get(delta.request_id)
                if inbox is not None:
                    inbox.put(self, delta)
                else:
                    self._late()
        elif isinstance(message, Heartbeat):
            self.load = message.load
            if self.refusal is not None and self.refusal.is_over(message.load):
                self.refusal = None
            self._on_load(self, message.load)
        elif isinstance(message, Ticketed | Accepted | PrefillDone):
            self._deliver(message.request_id, message)
        elif isinstance(message, Failed):
            # Marked here, not by the request: a heartbeat that follows in the same read must be able to lift it.
            if message.code == "busy":
                self.refusal = Refusal.of(message.lacks, self.refusal)
            self.draining = self.draining or message.code == "draining"
            self._deliver(message.request_id, message)
        elif isinstance(message, StatusReply):
            query = self._queries.get(message.query_id)
            if query is not None and not query.done():
                query.set_result(message)
        else:
            raise frames.ProtocolError(f"{type(message).__name__} after the handshake")

    def _deliver(self, request_id: str, event: Event) -> None:
        inbox = self._inboxes.get(request_id)
        if inbox is None:
            self._late()
        else:
            inbox.put(self, event)

    def _late(self) -> None:
        self.late_messages += 1
        self._on_late()

    async def _watch(self) -> None:
        """Ping every heartbeat; die of silence.

        Silence is counted in the watchdog's own ticks, at most 1.5 heartbeats each: when this process itself was
        stopped for a while, the workers are not to blame.
        """
        silent_s = 0.0
        last = time.monotonic()
        while True:
            self.send(Ping(at=time.time()))
            await asyncio.sleep(self._heartbeat_s)
            now = time.monotonic()
            silent_s = 0.0 if self._heard else silent_s + min(now - last, 1.5 * self._heartbeat_s)
            self._heard, last = False, now
            if silent_s >= self._timeout_s:
                self._die(f"{self.worker_id} was silent for {silent_s:.1f} s")
                return
