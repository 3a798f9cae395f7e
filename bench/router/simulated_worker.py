"""Workers without an engine: the real token protocol, a token for every running sequence each step, one frame a step.

`python -m bench.router.simulated_worker` runs prefill and decode workers in one process, registered in Redis by the
real publisher. A prompt takes no time; a hand-over is a call. All that is left is what the router has to hear.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import uvloop

from bench.router.clock_tokens import tick
from bench.router.process import listen, ready, told
from workers.protocol import frames
from workers.protocol.hashes import block_hashes, hash_root
from workers.protocol.messages import (
    Accepted,
    Cancel,
    Challenge,
    Heartbeat,
    KvLayout,
    Load,
    Prefill,
    PrefillDone,
    Reserve,
    Role,
    StatusReply,
    StatusRequest,
    Ticket,
    Ticketed,
    TokenDelta,
    Tokens,
    Welcome,
    Work,
    WorkerInfo,
)
from workers.protocol.tiers import DEVICE, Removed, Stored
from workers.publisher import Publisher

CLUSTER = "bench-router"
_LEASE_S = 5.0
_BEAT_S = 0.5
_NUM_BLOCKS = 4_000_000
_CACHED_BLOCKS = 16_384  # of a worker that tells the index what it holds
_LAYOUT = KvLayout(
    num_layers=1, num_kv_heads=1, head_dim=64, block_size=16, dtype="bfloat16", model_fingerprint="b" * 16
)
_ROOT = hash_root(_LAYOUT.model_fingerprint, _LAYOUT.dtype, _LAYOUT.block_size)


class Sequence:
    __slots__ = ("connection", "index", "last", "request_id", "work")

    def __init__(self, work: Work, connection: Connection) -> None:
        self.work = work
        self.request_id = work.request_id
        self.connection = connection
        self.index = len(work.output)
        self.last = work.sampling.max_tokens - 1


class Worker:
    """`step_s` between two steps; 0: the next begins when the frame of the last is with the kernel."""

    def __init__(
        self,
        worker_id: str,
        role: Role,
        secret: bytes,
        clock_ids: list[int],
        vocab_size: int,
        tells_index: bool,
    ) -> None:
        self.worker_id = worker_id
        self.role = role
        self.secret = secret
        self.info: WorkerInfo | None = None
        self.peers: dict[str, Worker] = {}
        self.step_s = 0.0
        self._clock_ids = clock_ids
        self._vocab_size = vocab_size
        self._tells_index = tells_index
        self._publisher: Publisher | None = None
        self._cached: dict[bytes, None] = {}
        self._connections: set[Connection] = set()
        self._waiting: dict[str, Sequence] = {}  # by transfer
        self._running: dict[str, Sequence] = {}
        self._next_step: asyncio.Handle | None = None
        self._due = 0.0

    async def start(self, redis_url: str) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(self), "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        self.info = WorkerInfo(
            worker_id=self.worker_id,
            epoch=int(time.time() * 1000),
            role=self.role,
            address=f"{host}:{port}",
            model="simulated",
            layout=_LAYOUT,
            hash_root=_ROOT,
            num_blocks=_NUM_BLOCKS,
            max_model_len=131_072,
            max_num_seqs=65_536,
            vocab_size=self._vocab_size,
            device="simulated",
            pid=0,
        )
        self._publisher = Publisher(self.info, redis_url, CLUSTER, _LEASE_S, lambda: [])
        self._publisher.start()
        self._beat()

    def _beat(self) -> None:
        for connection in self._connections:
            connection.send(Heartbeat(self._load()))
        asyncio.get_running_loop().call_later(_BEAT_S, self._beat)

    def _load(self) -> Load:
        return Load(running=len(self._running), reserved=len(self._waiting), free_blocks=_NUM_BLOCKS)

    # --- what the router says ---------------------------------------------------------------------------------------

    def joined(self, connection: Connection) -> None:
        self._connections.add(connection)
        connection.send(Heartbeat(self._load()))

    def left(self, connection: Connection) -> None:
        self._connections.discard(connection)
        for sequences in (self._waiting, self._running):
            for key in [key for key, one in sequences.items() if one.connection is connection]:
                del sequences[key]

    def hear(self, message: Any, connection: Connection) -> None:
        if isinstance(message, Reserve):
            self._reserve(message, connection)
        elif isinstance(message, Prefill):
            self._prefill(message, connection)
        elif isinstance(message, Cancel):
            self._running.pop(message.request_id, None)
            for key, one in list(self._waiting.items()):
                if one.request_id == message.request_id:
                    del self._waiting[key]
        elif isinstance(message, StatusRequest):
            connection.send(StatusReply(message.query_id, self._load(), 0, 0, len(self._running)))

    def _reserve(self, message: Reserve, connection: Connection) -> None:
        work = message.work
        sequence = Sequence(work, connection)
        if len(work.prompt) <= message.local_prefill_max:
            connection.send(Accepted(work.request_id, 0))
            self._begin(sequence)
            return
        assert self.info is not None
        self._waiting[message.transfer_id] = sequence
        blocks = len(work.prompt) // _LAYOUT.block_size + 1
        ticket = Ticket(
            message.transfer_id, self.worker_id, self.info.epoch, 0, blocks, message.lease_s, _LAYOUT, []
        )
        connection.send(Ticketed(work.request_id, ticket))

    def _prefill(self, message: Prefill, connection: Connection) -> None:
        self._remember(message.work)
        decode = self.peers[message.ticket.worker_id]
        sequence = decode._waiting.pop(message.ticket.transfer_id, None)
        if sequence is not None:
            decode._begin(sequence)
        connection.send(PrefillDone(message.work.request_id, 0, 0.0, 0.001, 0.001, 1000, "shm"))

    def _remember(self, work: Work) -> None:
        """Of what an engine would tell the index: the blocks of the prompt, and what makes way for them."""
        if not self._tells_index or self._publisher is None:
            return
        hashes = block_hashes(work.prompt, _LAYOUT.block_size, _ROOT, work.cache_salt)
        stored: list[Stored] = []
        removed: list[Removed] = []
        for parent, block_hash in zip([_ROOT, *hashes], hashes, strict=False):
            if block_hash not in self._cached:
                stored.append((block_hash, parent, DEVICE))
            self._cached[block_hash] = None
        while len(self._cached) > _CACHED_BLOCKS:
            oldest = next(iter(self._cached))
            del self._cached[oldest]
            removed.append((oldest, DEVICE))
        self._publisher.publish(stored, removed)

    # --- steps ------------------------------------------------------------------------------------------------------

    def _begin(self, sequence: Sequence) -> None:
        self._remember(sequence.work)
        self._running[sequence.request_id] = sequence
        if self._next_step is None:
            loop = asyncio.get_running_loop()
            self._due = loop.time()
            self._next_step = loop.call_soon(self._step)

    def _step(self) -> None:
        """As an engine has it: each sequence a token, each connection a frame."""
        loop = asyncio.get_running_loop()
        self._next_step = None
        if not self._running:
            return
        frames_of: dict[Connection, list[TokenDelta]] = {}
        token = [self._clock_ids[tick()]]
        ended: list[str] = []
        for request_id, one in self._running.items():
            if one.connection.full:
                continue
            deltas = frames_of.get(one.connection)
            if deltas is None:
                deltas = frames_of[one.connection] = []
            index = one.index
            if index == one.last:
                deltas.append(TokenDelta(request_id, index, token, finish_reason="length"))
                ended.append(request_id)
            else:
                deltas.append(TokenDelta(request_id, index, token))
                one.index = index + 1
        for request_id in ended:
            self._remember(self._running.pop(request_id).work)
        for connection, deltas in frames_of.items():
            connection.send(Tokens(deltas))
        if not frames_of:  # nobody takes anything
            self._next_step = loop.call_later(0.001, self._step)
        elif self.step_s:
            # A step that comes late does not make the next ones come late too, as long as it is less than one late.
            self._due = max(self._due + self.step_s, loop.time() - self.step_s)
            self._next_step = loop.call_at(self._due, self._step)
        else:
            self._next_step = loop.call_soon(self._step)


class Connection(asyncio.Protocol):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._challenge: Challenge | None = frames.new_challenge()
        self.full = False

    def send(self, message: Any) -> None:
        if self._transport is not None:
            self._transport.write(frames.encode(message))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it
        self._transport.set_write_buffer_limits(high=65_536)
        self.send(self._challenge)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._worker.left(self)

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        start = 0
        while len(received) - start >= 4:
            end = start + 4 + int.from_bytes(received[start : start + 4], "little")
            if len(received) < end:
                break
            self._heard(frames.to_worker.decode(bytes(received[start + 4 : end])))
            start = end
        del received[:start]

    def _heard(self, message: Any) -> None:
        if self._challenge is None:
            self._worker.hear(message, self)
            return
        challenge, self._challenge = self._challenge, None
        assert self._worker.info is not None
        answer = frames.judge_hello(self._worker.secret, challenge, message, self._worker.info)
        self.send(answer)
        if isinstance(answer, Welcome):
            self._worker.joined(self)


async def main() -> None:
    order = told()
    workers = {
        f"{role}-{number}": Worker(
            f"{role}-{number}",
            role,
            order["secret"].encode(),
            order["clock_ids"],
            order["vocab_size"],
            order["tells_index"],
        )
        for role in ("prefill", "decode")
        for number in range(order[role])
    }
    for worker in workers.values():
        worker.peers = workers
        await worker.start(order["redis_url"])
    over = asyncio.Event()

    def do(order: dict[str, Any]) -> None:
        for worker in workers.values():
            worker.step_s = order["step_s"]

    listen(do, over.set)
    ready()
    await over.wait()


if __name__ == "__main__":
    uvloop.run(main())
