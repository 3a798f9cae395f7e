"""Bytes between workers: hand-overs of computed blocks, and prefixes that are fetched.

Each worker sends and receives one thing after the other, at the rate of the pair: within a node at one rate, between
nodes at another. Blocks leave as soon as the chunk that completes them is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.simulate.timeline import Timeline
from bench.simulate.worker import ROOT, Seq, Worker
from workers.protocol.messages import PeerStatus

_LOAD_DEADLINE_S = 2.0  # as PrefixLoader's: then the request goes on without


@dataclass(frozen=True)
class Wires:
    bytes_per_s: float = 25e9  # between nodes: 200 Gbit/s
    node_bytes_per_s: float = 200e9  # within a node
    workers_per_node: int = 1  # consecutive workers share one
    latency_s: float = 20e-6
    message_s: float = 200e-6  # a frame from router to worker or back

    def __post_init__(self) -> None:
        for name in ("bytes_per_s", "node_bytes_per_s", "workers_per_node"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("latency_s", "message_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 0 or more")


class Network:
    def __init__(self, timeline: Timeline, wires: Wires, places: dict[str, int]) -> None:
        """`places`: worker -> its number among all workers."""
        self.wires = wires
        self.num_bytes = 0.0
        self._timeline = timeline
        self._places = places
        self._sending_until: dict[str, float] = {}
        self._receiving_until: dict[str, float] = {}

    def host(self, worker_id: str) -> str:
        return f"node{self._places[worker_id] // self.wires.workers_per_node}"

    def rate(self, source: str, target: str) -> float:
        same = self.host(source) == self.host(target)
        return self.wires.node_bytes_per_s if same else self.wires.bytes_per_s

    def send(
        self, source: str, target: str, num_bytes: float, action: Callable[..., None], *arguments: Any
    ) -> None:
        """`action` is called when the last byte has arrived."""
        begin = max(
            self._timeline.now, self._sending_until.get(source, 0.0), self._receiving_until.get(target, 0.0)
        )
        end = begin + num_bytes / self.rate(source, target)
        self._sending_until[source] = self._receiving_until[target] = end
        self.num_bytes += num_bytes
        self._timeline.at(end + self.wires.latency_s, action, *arguments)


class HandOver:
    """The blocks of one prompt from P to D, chunk by chunk; then D goes on with it."""

    def __init__(
        self,
        network: Network,
        prefill: Worker,
        read: Seq,
        decode: Worker,
        reserved: Seq,
        first_block: int,
        on_done: Callable[[], None],
    ) -> None:
        """`on_done`: D has everything, P is free of it."""
        self._network = network
        self._prefill, self._read = prefill, read
        self._decode, self._reserved = decode, reserved
        self._sent = first_block
        self._on_done = on_done
        read.on_computed = self._computed

    def _computed(self, read: Seq) -> None:
        size = self._prefill.limits.block_size
        last = read.state == "prefilled"
        blocks = len(read.table) if last else read.computed // size
        count = max(blocks - self._sent, 0)
        if not count and not last:
            return
        self._sent += count
        num_bytes = count * size * self._prefill.cost.kv_token_bytes
        arrived = self._arrived if last else self._ignore
        source, target = self._prefill, self._decode.worker_id
        self._network.send(source.worker_id, target, num_bytes, arrived)
        if target not in source.peers:
            rate = self._network.rate(source.worker_id, target)
            source.peers[target] = PeerStatus("simulated", 1, 0, rate)

    @staticmethod
    def _ignore() -> None:
        """What was sent in order has arrived when the last of it has."""

    def _arrived(self) -> None:
        if self._prefill.alive:
            self._prefill.cancel(self._read)
        if self._decode.alive and self._reserved.state == "reserved":
            self._decode.commit(self._reserved)
            self._on_done()


def fetch(
    network: Network, timeline: Timeline, worker: Worker, seq: Seq, holder: Worker, then: Callable[[], None]
) -> bool:
    """Bring the rest of a prefix from another worker (workers/prefix_loader.py). False: not worth it, go on at once.

    `then` is called once, when the blocks are there or the deadline is past.
    """
    size = worker.limits.block_size
    usable = seq.hashes[: (seq.known - 1) // size]
    matched = worker.pool.match(usable)
    source = holder.pool.match(usable)[len(matched) :]
    block_bytes = size * worker.cost.kv_token_bytes
    load_s = block_bytes / network.rate(holder.worker_id, worker.worker_id)
    compute_s = size * worker.cost.token_s(worker.limits.max_num_batched_tokens)
    if not source or load_s >= compute_s:
        return False
    worker.sync()
    missing = -(-seq.known // size) - len(matched)
    wanted = sum(-(-other.known // size) for other in worker.waiting)
    if missing + wanted > worker.pool.num_available(matched):
        return False
    worker.pool.acquire(matched)
    fresh = worker.pool.allocate(len(source))
    assert fresh is not None
    table = matched + fresh
    worker.fills.append(table)
    holder.pool.acquire(source)
    holder.fills.append(source)
    waits = [then]

    def go_on() -> None:
        if waits:
            waits.pop()()

    def arrived() -> None:
        if holder.alive:
            holder.fills.remove(source)
            holder.pool.release(source)
        if not worker.alive:
            return
        if holder.alive:
            for at in range(len(matched), len(table)):
                worker.pool.store(table[at], usable[at], usable[at - 1] if at else ROOT)
            if waits:
                seq.fetched_tokens = len(fresh) * size
        worker.fills.remove(table)
        worker.pool.release(table)
        worker.cache_changed()
        go_on()

    network.send(holder.worker_id, worker.worker_id, len(source) * block_bytes, arrived)
    timeline.after(_LOAD_DEADLINE_S, go_on)
    return True
