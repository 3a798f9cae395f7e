"""A prefill and a decode side with real sockets and real blocks, and a model that is only a pattern of bytes.

The KV bytes of a block are a function of the tokens up to its end, as in a real model, so the decode side can check
that what arrived is what the tokens demand, wherever it was computed.
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from workers.config import TransferConfig
from workers.engine.block_pool import BlockPool
from workers.engine.plan import Sampled
from workers.engine.request import Request, State
from workers.engine.scheduler import Scheduler
from workers.protocol.hashes import hash_root
from workers.protocol.messages import KvLayout, Sampling, Work, WorkerInfo
from workers.shared_memory import SharedPages
from workers.transfer.block_memory import BlockMemory, DeviceBlocks, HostBlocks
from workers.transfer.handoff import Handoffs
from workers.transfer.receiver import Receiver
from workers.transfer.tickets import Tickets

BLOCK = 4
SECRET = b"s" * 32
LAYOUT = KvLayout(
    num_layers=2, num_kv_heads=2, head_dim=8, block_size=BLOCK, dtype="float32", model_fingerprint="f"
)


def pattern(token_ids: list[int]) -> bytes:
    """What the block that ends with these tokens holds."""
    seed = hashlib.sha256(repr(token_ids).encode()).digest()
    return (seed * (LAYOUT.block_bytes // len(seed) + 1))[: LAYOUT.block_bytes]


class PatternEngine:
    """As much of an engine as the hand-over needs."""

    def __init__(self, num_blocks: int) -> None:
        self.lock = threading.RLock()
        self.layout = LAYOUT
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(
            self.pool,
            block_size=BLOCK,
            hash_root=hash_root("f", "float32", BLOCK),
            max_num_seqs=64,
            max_num_batched_tokens=64,
        )
        self.pages = SharedPages(num_blocks * LAYOUT.block_bytes)
        shape = (num_blocks, LAYOUT.num_layers, 2, LAYOUT.num_kv_heads, BLOCK, LAYOUT.head_dim)
        self.kv_cache = torch.from_numpy(self.pages.array).view(torch.float32).view(shape)
        self.rows = self.kv_cache.view(num_blocks, -1).view(torch.uint8)

    def write(self, request: Request, upto: int) -> None:
        for index in range(-(-upto // BLOCK)):
            content = pattern(request.token_ids[: min((index + 1) * BLOCK, upto)])
            block = request.block_table[index]
            self.rows[block] = torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def holds(self, request: Request, num_tokens: int) -> bool:
        """Whether every block of the request has the bytes that its tokens demand."""
        for index in range(-(-num_tokens // BLOCK)):
            content = pattern(request.token_ids[: min((index + 1) * BLOCK, num_tokens)])
            if bytes(self.rows[request.block_table[index]].numpy()) != content:
                return False
        return True

    def memory(self, staged: bool) -> BlockMemory:
        """`staged`: as if the cache were on a device."""
        if staged:
            return DeviceBlocks(self.kv_cache, LAYOUT)
        return HostBlocks(self.pages.array, LAYOUT, shared=self.pages)


@dataclass
class DecodeSide:
    engine: PatternEngine
    channels: list[str]
    staged: bool = False
    io_timeout_s: float = 2.0
    epoch: int = 1
    worker_id: str = "d0"
    committed: dict[str, bool] = field(default_factory=dict)  # request id -> its blocks were right
    lost: dict[str, str] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.tickets = Tickets(self.engine, self.worker_id, self.epoch, self._commit, self._lose)  # type: ignore[arg-type]
        self.receiver = Receiver(
            self.tickets,
            [self.engine.memory(self.staged)],
            LAYOUT,
            TransferConfig(channels=self.channels, io_timeout_s=self.io_timeout_s),
            secret=SECRET,
        )
        self.tickets.endpoints = self.receiver.endpoints
        self.receiver.start(info(self.worker_id, self.epoch))
        self.tickets.start()

    def reserve(self, work: Work, lease_s: float = 5.0) -> Any:
        return self.tickets.open(Request(work), f"t-{work.request_id}", lease_s)

    def _commit(self, arrival: Any) -> None:
        request = arrival.new.request
        self.committed[request.request_id] = self.engine.holds(request, request.num_computed_tokens)
        self.engine.scheduler.cancel(request.request_id)
        self._notify()

    def _lose(self, request: Request, code: str, reason: str) -> None:
        self.lost[request.request_id] = code
        self._notify()

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def wait(self, *names: str, timeout_s: float = 10.0) -> None:
        with self.changed:
            done = self.changed.wait_for(
                lambda: all(n in self.committed or n in self.lost for n in names), timeout_s
            )
        assert done, f"{set(names) - set(self.committed) - set(self.lost)} did not end"

    def stop(self) -> None:
        self.receiver.stop()
        self.tickets.stop()


@dataclass
class PrefillSide:
    engine: PatternEngine
    channels: list[str]
    staged: bool = False
    io_timeout_s: float = 2.0
    ring_memory: int = 1 << 20
    lease_s: float = 2.0
    ended: dict[str, str | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    roads: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = TransferConfig(
            channels=self.channels,
            io_timeout_s=self.io_timeout_s,
            ring_memory=self.ring_memory,
            lease_s=self.lease_s,
        )
        self.handoffs = Handoffs(
            self.engine,  # type: ignore[arg-type]
            [self.engine.memory(self.staged)],
            config,
            worker_id="p0",
            secret=SECRET,
            on_end=self._end,
        )
        self.handoffs.start()

    def _end(self, request: Request, handoff: Any, code: str | None, reason: str) -> None:
        name = request.request_id
        self.ended[name] = code
        self.reasons[name] = reason
        self.roads[name] = handoff.road

    def accept(self, work: Work, ticket: Any) -> Request:
        request = Request(work, prefill_only=True)
        with self.engine.lock:
            self.handoffs.open(request, ticket)
            self.engine.scheduler.add(request)
        return request

    def step(self) -> bool:
        with self.engine.lock:
            plan = self.engine.scheduler.schedule()
        for item in plan.items:
            self.engine.write(item.request, item.start + item.count)
        with self.engine.lock:
            sampled = [Sampled(9, None) for item in plan.items if item.samples]
            result = self.engine.scheduler.update(plan, sampled)
            tokens = {new.request.request_id: new for new in result.tokens}
            for request in result.progressed:
                self.handoffs.advance(request, tokens.get(request.request_id))
                if request.state is State.PREFILLED:
                    self.engine.scheduler.cancel(request.request_id)
        return bool(plan.items)

    def run(self) -> None:
        """Until nothing waits. Blocks that are still leaving may hold a request up for a moment."""
        while self.engine.scheduler.has_work:
            if not self.step():
                time.sleep(0.001)

    def stop(self) -> None:
        self.handoffs.stop()


def info(worker_id: str, epoch: int) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        epoch=epoch,
        role="decode",
        address="",
        model="m",
        layout=LAYOUT,
        hash_root=b"",
        num_blocks=1,
        max_model_len=1,
        max_num_seqs=1,
        vocab_size=10,
        device="cpu",
        pid=0,
    )


def work(name: str, prompt: list[int]) -> Work:
    return Work(request_id=name, prompt=prompt, sampling=Sampling(max_tokens=8, seed=0))
