"""Hand-over between two sides: right bytes, nothing held at rest, every fault ends aloud."""

from __future__ import annotations

import contextlib
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.workers.transfer.pair import (
    LAYOUT,
    SECRET,
    DecodeSide,
    PatternEngine,
    PrefillSide,
    at_rest,
    until,
    work,
)
from workers.protocol.frames import (
    MAX_FRAME_BYTES,
    ProtocolError,
    encode,
    greet,
    kv_to_sender,
    recv_frame,
    send_frame,
)
from workers.protocol.messages import KvBlocks, KvEndpoint, KvFirstToken, KvOpen, Ticket

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.fixture(params=["shm", "shm-staged", "tcp", "tcp-staged"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[DecodeSide, PrefillSide]]:
    channel, _, staged = request.param.partition("-")
    d = DecodeSide(PatternEngine(64), [channel], staged=bool(staged))
    p = PrefillSide(PatternEngine(64), [channel], staged=bool(staged))
    yield d, p
    p.stop()
    d.stop()


Pair = tuple[DecodeSide, PrefillSide]


def test_blocks_arrive_as_they_were(pair: Pair) -> None:
    d, p = pair
    for name, length in [("short", 1), ("exact", 8), ("long", 150)]:
        w = work(name, list(range(length)))
        p.accept(w, d.reserve(w))
        p.run()
        d.wait(name)
        assert d.committed[name]
    at_rest(d, p)
    assert p.ended == {"short": None, "exact": None, "long": None}
    assert set(p.roads.values()) == set(d.channels)


def test_blocks_that_d_has_are_not_sent(pair: Pair) -> None:
    d, p = pair
    prompt = list(range(40))
    for name, tail in [("a", [1, 1, 1]), ("b", [2, 2, 2, 2, 2])]:
        w = work(name, prompt + tail)
        ticket = d.reserve(w)
        assert ticket.first_block == (0 if name == "a" else 10)
        p.accept(w, ticket)
        p.run()
        d.wait(name)
        assert d.committed[name]
    at_rest(d, p)


def test_preemption_on_the_prefill_side_sends_right_bytes(pair: Pair) -> None:
    d, _ = pair
    p = PrefillSide(PatternEngine(14), d.channels)
    p.engine.scheduler.max_num_batched_tokens = 8
    works = [work(f"w{i}", [i] * 30) for i in range(6)]
    for w in works:
        p.accept(w, d.reserve(w))
    end = time.monotonic() + 20
    while len(p.ended) < len(works) and time.monotonic() < end:
        if not p.step():
            time.sleep(0.001)
    d.wait(*(w.request_id for w in works))
    assert all(d.committed[w.request_id] for w in works)
    at_rest(d, p)
    p.stop()


def test_lease_expires_without_progress_and_a_late_transfer_is_dropped(pair: Pair) -> None:
    d, p = pair
    w = work("late", list(range(20)))
    ticket = d.reserve(w, lease_s=0.2)
    d.wait("late")
    assert d.lost["late"] == "lease_expired"
    assert d.engine.pool.num_referenced == 0
    p.accept(w, ticket)
    p.run()
    until(lambda: "late" in p.ended)
    assert p.ended["late"] == "transfer_failed"
    assert "no ticket" in p.reasons["late"]
    w = work("next", list(range(30)))
    p.accept(w, d.reserve(w))
    p.run()
    d.wait("next")
    assert d.committed["next"], "the channel is still in step"
    at_rest(d, p)


def test_a_queued_request_keeps_its_lease(pair: Pair) -> None:
    d, p = pair
    w = work("queued", list(range(20)))
    ticket = d.reserve(w, lease_s=2.0)
    deadline = d.tickets._open[ticket.transfer_id].deadline
    p.accept(w, ticket)
    until(lambda: d.lost or d.tickets._open[ticket.transfer_id].deadline > deadline)
    assert d.lost == {}
    p.run()
    d.wait("queued")
    assert d.committed["queued"]
    at_rest(d, p)


def test_a_request_that_queues_to_be_sent_keeps_its_lease() -> None:
    """The channel carries what one request has before it for longer than the lease of the next."""
    engine = PatternEngine(64)
    (quick,) = engine.memories(staged=False)

    class SlowMemory:
        device, shared = quick.device, quick.shared

        def pull(self, *piece: Any) -> None:
            time.sleep(0.05)
            quick.pull(*piece)

    d = DecodeSide(engine, ["shm"], memories=[SlowMemory()])
    p = PrefillSide(PatternEngine(64), ["shm"], ring_memory=2 * LAYOUT.block_bytes, lease_s=0.4)
    for name in ("before", "after"):
        w = work(name, [len(name)] * 100)
        p.accept(w, d.reserve(w, lease_s=0.5))
        p.run()
    d.wait("before", "after")
    assert d.lost == {}
    assert d.committed == {"before": True, "after": True}
    at_rest(d, p)
    p.stop()
    d.stop()


def test_a_ring_smaller_than_a_piece() -> None:
    d = DecodeSide(PatternEngine(64), ["shm"])
    p = PrefillSide(PatternEngine(64), ["shm"], staged=True, ring_memory=1)
    w = work("a", list(range(100)))
    p.accept(w, d.reserve(w))
    p.run()
    d.wait("a")
    assert d.committed["a"]
    at_rest(d, p)
    p.stop()
    d.stop()


def test_the_prefill_side_evicts_children_before_their_parents(pair: Pair) -> None:
    d, _ = pair
    p = PrefillSide(PatternEngine(40), d.channels)
    pool, scheduler = p.engine.pool, p.engine.scheduler
    scheduler.max_num_batched_tokens = 16
    rng = random.Random(3)
    shared = list(range(20))
    for i in range(30):
        w = work(
            f"w{i}", shared[: rng.randrange(20)] + [rng.randrange(3) for _ in range(rng.randrange(60))] + [9]
        )
        while (ticket := d.reserve(w)) is None:
            p.step()
            time.sleep(0.002)
        p.accept(w, ticket)
        for _ in range(rng.randrange(6)):
            p.step()
        if i % 3 == 0:
            p.cancel(w.request_id)
            d.cancel(w.request_id)
        with p.engine.lock:
            held = dict(pool.cached_hashes())
            assert set(held.values()) <= {*held, scheduler.hash_root}
    p.run()
    at_rest(d, p)
    while taken := pool.num_cached:
        pool.allocate(1)
        held = dict(pool.cached_hashes())
        assert set(held.values()) <= {*held, scheduler.hash_root}, f"an orphan among {taken} blocks"
    p.stop()


def test_cancel_on_either_side_at_any_moment(pair: Pair) -> None:
    d, p = pair
    rng = random.Random(5)
    names = []
    for i in range(150):
        w = work(f"w{i}", [rng.randrange(3) for _ in range(rng.randrange(1, 60))])
        while (ticket := d.reserve(w)) is None:
            time.sleep(0.002)
        names.append(w.request_id)
        fate = rng.randrange(4)
        p.accept(w, ticket)
        if fate == 0:
            p.step()
            p.cancel(w.request_id)
        elif fate == 1:
            p.step()
            d.cancel(w.request_id)
            d.lost[w.request_id] = "cancelled here"
        p.run()
    d.wait(*names)
    at_rest(d, p)
    assert all(d.committed.values())
    assert len(d.committed) > 50


def test_what_the_sender_cancels_the_receiver_hears_of_at_once(pair: Pair) -> None:
    d, p = pair
    p.engine.scheduler.max_num_batched_tokens = 16
    w = work("a", list(range(60)))
    p.accept(w, d.reserve(w, lease_s=60))
    p.step()
    p.cancel("a")
    d.wait("a", timeout_s=15)
    assert d.lost == {"a": "transfer_failed"}
    assert d.lost_reasons == {"a": "cancelled"}
    assert p.ended == {}, "whoever cancels is told nothing"
    at_rest(d, p)


def test_the_decode_side_dies(pair: Pair) -> None:
    d, p = pair
    w = work("a", list(range(20)))
    p.accept(w, d.reserve(w))
    until(lambda: any(peer.road for peer in p.handoffs.peers().values()))
    d.stop()
    p.run()
    until(lambda: "a" in p.ended)
    assert p.ended["a"] == "transfer_failed"
    assert p.engine.pool.num_referenced == 0
    assert p.engine.scheduler.requests == {}


def test_the_prefill_side_dies(pair: Pair) -> None:
    d, p = pair
    w = work("a", list(range(200)))
    p.accept(w, d.reserve(w, lease_s=0.5))
    p.step()
    p.stop()
    d.wait("a")
    assert d.engine.pool.num_referenced == 0
    assert d.committed == {}


def test_no_common_road_is_said(pair: Pair) -> None:
    d, _ = pair
    other = PrefillSide(PatternEngine(8), ["tcp" if d.channels == ["shm"] else "shm"])
    w = work("a", [1])
    other.accept(w, d.reserve(w))
    until(lambda: "a" in other.ended)
    assert "no channel to d0" in other.reasons["a"]
    assert f"it offers {d.channels[0]}" in other.reasons["a"]
    other.stop()


# --- a peer that does not keep the rules -----------------------------------------------------------------------------


def dial(d: DecodeSide, secret: bytes = SECRET) -> socket.socket:
    host, port = d.receiver.endpoints[0].address.split(":")
    sock = socket.create_connection((host, int(port)), timeout=5)
    greet(sock, secret, "p9", kv_to_sender)
    send_frame(sock, KvOpen(road="tcp", layout=LAYOUT))
    assert recv_frame(sock, kv_to_sender).ok
    return sock


@pytest.fixture
def d() -> Iterator[DecodeSide]:
    side = DecodeSide(PatternEngine(64), ["tcp"], io_timeout_s=0.3)
    yield side
    side.stop()


def receivers() -> int:
    return sum(thread.name.startswith("kv-recv") for thread in threading.enumerate())


def test_a_stranger_gets_neither_memory_nor_time(d: DecodeSide) -> None:
    host, port = d.receiver.endpoints[0].address.split(":")
    huge = socket.create_connection((host, int(port)), timeout=5)
    recv_frame(huge, kv_to_sender)
    huge.sendall(struct.pack("<I", MAX_FRAME_BYTES))
    assert huge.recv(1) == b"", "a greeting is short"
    slow = socket.create_connection((host, int(port)), timeout=5)
    recv_frame(slow, kv_to_sender)
    slow.sendall(struct.pack("<I", 1000))
    begun = time.monotonic()
    while receivers():  # each byte comes in time, the whole does not
        assert time.monotonic() - begun < 30
        with contextlib.suppress(OSError):
            slow.sendall(b"x")
        time.sleep(0.05)


def test_a_storm_of_strangers_is_bounded_and_keeps_nobody_out() -> None:
    d = DecodeSide(PatternEngine(8), ["tcp"], io_timeout_s=20.0)
    host, port = d.receiver.endpoints[0].address.split(":")
    before = receivers()
    storm = [socket.create_connection((host, int(port)), timeout=5) for _ in range(100)]
    ours = dial(d)  # the last in the queue: all have been accepted
    until(lambda: receivers() - before <= 65)
    ours.close()
    for sock in storm:
        sock.close()
    until(lambda: receivers() == before)
    d.stop()


def test_accepting_goes_on_after_a_lack_of_descriptors(d: DecodeSide) -> None:
    waiting = socket.socket()
    host, port = d.receiver.endpoints[0].address.split(":")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        waiting.connect((host, int(port)))
        time.sleep(0.2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    waiting.close()
    dial(d).close()


def blocks(ticket: Ticket, first: int, count: int) -> bytes:
    message = KvBlocks(ticket.transfer_id, ticket.epoch, first, count, count * LAYOUT.block_bytes)
    return encode(message) + b"\7" * (count * LAYOUT.block_bytes)


def test_wrong_secret_is_refused(d: DecodeSide) -> None:
    with pytest.raises(ProtocolError, match="wrong cluster secret"):
        dial(d, b"x" * 32)


@pytest.mark.parametrize("cut", [1, 3, 20, 200, LAYOUT.block_bytes + 50])
def test_a_sender_that_is_cut_or_stalls_inside_a_frame(d: DecodeSide, cut: int) -> None:
    for stall in (False, True):
        w = work(f"w{cut}{stall}", list(range(20)))
        ticket = d.reserve(w, lease_s=0.6)
        sock = dial(d)
        sock.sendall(blocks(ticket, 0, 5)[:cut])
        if not stall:
            sock.close()
        d.wait(w.request_id)
        until(lambda: not d.tickets.writing)
        assert d.engine.pool.num_referenced == 0
        sock.close()
    assert d.committed == {}


def test_first_token_before_all_blocks_is_never_committed(d: DecodeSide) -> None:
    ticket = d.reserve(work("a", list(range(20))))
    sock = dial(d)
    sock.sendall(blocks(ticket, 0, 4))
    assert recv_frame(sock, kv_to_sender).ok
    send_frame(sock, KvFirstToken(ticket.transfer_id, ticket.epoch, 3, None, 0))
    ack = recv_frame(sock, kv_to_sender)
    assert not ack.ok
    assert "4 of 5 blocks" in ack.reason
    assert d.lost == {"a": "transfer_failed"}
    assert d.engine.pool.num_referenced == 0


def test_blocks_come_in_any_order_but_only_once(d: DecodeSide) -> None:
    sock = dial(d)
    ticket = d.reserve(work("twice", list(range(20))))
    for first, count, ok in [(3, 2, True), (0, 1, True), (2, 2, False)]:
        sock.sendall(blocks(ticket, first, count))
        assert recv_frame(sock, kv_to_sender).ok is ok
    assert d.lost["twice"] == "transfer_failed"
    assert d.engine.pool.num_referenced == 0


def test_blocks_outside_are_refused(d: DecodeSide) -> None:
    sock = dial(d)
    for name, first, count in [("beyond", 0, 6), ("behind", 5, 1), ("negative", -1, 1), ("none", 1, 0)]:
        ticket = d.reserve(work(name, list(range(20))))
        sock.sendall(blocks(ticket, first, count))
        assert not recv_frame(sock, kv_to_sender).ok
        assert d.lost[name] == "transfer_failed"
    assert d.engine.pool.num_referenced == 0
    assert d.engine.untouched, "not a byte was written"


def test_an_old_epoch_is_void(d: DecodeSide) -> None:
    ticket = d.reserve(work("a", list(range(8))))
    sock = dial(d)
    old = KvBlocks(ticket.transfer_id, ticket.epoch - 1, 0, 2, 2 * LAYOUT.block_bytes)
    sock.sendall(encode(old) + b"\7" * old.num_bytes)
    ack = recv_frame(sock, kv_to_sender)
    assert not ack.ok
    assert "epoch" in ack.reason
    assert d.engine.untouched
    assert len(d.tickets) == 1, "the ticket itself is untouched"


def test_garbage_closes_the_channel_and_nothing_else(d: DecodeSide) -> None:
    sock = dial(d)
    sock.sendall(b"\xff" * 4)
    assert sock.recv(1) == b""
    good = dial(d)
    ticket = d.reserve(work("a", list(range(4))))
    good.sendall(blocks(ticket, 0, 1))
    assert recv_frame(good, kv_to_sender).ok


def test_a_ticket_that_goes_away_while_its_bytes_come_in(d: DecodeSide) -> None:
    ticket = d.reserve(work("a", list(range(20))))
    sock = dial(d)
    whole = blocks(ticket, 0, 5)
    sock.sendall(whole[:500])
    until(lambda: d.tickets.writing)
    with d.engine.lock:
        d.tickets.cancel("a")
        d.engine.scheduler.cancel("a")
        assert d.engine.pool.num_referenced == 5, "the writer holds them"
    sock.sendall(whole[500:])
    assert not recv_frame(sock, kv_to_sender).ok
    assert d.engine.pool.num_referenced == 0


def test_a_wrong_peer_behind_the_address_is_noticed() -> None:
    d = DecodeSide(PatternEngine(8), ["tcp"])
    stranger = DecodeSide(PatternEngine(8), ["tcp"], worker_id="d7")
    ticket = d.reserve(work("a", [1]))
    moved = Ticket(
        **{f: getattr(ticket, f) for f in ticket.__struct_fields__ if f != "endpoints"},
        endpoints=[KvEndpoint("tcp", stranger.receiver.endpoints[0].address)],
    )
    p = PrefillSide(PatternEngine(8), ["tcp"])
    p.accept(work("a", [1]), moved)
    until(lambda: "a" in p.ended)
    assert "d7:1 answers where the ticket names d0:1" in p.reasons["a"]
    for side in (p, d, stranger):
        side.stop()


def test_many_at_once_from_two_prefill_sides(pair: Pair) -> None:
    d, p = pair
    q = PrefillSide(PatternEngine(40), d.channels)
    rng = random.Random(1)
    works = [work(f"w{i}", [rng.randrange(2) for _ in range(rng.randrange(1, 30))]) for i in range(60)]

    def feed(side: PrefillSide, mine: list[object]) -> None:
        for w in mine:
            while (ticket := d.reserve(w)) is None:  # type: ignore[arg-type]
                side.step()
                time.sleep(0.001)
            side.accept(w, ticket)  # type: ignore[arg-type]
            side.step()
        while side.step() or len(side.handoffs):
            time.sleep(0.001)

    threads = [threading.Thread(target=feed, args=(side, works[i::2])) for i, side in enumerate((p, q))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    d.wait(*(w.request_id for w in works))
    assert all(d.committed.values())
    at_rest(d, p)
    at_rest(d, q)
    q.stop()
