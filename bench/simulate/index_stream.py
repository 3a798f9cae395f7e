"""What a worker's publisher and the index stream do to the news of its cache: gather, number, delay, lose."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from bench.simulate.timeline import Timeline
from bench.simulate.worker import Worker
from workers.protocol.messages import IndexBatch
from workers.protocol.tiers import DEVICE, Removed

_HASHES_PER_BATCH = 1024
_GATHER_S = 0.005


class Reader(Protocol):
    """A router replica."""

    def index_batch(self, batch: IndexBatch) -> None: ...

    def index_lost(self, worker_id: str, epoch: int, seq: int) -> None:
        """A batch that never comes: the poll of the registry will show its number."""


@dataclass(frozen=True)
class StreamConfig:
    delay_s: float = 0.002  # from the worker to a router's index, besides the gathering
    loss: float = 0.0  # share of batches that never reach a router

    def __post_init__(self) -> None:
        if not self.delay_s >= 0:
            raise ValueError(f"delay_s is {self.delay_s}: it must be 0 or more")
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss is {self.loss}: it must be at least 0 and below 1")


class Publisher:
    """Of one life of one worker."""

    def __init__(
        self,
        worker: Worker,
        timeline: Timeline,
        config: StreamConfig,
        readers: Sequence[Reader],
        rng: random.Random,
        redis_is_there: Callable[[], bool],
    ) -> None:
        self.seq = 0
        self.worker = worker
        self._timeline = timeline
        self._config = config
        self._readers = readers
        self._rng = rng
        self._redis_is_there = redis_is_there
        self._pending = False
        self.num_batches = 0

    def changed(self) -> None:
        if not self._pending:
            self._pending = True
            self._timeline.after(_GATHER_S, self._gathered)

    def _gathered(self) -> None:
        self._pending = False
        if self.worker.alive:
            self.flush()

    def flush(self) -> None:
        """Publish what has changed. Redis away: it stays with the worker."""
        if not self._redis_is_there():
            return
        events = self.worker.pool.drain_events()
        if events is None:
            return
        stored = [(block_hash, parent, DEVICE) for block_hash, parent in events.stored]
        removed = [(block_hash, DEVICE) for block_hash in events.removed]
        gone, come = iter(removed), iter(stored)
        while True:
            # Nothing is in two batches; removed ones go first.
            first = list(islice(gone, _HASHES_PER_BATCH))
            then = list(islice(come, _HASHES_PER_BATCH - len(first)))
            if not first and not then:
                return
            self._send(then, first)

    def republish(self) -> None:
        """Redis is back, and empty: everything anew."""
        self.worker.pool.drain_events()
        self.seq += 1
        self._deliver(IndexBatch(self.worker.worker_id, self.worker.epoch, self.seq, cleared=True))
        held = iter([(h, parent, DEVICE) for h, parent in self.worker.pool.cached_hashes()])
        while chunk := list(islice(held, _HASHES_PER_BATCH)):
            self._send(chunk, [])

    def snapshot(self) -> tuple[int, list[Removed]]:
        """What Redis holds of this worker: its hashes as of the last batch."""
        self.flush()
        return self.seq, [(block_hash, DEVICE) for block_hash, _ in self.worker.pool.cached_hashes()]

    def _send(self, stored: list[tuple[bytes, bytes, str]], removed: list[Removed]) -> None:
        self.seq += 1
        worker = self.worker
        self._deliver(IndexBatch(worker.worker_id, worker.epoch, self.seq, stored, removed))

    def _deliver(self, batch: IndexBatch) -> None:
        self.num_batches += 1
        for reader in self._readers:
            if self._config.loss and self._rng.random() < self._config.loss:
                reader.index_lost(batch.worker_id, batch.epoch, batch.seq)
            else:
                self._timeline.after(self._config.delay_s, reader.index_batch, batch)
