"""Two processes that hand blocks over by the code that workers use, with caches of any block size and no model."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from workers.config import TransferConfig
from workers.engine.block_pool import BlockPool
from workers.huge_pages import huge_zeros
from workers.protocol.messages import KvFetch, KvFirstToken, KvLayout, KvPrefix, PrefixHolder, WorkerInfo
from workers.shared_memory import SharedPages
from workers.transfer.block_memory import HostBlocks
from workers.transfer.handoff import Handoffs
from workers.transfer.receiver import Receiver
from workers.transfer.tickets import Tickets

_SECRET = b"a secret of the benchmark's own"
_TOKENS, _HEADS, _HEAD_DIM = 16, 2, 128
LAYER_BYTES = 2 * _HEADS * _TOKENS * _HEAD_DIM * 2


def layout_of(block_bytes: int) -> KvLayout:
    """bfloat16 blocks of that size: as many layers as it takes."""
    if block_bytes % LAYER_BYTES:
        raise ValueError(f"blocks have a multiple of {LAYER_BYTES} bytes, not {block_bytes}")
    return KvLayout(block_bytes // LAYER_BYTES, _HEADS, _HEAD_DIM, _TOKENS, "bfloat16", "none")


class Side:
    """Everything of a worker that moves blocks."""

    def __init__(
        self, name: str, layout: KvLayout, num_blocks: int, config: TransferConfig, share: bool
    ) -> None:
        self.name, self.layout = name, layout
        self.pool = BlockPool(num_blocks)
        self.lock = threading.RLock()
        engine: Any = SimpleNamespace(lock=self.lock, layout=layout, pool=self.pool, scheduler=None)
        num_bytes = num_blocks * layout.block_bytes
        shared = SharedPages(num_bytes) if share else None
        self.pages = huge_zeros(num_bytes) if shared is None else shared.array
        self.pages[:] = 1  # every page is there before anything is timed
        memories = [HostBlocks(self.pages, layout, shared=shared)]
        self.tickets = Tickets(engine, name, 1, lambda arrival: None, lambda request, code, reason: None)
        self.handoffs = Handoffs(
            engine, memories, config, worker_id=name, secret=_SECRET, on_end=lambda *end: None
        )
        self.receiver = Receiver(
            self.tickets, memories, layout, config, secret=_SECRET, on_fetch=self.handoffs.send_prefix
        )
        self.tickets.endpoints = self.receiver.endpoints
        info = WorkerInfo(name, 1, "decode", "", "", layout, b"", num_blocks, 1, 1, 1, "cpu", 0)
        self.receiver.start(info)

    def holder(self) -> PrefixHolder:
        """What others need to reach it."""
        return PrefixHolder(self.name, 1, self.pool.num_blocks, self.receiver.endpoints)

    def hold(self, count: int, rng: random.Random) -> list[bytes]:
        """Blocks all over the cache become a cached prefix; its hashes."""
        ids = self.pool.allocate(self.pool.num_blocks)
        assert ids is not None
        rng.shuffle(ids)
        hashes = [index.to_bytes(16, "little") for index in range(count)]
        for block, name, parent in zip(ids[:count], hashes, [b"\xff" * 16, *hashes], strict=False):
            self.pool.store(block, name, parent)
        self.pool.release(ids)
        return hashes

    def stop(self) -> None:
        self.handoffs.stop()
        self.receiver.stop()


@dataclass
class _Landing:
    ids: list[int]
    done: threading.Event
    failed: str = ""

    def blocks(self, first: int, count: int) -> list[int]:
        return self.ids[first : first + count]

    def land(self, message: KvFirstToken | KvPrefix, opened: float, num_bytes: int) -> None:
        self.done.set()

    def lose(self, code: str, reason: str) -> None:
        self.failed = reason
        self.done.set()


def _sender(conn: Any, block_bytes: int, num_blocks: int, config: TransferConfig) -> None:
    share = "shm" in config.channels  # as a prefill worker does
    side = Side("sender", layout_of(block_bytes), num_blocks, config, share)
    conn.send((side.holder(), side.hold(num_blocks, random.Random(0))))
    conn.recv()
    side.stop()


class Pair:
    """A sending process, and a receiver here."""

    def __init__(self, block_bytes: int, total_bytes: int, config: TransferConfig) -> None:
        self.num_blocks = max(1, total_bytes // block_bytes)
        self.block_bytes = block_bytes
        context = multiprocessing.get_context("spawn")
        self._conn, theirs = context.Pipe()
        self._process = context.Process(
            target=_sender, args=(theirs, block_bytes, self.num_blocks, config), daemon=True
        )
        self._process.start()
        self.side = Side("receiver", layout_of(block_bytes), self.num_blocks, config, share=False)
        self._sender, self._hashes = self._conn.recv()
        self._count = 0
        self._rng = random.Random(1)

    def transfer(self) -> float:
        """Bytes per second of one transfer of every block, from the question to the last acknowledgement."""
        ids = self.side.pool.allocate(self.num_blocks)
        assert ids is not None
        self._rng.shuffle(ids)
        landing = _Landing(ids, threading.Event())
        self._count += 1
        name = f"t{self._count}"
        ticket = self.side.tickets.expect(name, landing, 0, self.num_blocks, 60.0)
        began = time.perf_counter()
        self.side.handoffs.ask(self._sender, KvFetch(name, ticket, self._hashes), lambda ok, why: None)
        if not landing.done.wait(60) or landing.failed:
            raise RuntimeError(f"the transfer failed: {landing.failed or 'no end in 60 s'}")
        seconds = time.perf_counter() - began
        self.side.pool.release(ids)
        return self.num_blocks * self.block_bytes / seconds

    def stop(self) -> None:
        self._conn.send(None)
        self._process.join(10)
        self.side.stop()
