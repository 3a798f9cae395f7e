"""A prefix that another worker holds: asked for, sent, counted; right bytes or none, and nothing held afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.workers.transfer.pair import (
    BLOCK,
    LAYOUT,
    DecodeSide,
    PatternEngine,
    PrefillSide,
    at_rest,
    until,
    work,
)
from workers.engine.request import Request
from workers.protocol.messages import FailureCode, KvFetch, KvFirstToken, KvPrefix, PrefixHolder, Ticket
from workers.transfer.remote_prefix import RemotePrefix

pytestmark = pytest.mark.usefixtures("nothing_leaks")

PROMPT = [3 * i for i in range(41)]  # ten whole blocks, and a token more


class Worker:
    """One that sends and receives."""

    def __init__(
        self, worker_id: str, channels: list[str], ranks: int = 1, staged: bool = False, **options: Any
    ) -> None:
        self.engine = PatternEngine(64, ranks)
        self.out = PrefillSide(self.engine, channels, worker_id=worker_id, staged=staged, **options)
        self.into = DecodeSide(
            self.engine, channels, worker_id=worker_id, staged=staged, on_fetch=self.out.handoffs.send_prefix
        )

    @property
    def holder(self) -> PrefixHolder:
        return PrefixHolder(
            worker_id=self.into.worker_id,
            epoch=1,
            num_blocks=10,
            endpoints=self.into.receiver.endpoints,
            ranks=len(self.engine.ranks),
        )

    def hold(self, num_blocks: int, *, gap: int | None = None) -> list[bytes]:
        """The first blocks of PROMPT become a cached prefix; the hashes of all ten."""
        request = Request(work("p", PROMPT))
        self.engine.scheduler._hash(request)
        hashes = request.block_hashes
        with self.engine.lock:
            blocks = self.engine.pool.allocate(num_blocks)
            assert blocks is not None
            for index, block in enumerate(blocks):
                self.engine.write_block(block, PROMPT[: (index + 1) * BLOCK])
                if index != gap:
                    self.engine.pool.store(block, hashes[index], hashes[index - 1] if index else b"root")
            self.engine.pool.release(blocks)
        return hashes

    def stop(self) -> None:
        self.out.stop()
        self.into.stop()


@dataclass
class Wanted:
    """A Landing for as many fresh blocks as there are hashes."""

    worker: Worker
    hashes: list[bytes]
    blocks_held: list[int] = field(default_factory=list)
    answers: list[tuple[bool, str]] = field(default_factory=list)
    count: int | None = None
    lost: str = ""
    ended: threading.Event = field(default_factory=threading.Event)

    def ask(self, holder: PrefixHolder, lease_s: float = 5.0, name: str = "f") -> Ticket:
        with self.worker.engine.lock:
            self.blocks_held = self.worker.engine.pool.allocate(len(self.hashes)) or []
            for block in self.blocks_held:
                self.worker.engine.write_block(block, [9, 9, 9])
            ticket = self.worker.into.tickets.expect(name, self, 0, len(self.hashes), lease_s)
        self.worker.out.handoffs.ask(holder, KvFetch(name, ticket, self.hashes), self.answered)
        return ticket

    def blocks(self, first: int, count: int) -> list[int]:
        return self.blocks_held[first : first + count]

    def land(self, message: KvFirstToken | KvPrefix, opened: float, num_bytes: int) -> None:
        assert isinstance(message, KvPrefix)
        self.count = message.count
        assert num_bytes == message.count * LAYOUT.block_bytes
        self.ended.set()

    def lose(self, code: FailureCode, reason: str) -> None:
        self.lost = f"{code}: {reason}"
        self.ended.set()

    def answered(self, ok: bool, reason: str) -> None:
        self.answers.append((ok, reason))

    def right(self) -> list[bool]:
        return [
            self.worker.engine.block_holds(block, PROMPT[: (index + 1) * BLOCK])
            for index, block in enumerate(self.blocks_held)
        ]

    def done(self) -> None:
        with self.worker.engine.lock:
            self.worker.engine.pool.release(self.blocks_held)


@pytest.fixture(params=["shm", "shm-staged", "tcp", "1 to 2", "4 to 2"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Worker, Worker]]:
    """(holder, the one that asks)"""
    name = request.param
    if "to" in name:
        of, to = (int(part) for part in name.split(" to "))
        holder, asks = Worker("h", ["shm"], of), Worker("a", ["shm"], to)
    else:
        road, _, staged = name.partition("-")
        holder, asks = (Worker(i, [road], staged=bool(staged), ring_memory=8192) for i in ("h", "a"))
    yield holder, asks
    holder.stop()
    asks.stop()


Pair = tuple[Worker, Worker]


def rest(*workers: Worker) -> None:
    for worker in workers:
        at_rest(worker.into, worker.out)


@pytest.mark.parametrize("held", [1, 7, 10])
def test_as_much_as_is_held_without_a_gap(pair: Pair, held: int) -> None:
    holder, asks = pair
    wanted = Wanted(asks, holder.hold(held))
    wanted.ask(holder.holder)
    assert wanted.ended.wait(20)
    assert wanted.count == held
    assert wanted.right() == [True] * held + [False] * (10 - held)
    until(lambda: wanted.answers == [(True, "")])
    wanted.done()
    rest(holder, asks)


def test_what_lies_behind_a_gap_is_not_sent(pair: Pair) -> None:
    holder, asks = pair
    wanted = Wanted(asks, holder.hold(8, gap=3))
    wanted.ask(holder.holder)
    assert wanted.ended.wait(20)
    assert wanted.count == 3
    assert wanted.right() == [True] * 3 + [False] * 7
    wanted.done()
    rest(holder, asks)


def test_a_worker_that_holds_nothing_says_so(pair: Pair) -> None:
    holder, asks = pair
    hashes = holder.hold(3)
    wanted = Wanted(asks, [bytes(16), *hashes[1:]])
    wanted.ask(holder.holder)
    until(lambda: wanted.answers)
    assert wanted.answers == [(False, "none of these blocks is held here")]
    assert len(asks.into.tickets) == 1, "whoever asked takes it back"
    asks.into.tickets.withdraw("f")
    asks.into.tickets.withdraw("f")
    assert not wanted.ended.is_set(), "a landing that is withdrawn hears nothing"
    wanted.done()
    rest(holder, asks)


def test_withdrawn_while_it_comes(pair: Pair) -> None:
    """At every moment of the way. The blocks are given away at once, and what is written there next stays."""
    holder, asks = pair
    hashes = holder.hold(10)
    counts = []
    for i in range(30):
        wanted = Wanted(asks, hashes)
        wanted.ask(holder.holder, name=f"f{i}")
        time.sleep(0.0002 * i)
        asks.into.tickets.withdraw(f"f{i}")
        counts.append(wanted.count)
        wanted.done()
        until(lambda: not asks.into.tickets.writing)
        with asks.engine.lock:
            mine = asks.engine.pool.allocate(64)
            assert mine, "nobody holds a block any more"
            for block in mine:
                asks.engine.write_block(block, [5])
        time.sleep(0.001)
        with asks.engine.lock:
            assert all(asks.engine.block_holds(block, [5]) for block in mine)
            asks.engine.pool.release(mine)
    assert set(counts) <= {None, 10}
    assert None in counts
    rest(holder, asks)


def test_the_holder_stops_under_way(pair: Pair) -> None:
    holder, asks = pair
    hashes = holder.hold(10)
    outcomes = set()
    for i in range(6):
        dying = Worker(f"dying{i}", holder.out.channels, len(holder.engine.ranks))
        dying.hold(10)
        wanted = Wanted(asks, hashes)
        wanted.ask(dying.holder, lease_s=0.15)
        time.sleep(0.003 * i)
        dying.stop()
        assert wanted.ended.wait(20)
        assert wanted.count == 10 or wanted.lost
        if wanted.count == 10:
            assert all(wanted.right())
        until(lambda answers=wanted.answers: len(answers) == 1)
        outcomes.add(wanted.count)
        wanted.done()
        rest(dying)
    assert outcomes <= {None, 10}
    rest(holder, asks)


def test_the_lease_of_the_one_who_asks_ends(pair: Pair) -> None:
    """The holder is stuck in the middle: nothing comes, and it does not say that it is alive."""
    holder, asks = pair
    hashes = holder.hold(10)
    holder.out.handoffs._stopping.set()  # renews no leases, and opens nothing new
    wanted = Wanted(asks, hashes)
    wanted.ask(holder.holder, lease_s=0.2)
    assert wanted.ended.wait(20)
    assert wanted.lost.startswith("lease_expired")
    assert wanted.count is None
    wanted.done()
    rest(holder, asks)


def test_the_same_prefix_is_asked_for_by_many(pair: Pair) -> None:
    holder, asks = pair
    hashes = holder.hold(10)
    many = [Wanted(asks, hashes[:5]) for _ in range(8)]
    for i, wanted in enumerate(many):
        wanted.ask(holder.holder, name=f"f{i}")
    for wanted in many:
        assert wanted.ended.wait(20)
        assert wanted.count == 5
        assert all(wanted.right())
        wanted.done()
    rest(holder, asks)


def test_a_prefix_that_is_being_sent_is_not_evicted(pair: Pair) -> None:
    holder, asks = pair
    hashes = holder.hold(10)
    wanted = Wanted(asks, hashes)
    wanted.ask(holder.holder)
    until(lambda: holder.out.handoffs.holding or wanted.ended.is_set())
    while not wanted.ended.is_set():
        with holder.engine.lock:
            rest_of_it = holder.engine.pool.allocate(holder.engine.pool.num_free) or []
            for block in rest_of_it[:3]:
                holder.engine.write_block(block, [7])
            holder.engine.pool.release(rest_of_it)
    assert wanted.count == 10
    assert all(wanted.right())
    wanted.done()
    rest(holder, asks)


@pytest.mark.parametrize("held", [0, 6, 10])
def test_as_a_source_of_prefixes(pair: Pair, held: int) -> None:
    holder, asks = pair
    if held:
        holder.hold(held)
    request = Request(work("r", PROMPT))
    with asks.engine.lock:
        asks.engine.scheduler._hash(request)
        hashes = request.block_hashes[:10]
        blocks = asks.engine.pool.allocate(10)
    assert blocks is not None
    source: Any = RemotePrefix(request, holder.holder, BLOCK, asks.into.tickets, asks.out.handoffs)
    assert source.count(hashes) == 10
    assert source.read(hashes, blocks, lambda: True) == held
    good: Sequence[bool] = [
        asks.engine.block_holds(block, PROMPT[: (i + 1) * BLOCK]) for i, block in enumerate(blocks)
    ]
    assert good == [True] * held + [False] * (10 - held)
    assert source.read(hashes, blocks, lambda: False) in (0, held), "given up"
    with asks.engine.lock:
        asks.engine.pool.release(blocks)
    rest(holder, asks)
