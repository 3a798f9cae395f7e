"""A prefill and a decode side with real sockets and real blocks, and a model that is only a pattern of bytes.

The KV values of a block are a function of the tokens up to its end, as in a real model, and no two rows of a block are
alike, so the decode side can check that what arrived is what the tokens demand, wherever it was computed and however
many ranks share the heads on either side.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.cache_view import CacheView
from workers.config import TransferConfig
from workers.engine.block_pool import BlockPool
from workers.engine.plan import Sampled
from workers.engine.request import Request, State
from workers.engine.scheduler import Scheduler
from workers.protocol.hashes import hash_root
from workers.protocol.messages import KvFetch, KvLayout, Sampling, Work, WorkerInfo
from workers.shared_memory import SharedPages
from workers.transfer.block_memory import BlockMemory, DeviceBlocks, HostBlocks
from workers.transfer.handoff import Handoffs
from workers.transfer.receiver import Receiver
from workers.transfer.shards import heads_of
from workers.transfer.tickets import Tickets

BLOCK = 4
SECRET = b"s" * 32
VOCABULARY = 1000
LAYOUT = KvLayout(
    num_layers=2, num_kv_heads=4, head_dim=8, block_size=BLOCK, dtype="float32", model_fingerprint="f"
)
_ROW = LAYOUT.head_dim * 4
_AXES = "blkhtd"  # block, layer, k|v, head, token, row: the canonical order

# How a rank's cache may lie in memory, first axis outermost. Small letters as above; "+": a gap behind every row.
OWN_LAYOUTS = ["blkhtd", "lbkhtd", "hblktd", "klbthd", "tblkhd+"]


def pattern(token_ids: Sequence[int], layout: KvLayout = LAYOUT) -> NDArray[Any]:
    """What the block that ends with these tokens holds: [layer, k|v, head, token, head_dim]. Small whole numbers.

    Of a quantized cache any bytes: [layer, k|v, head, 1, tile].
    """
    name = repr(list(token_ids)).encode()
    if layout.quantized:
        tiles = np.frombuffer(hashlib.shake_256(name).digest(layout.block_bytes), np.uint8)
        return tiles.reshape(layout.num_layers, 2, layout.num_kv_heads, 1, layout.tile_bytes)
    values = hashlib.shake_256(name).digest(LAYOUT.block_bytes // 4)
    shape = (LAYOUT.num_layers, 2, LAYOUT.num_kv_heads, BLOCK, LAYOUT.head_dim)
    return np.frombuffer(values, np.int8).astype(np.float32).reshape(shape)


class RankCache:
    """The KV cache of one rank, laid out as it likes."""

    def __init__(self, num_blocks: int, heads: range, own: str) -> None:
        order, gap = own.rstrip("+"), _ROW * own.count("+")
        sizes = dict(
            zip(_AXES, (num_blocks, LAYOUT.num_layers, 2, len(heads), BLOCK, _ROW + gap), strict=True)
        )
        offset = 0 if own == _AXES else 64
        self.heads, self._own = heads, own
        self.pages = SharedPages(offset + int(np.prod(list(sizes.values()))))
        whole = self.pages.array[offset:].reshape([sizes[axis] for axis in order])
        rows = whole.transpose([order.index(axis) for axis in _AXES])[..., :_ROW]
        self.values: NDArray[np.float32] = rows.view(np.float32)  # [block, layer, k|v, head, token, head_dim]
        self._view = CacheView(
            self.pages.address + offset,
            num_blocks,
            LAYOUT.num_layers,
            len(heads),
            BLOCK,
            _ROW,
            *rows.strides[:5],
        )

    def memory(self, staged: bool) -> BlockMemory:
        """`staged`: as if the cache were on a device."""
        if staged:
            return DeviceBlocks(torch.from_numpy(self.values), LAYOUT)
        view = None if self._own == _AXES else self._view
        return HostBlocks(self.pages.array, LAYOUT, num_heads=len(self.heads), view=view, shared=self.pages)


class RankTiles:
    """The quantized KV cache of one rank, as engines have it: tiles in canonical order."""

    def __init__(self, num_blocks: int, heads: range, layout: KvLayout) -> None:
        shape = (num_blocks, layout.num_layers, 2, len(heads), 1, layout.tile_bytes)
        self.heads, self._layout = heads, layout
        self.pages = SharedPages(int(np.prod(shape)))
        self.values: NDArray[np.uint8] = self.pages.array.reshape(shape)

    def memory(self, staged: bool) -> BlockMemory:
        if staged:
            return DeviceBlocks(torch.from_numpy(self.values).squeeze(4), self._layout)
        return HostBlocks(self.pages.array, self._layout, num_heads=len(self.heads), shared=self.pages)


class PatternEngine:
    """As much of an engine as the hand-over needs."""

    def __init__(self, num_blocks: int, ranks: int = 1, own: str = _AXES, layout: KvLayout = LAYOUT) -> None:
        self.lock = threading.RLock()
        self.layout = layout
        self.vocab_size = VOCABULARY
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(
            self.pool,
            block_size=BLOCK,
            hash_root=hash_root("f", "float32", BLOCK),
            max_num_seqs=64,
            max_num_batched_tokens=64,
        )
        shares = [heads_of(rank, ranks, layout.num_kv_heads) for rank in range(ranks)]
        self.ranks: list[Any] = [
            RankTiles(num_blocks, heads, layout) if layout.quantized else RankCache(num_blocks, heads, own)
            for heads in shares
        ]

    def write(self, request: Request, upto: int, layer: int) -> None:
        for index in range(-(-upto // BLOCK)):
            self.write_block(
                request.block_table[index], request.token_ids[: min((index + 1) * BLOCK, upto)], layer
            )

    def write_block(self, block: int, token_ids: Sequence[int], layer: int | None = None) -> None:
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        content = pattern(token_ids, self.layout)[layers]
        for rank in self.ranks:
            rank.values[block, layers] = content[:, :, rank.heads.start : rank.heads.stop]

    def holds(self, request: Request, num_tokens: int, compression: str = "none") -> bool:
        """Whether every block of the request has the values that its tokens demand, on every rank."""
        ends = [min((index + 1) * BLOCK, num_tokens) for index in range(-(-num_tokens // BLOCK))]
        table = request.block_table[: len(ends)]
        return all(
            self.block_holds(block, request.token_ids[:end], compression)
            for block, end in zip(table, ends, strict=True)
        )

    def block_holds(self, block: int, token_ids: Sequence[int], compression: str = "none") -> bool:
        content = pattern(token_ids, self.layout)
        return all(
            close(rank.values[block], content[:, :, rank.heads.start : rank.heads.stop], compression)
            for rank in self.ranks
        )

    @property
    def untouched(self) -> bool:
        return not any(rank.values.any() for rank in self.ranks)

    def memories(self, staged: bool) -> list[BlockMemory]:
        return [rank.memory(staged) for rank in self.ranks]


def close(found: NDArray[Any], exact: NDArray[Any], compression: str) -> bool:
    """Within what the wire's form loses of a row: half a step of int8, or half a bit of the three of fp8."""
    amax = np.abs(exact).max(-1, keepdims=True)
    if compression == "none":
        return bool((found == exact).all())
    if compression == "int8":
        return bool((np.abs(found - exact) <= amax / 127 * 0.501).all())
    return bool((np.abs(found - exact) <= np.maximum(np.abs(exact) / 16, amax / 448 / 512) * 1.001).all())


@dataclass
class DecodeSide:
    engine: PatternEngine
    channels: list[str]
    staged: bool = False
    io_timeout_s: float = 2.0
    epoch: int = 1
    worker_id: str = "d0"
    compression: str = "none"  # what the sender is told to do: only the check is another
    memories: list[Any] | None = None
    on_fetch: Callable[[KvFetch], str | None] = lambda fetch: "prefixes are not sent from here"
    on_end: Callable[[str], None] = lambda name: None
    committed: dict[str, bool] = field(default_factory=dict)  # request id -> its blocks were right
    lost: dict[str, str] = field(default_factory=dict)
    lost_reasons: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)  # in which they were committed or lost
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.tickets = Tickets(self.engine, self.worker_id, self.epoch, self._commit, self._lose)  # type: ignore[arg-type]
        self.receiver = Receiver(
            self.tickets,
            self.memories or self.engine.memories(self.staged),
            self.engine.layout,
            TransferConfig(channels=self.channels, io_timeout_s=self.io_timeout_s),
            secret=SECRET,
            on_fetch=self.on_fetch,
        )
        self.tickets.endpoints = self.receiver.endpoints
        self.tickets.ranks = len(self.engine.ranks)
        self.receiver.start(info(self.worker_id, self.epoch))
        self.tickets.start()

    def reserve(self, work: Work, lease_s: float = 5.0) -> Any:
        return self.tickets.open(Request(work), f"t-{work.request_id}", lease_s)

    def cancel(self, request_id: str) -> None:
        """As the worker does when its router says so."""
        with self.engine.lock:
            self.tickets.cancel(request_id)
            self.engine.scheduler.cancel(request_id)

    def _commit(self, arrival: Any) -> None:
        request = arrival.new.request
        name = request.request_id
        self.committed[name] = self.engine.holds(request, request.num_computed_tokens, self.compression)
        self.engine.scheduler.cancel(name)
        self._notify(name)

    def _lose(self, request: Request, code: str, reason: str) -> None:
        self.lost[request.request_id] = code
        self.lost_reasons[request.request_id] = reason
        self._notify(request.request_id)

    def _notify(self, name: str) -> None:
        with self.changed:
            self.order.append(name)
            self.changed.notify_all()
        self.on_end(name)

    def wait(self, *names: str, timeout_s: float = 30.0) -> None:
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
    tcp_streams: int = 2
    layer_groups: int = 1
    compression: str = "none"
    worker_id: str = "p0"
    memories: list[Any] | None = None
    on_end: Callable[[str], None] = lambda name: None
    ended: dict[str, str | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    roads: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = TransferConfig(
            channels=self.channels,
            io_timeout_s=self.io_timeout_s,
            ring_memory=self.ring_memory,
            lease_s=self.lease_s,
            tcp_streams=self.tcp_streams,
            layer_groups=self.layer_groups,
            compression=self.compression,
        )
        self.handoffs = Handoffs(
            self.engine,  # type: ignore[arg-type]
            self.memories or self.engine.memories(self.staged),
            config,
            worker_id=self.worker_id,
            secret=SECRET,
            on_end=self._end,
        )
        self.handoffs.start()

    def _end(self, request: Request, handoff: Any, code: str | None, reason: str) -> None:
        name = request.request_id
        self.ended[name] = code
        self.reasons[name] = reason
        self.roads[name] = handoff.road
        self.order.append(name)
        self.on_end(name)

    def accept(self, work: Work, ticket: Any) -> Request:
        request = Request(work, prefill_only=True)
        with self.engine.lock:
            self.handoffs.open(request, ticket)
            self.engine.scheduler.add(request)
        return request

    def cancel(self, request_id: str) -> None:
        with self.engine.lock:
            self.handoffs.cancel(request_id)
            self.engine.scheduler.cancel(request_id)

    def step(self) -> bool:
        with self.engine.lock:
            plan = self.engine.scheduler.schedule()
            self._layers_done = 0
            self.handoffs.begin(plan, lambda: self._layers_done)
        for layer in range(LAYOUT.num_layers):
            for item in plan.items:
                self.engine.write(item.request, item.start + item.count, layer)
            self._layers_done = layer + 1
            if plan.items and self.layer_groups > 1:
                time.sleep(0.002)  # so that the watcher sees it
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
        vocab_size=VOCABULARY,
        device="cpu",
        pid=0,
    )


def work(name: str, prompt: list[int]) -> Work:
    return Work(request_id=name, prompt=prompt, sampling=Sampling(max_tokens=8, seed=0))


def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def at_rest(*sides: DecodeSide | PrefillSide) -> None:
    """Nothing is held anywhere."""
    until(lambda: not any(unrest(side) for side in sides))
    for side in sides:
        with side.engine.lock:
            side.engine.pool.check()
            side.engine.scheduler.check()


def unrest(side: DecodeSide | PrefillSide) -> dict[str, int]:
    """What is held: by name, how many."""
    with side.engine.lock:
        found = {
            "requests": len(side.engine.scheduler.requests),
            "referenced blocks": side.engine.pool.num_referenced,
        }
        if isinstance(side, DecodeSide):
            found |= {"tickets": len(side.tickets), "writing": len(side.tickets.writing)}
        else:
            found |= {"handoffs": len(side.handoffs), "holding": len(side.handoffs.holding)}
    return {name: count for name, count in found.items() if count}


def belongings() -> Counter[str]:
    """What this process has of what a hand-over makes: threads by kind, descriptors of sockets and of memory."""
    found: Counter[str] = Counter()
    for thread in threading.enumerate():
        if thread.name.startswith(("kv-", "lease-")):
            found["-".join(thread.name.split("-")[:2])] += 1
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue
        if target.startswith("socket:"):
            found["sockets"] += 1
        elif "memfd:headrace-kv" in target:
            found["memory"] += 1
    return found
