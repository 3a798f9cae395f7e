"""The index against plain sets, through a log that loses, repeats and reorders, a Redis that is flushed, and restarts.

The oracle keeps what each worker held after each of its batches. Whatever has come through so far, the index must hold
exactly what the worker held at the position that the index names; and everything once the rest is read.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from router.prefix_index import CachedPrefix, PrefixIndex, SnapshotLoad
from workers.protocol.messages import IndexBatch
from workers.protocol.tiers import DEVICE, DISK, HOST, TIERS, Removed

NUM_BLOCKS = 60  # different ones; a chain is 0, 1, 2, ...
PIECES = 4  # in which a snapshot is read


def h(number: int) -> bytes:
    return (number * 0x9E3779B97F4A7C15 % 2**64).to_bytes(16, "little")


@dataclass
class Worker:
    """One life, its cache, and what Redis and the log make of it."""

    name: str
    epoch: int
    held: set[tuple[int, str]] = field(default_factory=set)
    seq: int = 0
    in_redis: bool = True
    history: dict[int, frozenset[Removed]] = field(default_factory=dict)

    def members(self) -> list[Removed]:
        return [(h(number), tier) for number, tier in self.held]

    def batch(self, put: set[tuple[int, str]], take: set[tuple[int, str]], cleared: bool) -> IndexBatch:
        if cleared:
            self.held = set()
        self.held = (self.held - take) | put
        self.seq += 1
        self.history[self.seq] = frozenset(self.members())
        self.history.pop(self.seq - 1000, None)
        return IndexBatch(
            self.name,
            self.epoch,
            self.seq,
            [(h(number), h(number - 1), tier) for number, tier in put],
            [(h(number), tier) for number, tier in take],
            cleared,
        )


class Storm:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.index = PrefixIndex()
        self.workers: dict[str, Worker] = {}
        self.log: list[IndexBatch] = []
        self.loads: dict[str, tuple[Worker, SnapshotLoad, int]] = {}

    # --- what happens ------------------------------------------------------------------------------------------------

    def event(self) -> None:
        kind = self.rng.random()
        if not self.workers or kind < 0.01:
            self.restart(f"w{self.rng.randrange(6)}")
        elif kind < 0.015:
            worker = self.rng.choice(list(self.workers.values()))
            del self.workers[worker.name]
            self.loads.pop(worker.name, None)
            self.index.drop(worker.name)
        elif kind < 0.02:
            self.flush()
        elif kind < 0.6:
            self.change(self.rng.choice(list(self.workers.values())))
        elif kind < 0.65:
            self.guess(self.rng.choice(list(self.workers.values())))
        elif kind < 0.7:
            self.begin(self.rng.choice(list(self.workers)))
        elif kind < 0.8:
            self.read_a_piece()
        else:
            self.deliver()
        if self.rng.random() < 0.05:
            self.index.tidy(self.rng.randrange(1, 50))

    def restart(self, name: str) -> None:
        before = self.workers.get(name)
        self.workers[name] = Worker(name, before.epoch + 1 if before else self.rng.randrange(1, 10**6))
        self.workers[name].history[0] = frozenset()
        if self.rng.random() < 0.5:
            self.begin(name)

    def flush(self) -> None:
        """Snapshots and log are gone, and each worker publishes everything anew."""
        self.log = [batch for batch in self.log if self.rng.random() < 0.5]  # read before the flush
        for worker in self.workers.values():
            worker.in_redis = False

    def change(self, worker: Worker) -> None:
        if not worker.in_redis:
            worker.in_redis = True
            held = set(worker.held)
            self.send(worker.batch(set(), set(), True))
            self.send(worker.batch(held, set(), False))
            return

        def some() -> set[tuple[int, str]]:
            count = self.rng.randrange(6)
            return {(self.rng.randrange(NUM_BLOCKS), self.rng.choice(TIERS)) for _ in range(count)}

        begin = self.rng.randrange(NUM_BLOCKS)
        prefix = {(number, DEVICE) for number in range(begin)} if self.rng.random() < 0.2 else set()
        self.send(worker.batch(some() | prefix, some(), self.rng.random() < 0.02))

    def send(self, batch: IndexBatch) -> None:
        fate = self.rng.random()
        if fate > 0.05:
            self.log.append(batch)
        if fate > 0.9:
            self.log.append(batch)
        if fate > 0.95:
            self.log.insert(self.rng.randrange(len(self.log)), self.log.pop())

    def guess(self, worker: Worker) -> None:
        begin = self.rng.randrange(NUM_BLOCKS)
        self.index.note_routed(
            worker.name, worker.epoch, [h(n) for n in range(begin, NUM_BLOCKS)], capacity=10
        )
        assert self.index.num_guesses(worker.name) <= 10

    # --- what the feed does ------------------------------------------------------------------------------------------

    def begin(self, name: str) -> None:
        worker = self.workers[name]
        if worker.in_redis:
            if self.rng.random() < 0.3:
                self.index.load_snapshot(name, worker.epoch, worker.seq, worker.members())
            else:
                self.loads[name] = (worker, self.index.begin_snapshot(name, worker.epoch), 0)

    def read_a_piece(self) -> None:
        if not self.loads:
            return
        name = self.rng.choice(list(self.loads))
        worker, load, piece = self.loads[name]  # maybe of a life that is over
        if not worker.in_redis:  # what is read is of no use
            load.abandon()
            del self.loads[name]
            return
        if piece < PIECES:  # each is of its own moment
            load.add(worker.seq, [(h(n), tier) for n, tier in worker.held if n % PIECES == piece])
            self.loads[name] = (worker, load, piece + 1)
            return
        del self.loads[name]
        if self.rng.random() < 0.7:
            self.deliver_all_of(name)
        load.finish()  # exact, or refused because a batch is missing: `check` tells
        assert load.over

    def deliver_all_of(self, name: str) -> None:
        mine = [batch for batch in self.log if batch.worker_id == name]
        self.log = [batch for batch in self.log if batch.worker_id != name]
        for batch in sorted(mine, key=lambda batch: (batch.epoch, batch.seq)):
            self.index.apply(batch)

    def deliver(self) -> None:
        for _ in range(min(len(self.log), self.rng.randrange(6))):
            batch = self.log.pop(0)
            worker = self.workers.get(batch.worker_id)
            if self.index.apply(batch) and worker is not None and self.rng.random() < 0.6:
                self.begin(batch.worker_id)

    # --- what must be so ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        held: dict[str, dict[bytes, str]] = {}
        for name, worker in self.workers.items():
            position = self.index.position(name, worker.epoch)
            if position is None:
                continue
            seen = {(x, tier) for tier in TIERS for x in self.index.hashes(name, tier)}
            if position in worker.history:
                assert seen == worker.history[position], (name, position)
            assert self.index.num_blocks(name) - self.index.num_guesses(name) == len(
                {block_hash for block_hash, _ in seen}
            )
            held[name] = {}
            for tier in (DISK, HOST, DEVICE):
                held[name] |= dict.fromkeys((x for x, where in seen if where == tier), tier)
        begin = self.rng.randrange(NUM_BLOCKS)
        chain = [h(number) for number in range(begin, NUM_BLOCKS)]
        found = self.index.match(chain)
        for name, blocks in held.items():
            if self.index.num_guesses(name):
                continue
            best = []
            for block_hash in chain:
                if block_hash not in blocks:
                    break
                best.append(blocks[block_hash])
            expected = CachedPrefix(len(best), best.count(HOST), best.count(DISK)) if best else None
            assert found.get(name) == expected

    def settle(self) -> None:
        """As discovery does when the numbers in Redis are ahead of the index."""
        for _, load, _ in self.loads.values():
            load.abandon()
        self.loads.clear()
        for name in self.index.workers():
            if name not in self.workers:
                self.index.drop(name)
        for name, worker in self.workers.items():
            self.deliver_all_of(name)
            self.index.load_snapshot(name, worker.epoch, worker.seq, worker.members())
        while self.index.tidy():
            pass
        self.check()
        for name, worker in self.workers.items():
            assert self.index.hashes(name) == {h(number) for number, _ in worker.held}
        everything = {h(number) for worker in self.workers.values() for number, _ in worker.held}
        assert len(self.index) == len(everything)


def run(seed: int, events: int) -> None:
    storm = Storm(seed)
    for number in range(events):
        storm.event()
        if number % 10 == 0:
            storm.check()
        if number % 2000 == 1999:
            storm.settle()
    storm.settle()
    for name in list(storm.workers):
        storm.index.drop(name)
    while storm.index.tidy():
        pass
    assert len(storm.index) == storm.index._table.num_sets == 0
    assert storm.index._table.num_slots < 64, "slots are used again"


@pytest.mark.parametrize("seed", range(5))
def test_the_index_is_what_the_workers_hold(seed: int) -> None:
    run(seed, 1000)


@pytest.mark.slow
def test_the_index_is_what_the_workers_hold_after_a_hundred_thousand_events() -> None:
    run(99, 100_000)
