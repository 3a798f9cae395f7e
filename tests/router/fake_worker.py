"""A worker without an engine: speaks the token protocol, computes tokens by arithmetic, fails on command.

A token is a function of the seed and of all tokens before it, as with a real model, so that a stream that moves from
one worker to another is right exactly when `expected_output` says so.
"""

from __future__ import annotations

import asyncio
import threading
import time
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.protocol import frames
from workers.protocol.hashes import block_hashes, hash_root
from workers.protocol.messages import (
    Accepted,
    Cancel,
    Failed,
    Heartbeat,
    KvLayout,
    Load,
    Ping,
    Prefill,
    PrefillDone,
    Reserve,
    Role,
    Room,
    Sampling,
    StatusReply,
    StatusRequest,
    Ticket,
    Ticketed,
    TokenDelta,
    TokenLogprobs,
    Tokens,
    Welcome,
    Work,
    WorkerInfo,
)
from workers.protocol.tiers import DEVICE, Removed, Stored

SECRET = b"a secret for tests only"
VOCABULARY = 50_000
BLOCK = 16
LAYOUT = KvLayout(
    num_layers=1, num_kv_heads=1, head_dim=4, block_size=BLOCK, dtype="float32", model_fingerprint="f" * 16
)
ROOT = hash_root("f" * 16, "float32", BLOCK)

# What a hook may answer at a stage: None (go on) or one of these.
#   "die"        the process is gone: connections end, nothing is answered any more
#   "stall"      the process is stopped: connections stay, nothing is sent any more
#   "cut"        connections end, and the process lives
#   "drop"       this message is lost
#   "busy", "invalid", "internal", ...  Failed with this code
#   "duplicate", "gap"  (stage "token") the delta is sent twice; the delta is left out
Hook = Callable[[str, Work], str | None]


def next_token(seed: int, tokens: Sequence[int]) -> int:
    return zlib.crc32(array("I", tokens).tobytes(), seed & 0xFFFFFFFF) % VOCABULARY


def logprobs_of(token: int, sampling: Sampling) -> list[TokenLogprobs]:
    """As many as tokens: one, or none when they were not asked for."""
    if sampling.logprobs is None:
        return []
    top = [((token + rank) % VOCABULARY, -(token % 97) / 10 - rank) for rank in range(sampling.logprobs)]
    return [TokenLogprobs(-(token % 97) / 10, top)]


def expected_output(prompt: Sequence[int], sampling: Sampling) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < sampling.max_tokens:
        tokens.append(next_token(sampling.seed, tokens))
        if tokens[-1] in sampling.stop_token_ids:
            break
    return tokens[len(prompt) :]


@dataclass(eq=False)
class Connection:
    writer: asyncio.StreamWriter
    heard_at: float = field(default_factory=time.monotonic)
    refused: list[Room] = field(default_factory=list)  # what requests found too little of


@dataclass(eq=False)
class Held:
    """A request on a decode worker."""

    work: Work
    connection: Connection
    blocks: int
    output: list[int]
    cached_tokens: int
    transfer_id: str = ""
    lease_until: float | None = None  # None: running


class FakeWorker:
    def __init__(
        self,
        worker_id: str,
        role: Role,
        *,
        epoch: int = 1,
        num_blocks: int = 1000,
        step_s: float = 0.001,
        prefill_s: float = 0.001,
        heartbeat_s: float = 0.1,
        timeout_s: float = 2.0,
        peers: dict[str, FakeWorker] | None = None,
        hook: Hook = lambda stage, work: None,
        on_cache: Callable[[list[Stored], list[Removed]], None] = lambda stored, removed: None,
        on_death: Callable[[FakeWorker], None] = lambda worker: None,
    ) -> None:
        self.worker_id, self.role, self.epoch, self.num_blocks = worker_id, role, epoch, num_blocks
        self.step_s, self.prefill_s = step_s, prefill_s
        self.heartbeat_s, self.timeout_s = heartbeat_s, timeout_s
        self.peers = peers if peers is not None else {}
        self.hook, self.on_cache, self.on_death = hook, on_cache, on_death
        self.alive = False
        self.stalled = False
        self.held: dict[str, Held] = {}
        self.prefills: dict[str, asyncio.Task[None]] = {}
        self.cache: OrderedDict[bytes, bytes] = OrderedDict()  # hash -> parent
        self.cache_lock = threading.Lock()  # a publisher's thread takes snapshots
        self.seen: list[str] = []  # tags of messages, in order of arrival
        self.reserves: list[Reserve] = []
        self._connections: dict[Connection, None] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._server: asyncio.Server | None = None
        self.info: WorkerInfo | None = None

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> WorkerInfo:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.info = WorkerInfo(
            worker_id=self.worker_id,
            epoch=self.epoch,
            role=self.role,
            address=f"{host}:{port}",
            model="fake",
            layout=LAYOUT,
            hash_root=ROOT,
            num_blocks=self.num_blocks,
            max_model_len=8192,
            max_num_seqs=64,
            vocab_size=VOCABULARY,
            device="cpu",
            pid=0,
        )
        self.alive = True
        self.peers[self.worker_id] = self
        self._tasks = [asyncio.create_task(self._step()), asyncio.create_task(self._beat())]
        return self.info

    def die(self) -> None:
        """What kill -9 looks like from outside."""
        if not self.alive:
            return
        self.alive = False
        if self.peers.get(self.worker_id) is self:
            del self.peers[self.worker_id]
        assert self._server is not None
        self._server.close()
        for connection in list(self._connections):
            connection.writer.transport.abort()
        for task in [*self._tasks, *self.prefills.values()]:
            if task is not asyncio.current_task():
                task.cancel()
        self.held.clear()
        self.prefills.clear()
        self.on_death(self)

    def cut(self) -> None:
        """The network fails: connections end, and both sides notice."""
        for connection in list(self._connections):
            connection.writer.transport.abort()

    @property
    def used_blocks(self) -> int:
        return sum(held.blocks for held in self.held.values())

    @property
    def num_held(self) -> int:
        """Zero at rest."""
        return len(self.held) + len(self.prefills)

    def load(self) -> Load:
        reserved = sum(held.lease_until is not None for held in self.held.values())
        return Load(
            running=len(self.held) - reserved,
            reserved=reserved,
            sending=len(self.prefills),
            active_blocks=self.used_blocks,
            cached_blocks=len(self.cache),
            free_blocks=self.num_blocks - self.used_blocks,
            room=self.room(),
        )

    def room(self) -> Room:
        return Room(requests=1000, blocks=self.num_blocks - self.used_blocks, tokens=1_000_000)

    def cached(self) -> list[Stored]:
        """The snapshot for a publisher."""
        with self.cache_lock:
            return [(block_hash, parent, DEVICE) for block_hash, parent in self.cache.items()]

    # --- connections ------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(writer)
        try:
            challenge = frames.new_challenge()
            writer.write(frames.encode(challenge))
            hello = await frames.read_frame(reader, frames.to_worker)
            answer = frames.judge_hello(SECRET, challenge, hello, self.info)
            writer.write(frames.encode(answer))
            if not isinstance(answer, Welcome):
                return
            self._connections[connection] = None
            while self.alive:
                message = await frames.read_frame(reader, frames.to_worker)
                while self.stalled:  # noqa: ASYNC110  stopped processes get no events
                    await asyncio.sleep(0.01)
                connection.heard_at = time.monotonic()
                self._handle(connection, message)
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            self._connections.pop(connection, None)
            for request_id, held in list(self.held.items()):
                if held.connection is connection:
                    self._drop(request_id)
            writer.transport.abort()

    def _send(self, connection: Connection, message: Any) -> None:
        if self.alive and not self.stalled and connection in self._connections:
            connection.writer.write(frames.encode(message))

    def _handle(self, connection: Connection, message: Any) -> None:
        self.seen.append(type(message).__name__)
        if isinstance(message, Reserve):
            self._reserve(connection, message)
        elif isinstance(message, Prefill):
            task = asyncio.create_task(self._prefill(connection, message))
            self.prefills[message.work.request_id] = task
        elif isinstance(message, Cancel):
            self._drop(message.request_id)
            task = self.prefills.pop(message.request_id, None)
            if task is not None:
                task.cancel()
        elif isinstance(message, StatusRequest):
            text = f'fake_worker_up{{worker="{self.worker_id}"}} 1\n'.encode()
            reply = StatusReply(
                message.query_id, self.load(), self.used_blocks, 0, self.num_held, metrics=text
            )
            self._send(connection, reply)
        else:
            assert isinstance(message, Ping)

    def _obey_order(self, order: str) -> None:
        if order == "die":
            self.die()
        elif order == "cut":
            self.cut()
        else:
            self.stalled = True

    def _obey(self, stage: str, connection: Connection, work: Work) -> bool:
        """True: the stage does not take place."""
        order = self.hook(stage, work)
        if order is None:
            return False
        if order in ("die", "stall", "cut"):
            self._obey_order(order)
        elif order != "drop":
            self._drop(work.request_id)
            self._fail(connection, work, order, f"told to be {order} at {stage}")
        return True

    # --- decode -----------------------------------------------------------------------------------------------------

    def _reserve(self, connection: Connection, message: Reserve) -> None:
        self.reserves.append(message)
        work = message.work
        if self._obey("reserve", connection, work):
            return
        assert work.request_id not in self.held, "a request id came twice"
        tokens = work.prompt + work.output
        hashes = block_hashes(tokens, BLOCK, ROOT, work.cache_salt)
        cached = 0
        while cached < len(hashes) and hashes[cached] in self.cache:
            cached += 1
        blocks = len(tokens) // BLOCK + 1
        if self.used_blocks + blocks > self.num_blocks:
            self._fail(connection, work, "busy", "no room", Room(blocks=blocks))
            return
        held = Held(work, connection, blocks, list(work.output), cached * BLOCK)
        self.held[work.request_id] = held
        if len(tokens) - cached * BLOCK <= message.local_prefill_max:
            self._send(connection, Accepted(work.request_id, held.cached_tokens))
            self._obey("accepted", connection, work)
            return
        held.transfer_id, held.lease_until = message.transfer_id, time.monotonic() + message.lease_s
        ticket = Ticket(
            message.transfer_id, self.worker_id, self.epoch, cached, blocks, message.lease_s, LAYOUT, []
        )
        self._send(connection, Ticketed(work.request_id, ticket))
        self._obey("ticketed", connection, work)

    def commit(self, transfer_id: str, epoch: int, token: int) -> bool:
        """P hands over the first token. False: the ticket is gone."""
        held = next((h for h in self.held.values() if h.transfer_id == transfer_id), None)
        if held is None or epoch != self.epoch or not self.alive or self.stalled:
            return False
        if self._obey("commit", held.connection, held.work):
            return False
        held.lease_until = None
        self._emit({held.connection: [held]}, first=token)
        return True

    def _drop(self, request_id: str) -> None:
        if self.held.pop(request_id, None) is not None:
            for connection in self._connections:
                if any(self.room().covers(lacks) for lacks in connection.refused):
                    connection.refused.clear()
                    self._send(connection, Heartbeat(self.load()))

    def _fail(
        self, connection: Connection, work: Work, code: str, reason: str, lacks: Room | None = None
    ) -> None:
        if code == "busy":
            connection.refused.append(lacks or Room())
        self._send(connection, Failed(work.request_id, code, reason, lacks))

    async def _step(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            if self.stalled:
                continue
            now = time.monotonic()
            running: dict[Connection, list[Held]] = {}
            for request_id, held in list(self.held.items()):
                if held.lease_until is None:
                    running.setdefault(held.connection, []).append(held)
                elif held.lease_until < now:
                    self._drop(request_id)
                    self._send(held.connection, Failed(request_id, "lease_expired", "no blocks came"))
            self._emit(running)

    def _emit(self, running: dict[Connection, list[Held]], first: int | None = None) -> None:
        """One token for each, one frame for each connection."""
        for connection, requests in running.items():
            deltas: list[TokenDelta] = []
            for held in requests:
                work, sampling = held.work, held.work.sampling
                order = self.hook("token", work)
                if order in ("die", "stall", "cut"):
                    self._send(connection, Tokens(deltas))
                    self._obey_order(order)
                    return
                index = len(held.output)
                token = first if first is not None else next_token(sampling.seed, work.prompt + held.output)
                held.output.append(token)
                stop = token if token in sampling.stop_token_ids else None
                reason = "stop" if stop is not None else None
                if reason is None and len(held.output) == sampling.max_tokens:
                    reason = "length"
                cached = min(held.cached_tokens, len(work.prompt))
                logprobs = logprobs_of(token, sampling)
                delta = TokenDelta(
                    work.request_id, index, [token], logprobs, reason, stop, cached_tokens=cached
                )
                if reason is not None:
                    self._store(work, held.output)
                    self._drop(work.request_id)
                if order != "gap":
                    deltas += [delta] * (2 if order == "duplicate" else 1)
            if deltas:
                self._send(connection, Tokens(deltas))

    def _store(self, work: Work, output: list[int]) -> None:
        hashes = block_hashes(work.prompt + output, BLOCK, ROOT, work.cache_salt)
        with self.cache_lock:
            stored: list[Stored] = []
            for parent, block_hash in zip([ROOT, *hashes], hashes, strict=False):
                if block_hash not in self.cache:
                    stored.append((block_hash, parent, DEVICE))
                self.cache[block_hash] = parent
                self.cache.move_to_end(block_hash)
            removed: list[Removed] = []
            while len(self.cache) > self.num_blocks:
                removed.append((self.cache.popitem(last=False)[0], DEVICE))
            self.on_cache(stored, [])
            self.on_cache([], removed)

    # --- prefill ----------------------------------------------------------------------------------------------------

    async def _prefill(self, connection: Connection, message: Prefill) -> None:
        work, ticket = message.work, message.ticket
        try:
            if self._obey("prefill", connection, work):
                return
            await asyncio.sleep(self.prefill_s)
            while self.stalled:  # noqa: ASYNC110  stopped processes get no events
                await asyncio.sleep(0.01)
            self._store(work, work.output)
            if self._obey("prefilled", connection, work):
                return
            decode = self.peers.get(ticket.worker_id)
            token = next_token(work.sampling.seed, work.prompt + work.output)
            if decode is None or not decode.commit(ticket.transfer_id, ticket.epoch, token):
                self._send(connection, Failed(work.request_id, "transfer_failed", "the ticket is gone"))
                return
            if not self._obey("done", connection, work):
                self._send(connection, PrefillDone(work.request_id, 0, 0.0, 0.001, 0.001, 1000, "fake"))
        finally:
            self.prefills.pop(work.request_id, None)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.heartbeat_s)
            for connection in list(self._connections):
                self._send(connection, Heartbeat(self.load()))
                if time.monotonic() - connection.heard_at > self.timeout_s and not self.stalled:
                    connection.writer.transport.abort()
