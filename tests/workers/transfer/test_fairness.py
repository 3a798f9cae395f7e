"""Who shares a way takes turns: told by the order in which transfers end, never by time."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from tests.workers.transfer.pair import LAYOUT, DecodeSide, PatternEngine, PrefillSide, at_rest, until, work

pytestmark = pytest.mark.usefixtures("nothing_leaks")

TWO_BLOCKS = 4 * LAYOUT.block_bytes  # a ring in which a piece has two


class Gate:
    """A cache that takes a piece only when it is let."""

    def __init__(self, engine: PatternEngine) -> None:
        (self._memory,) = engine.memories(staged=False)
        self.device, self.shared = self._memory.device, self._memory.shared
        self.open = threading.Event()

    def pull(self, *piece: Any) -> None:
        assert self.open.wait(30)
        self._memory.pull(*piece)


def gated(ring: int = TWO_BLOCKS) -> tuple[Gate, DecodeSide, PrefillSide]:
    engine = PatternEngine(256)
    gate = Gate(engine)
    d = DecodeSide(engine, ["shm"], memories=[gate], io_timeout_s=10)
    p = PrefillSide(PatternEngine(256), ["shm"], ring_memory=ring, io_timeout_s=10)
    return gate, d, p


def test_a_small_one_overtakes_a_huge_one_before_it() -> None:
    gate, d, p = gated()
    for name, length in [("huge", 800), ("small", 3)]:
        w = work(name, [length] * length)
        p.accept(w, d.reserve(w))
        p.run()
    gate.open.set()
    d.wait("huge", "small")
    assert d.order == ["small", "huge"]
    assert all(d.committed.values())
    at_rest(d, p)
    p.stop()
    d.stop()


def test_of_equals_nobody_ends_long_before_the_others() -> None:
    """Six transfers of many pieces: when the first ends, each of the others has sent nearly as much."""
    gate, d, p = gated()
    names = [f"w{i}" for i in range(6)]
    for i, name in enumerate(names):
        w = work(name, [i] * 160)  # 40 blocks, 20 pieces
        p.accept(w, d.reserve(w))
    p.run()
    left: dict[str, int] = {}
    told = d.tickets._on_commit

    def first_ends(arrival: Any) -> None:
        if not left:
            left.update({name: int(opened.num_bytes) for name, opened in d.tickets._open.items()})
        told(arrival)

    d.tickets._on_commit = first_ends
    gate.open.set()
    d.wait(*names)
    least = min(left.values())
    assert least >= 40 * LAYOUT.block_bytes * 0.7, left
    at_rest(d, p)
    p.stop()
    d.stop()


def test_one_sender_and_a_receiver_that_stalls_among_many() -> None:
    """Ways are apart: all others end while one receiver takes nothing."""
    p = PrefillSide(PatternEngine(256), ["shm"], io_timeout_s=10, ring_memory=TWO_BLOCKS)
    engine = PatternEngine(64)
    gate = Gate(engine)
    stalled = DecodeSide(engine, ["shm"], memories=[gate], worker_id="d-stalled", io_timeout_s=10)
    others = [DecodeSide(PatternEngine(64), ["shm"], worker_id=f"d{i}") for i in range(5)]
    for d in (stalled, *others):
        w = work(f"to {d.worker_id}", [ord(d.worker_id[1])] * 100)
        p.accept(w, d.reserve(w, lease_s=20))
    p.run()
    for d in others:
        d.wait(f"to {d.worker_id}")
        assert all(d.committed.values())
    assert stalled.committed == {}
    until(lambda: p.ended == {f"to {d.worker_id}": None for d in others})
    gate.open.set()
    stalled.wait("to d-stalled")
    assert all(stalled.committed.values())
    at_rest(p, stalled, *others)
    p.stop()
    for d in (stalled, *others):
        d.stop()


def test_many_senders_and_one_receiver() -> None:
    """Each has a way of its own: a sender of very much keeps none of the others."""
    engine = PatternEngine(512)

    class Slow(Gate):
        def pull(self, *piece: Any) -> None:
            super().pull(*piece)
            time.sleep(0.002)

    gate = Slow(engine)
    d = DecodeSide(engine, ["shm"], memories=[gate], io_timeout_s=10)
    senders = [
        PrefillSide(PatternEngine(256), ["shm"], worker_id=f"p{i}", ring_memory=TWO_BLOCKS, io_timeout_s=10)
        for i in range(6)
    ]
    lengths = [800, 40, 40, 40, 40, 40]
    works = [work(f"of p{i}", [i] * length) for i, length in enumerate(lengths)]
    for p, w in zip(senders, works, strict=True):
        p.accept(w, d.reserve(w))
        p.run()
    gate.open.set()  # all have begun
    d.wait(*(w.request_id for w in works))
    assert all(d.committed.values())
    assert d.order[-1] == "of p0"
    at_rest(d, *senders)
    for p in senders:
        p.stop()
    d.stop()


def test_what_was_cancelled_takes_no_more_turns() -> None:
    gate, d, p = gated()
    for name, length in [("huge", 800), ("next", 40)]:
        w = work(name, [length] * length)
        p.accept(w, d.reserve(w))
        p.run()
    until(lambda: d.tickets.writing)
    p.cancel("huge")
    d.cancel("huge")
    assert len(p.handoffs.holding) <= 3, "only what was sent, and the next one's"
    gate.open.set()
    d.wait("next")
    (peer,) = p.handoffs.peers().values()
    at_rest(d, p)
    assert peer.sent_bytes < 40 * LAYOUT.block_bytes
    assert d.committed == {"next": True}
    p.stop()
    d.stop()
