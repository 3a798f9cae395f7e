"""Peers that hold the secret and do not keep the rules: what they say fails aloud, the others go on, nothing is kept."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from kernels.cache_view import CacheView
from tests.workers.transfer.pair import (
    LAYOUT,
    SECRET,
    VOCABULARY,
    DecodeSide,
    PatternEngine,
    PrefillSide,
    at_rest,
    belongings,
    pattern,
    until,
    work,
)
from workers.protocol import frames
from workers.protocol.frames import (
    ProtocolError,
    encode,
    greet,
    kv_to_receiver,
    kv_to_sender,
    recv_frame,
    send_frame,
    send_frame_with_fds,
)
from workers.protocol.messages import (
    KvAbort,
    KvAck,
    KvBlocks,
    KvFetch,
    KvFirstToken,
    KvOpen,
    KvPrefix,
    KvReady,
    KvRenew,
    KvWindow,
    Ticket,
)
from workers.shared_memory import SharedPages
from workers.transfer import peer
from workers.transfer import tcp as tcp_road

pytestmark = pytest.mark.usefixtures("nothing_leaks")

NUM_BLOCKS = 8
PROMPT = list(range(20))  # five blocks
CACHE_BYTES = NUM_BLOCKS * LAYOUT.block_bytes


class Liar:
    """A sender by hand."""

    def __init__(
        self, d: DecodeSide, road: str, opened: KvOpen | None = None, fds: Sequence[int] = ()
    ) -> None:
        (endpoint,) = [e for e in d.receiver.endpoints if e.kind == road and e.rank == 0]
        if road == "shm":
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(5)
            self.sock.connect("\0" + endpoint.address)
        else:
            host, port = endpoint.address.split(":")
            self.sock = socket.create_connection((host, int(port)), timeout=5)
        greet(self.sock, SECRET, "p9", kv_to_sender)
        self.ready: Any = None
        if opened is not None:
            send_frame_with_fds(self.sock, opened, fds)
            self.ready = recv_frame(self.sock, kv_to_sender)

    def say(self, message: Any, body: bytes = b"") -> KvAck:
        self.sock.sendall(encode(message) + body)
        answer = recv_frame(self.sock, kv_to_sender)
        assert isinstance(answer, KvAck)
        return answer

    @property
    def shut_out(self) -> bool:
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True


class Mapped(Liar):
    """One whose cache is shared memory, as `window` describes it."""

    def __init__(self, d: DecodeSide, **window: Any) -> None:
        view = CacheView.canonical(0, NUM_BLOCKS, LAYOUT.num_layers, LAYOUT.num_kv_heads, 4, 32)
        honest: dict[str, Any] = {
            "num_bytes": CACHE_BYTES,
            "strides": (
                view.block_stride,
                view.layer_stride,
                view.kv_stride,
                view.head_stride,
                view.token_stride,
            ),
            "num_blocks": NUM_BLOCKS,
        }
        self.pages, self.flag = SharedPages(CACHE_BYTES), SharedPages(4096)
        self.alive = self.flag.array.view(np.uint64)
        self.alive[0] = 1
        opened = KvOpen(road="shm", layout=LAYOUT, window=KvWindow(**(honest | window)))
        super().__init__(d, "shm", opened, (self.pages.fd, self.flag.fd))


@pytest.fixture
def d() -> Iterator[DecodeSide]:
    side = DecodeSide(PatternEngine(64), ["shm", "tcp"], io_timeout_s=0.5)
    yield side
    side.stop()


@pytest.fixture
def honest(d: DecodeSide) -> Iterator[PrefillSide]:
    """A sender that is on its way to the same receiver; the test ends with its hand-over."""
    p = PrefillSide(PatternEngine(64), ["shm"])
    w = work("honest before", PROMPT)
    p.accept(w, d.reserve(w))
    p.run()
    d.wait("honest before")
    yield p
    for name, channels in [("honest", ["shm"]), ("honest too", ["tcp"])]:
        q = p if channels == ["shm"] else PrefillSide(PatternEngine(64), channels)
        w = work(name, [5, *PROMPT])
        q.accept(w, d.reserve(w))
        q.run()
        d.wait(name)
        assert d.committed[name]
        at_rest(d, q)
        q.stop()


def tcp(d: DecodeSide, **opened: Any) -> Liar:
    return Liar(d, "tcp", KvOpen(**({"road": "tcp", "layout": LAYOUT} | opened)))


def announced(ticket: Ticket, first: int = 0, count: int = 5, **changes: Any) -> KvBlocks:
    message = KvBlocks(ticket.transfer_id, ticket.epoch, first, count, count * LAYOUT.block_bytes)
    return msgspec.structs.replace(message, **changes)


def lost(d: DecodeSide, name: str = "a") -> None:
    d.wait(name, timeout_s=2)
    assert d.lost[name] == "transfer_failed", "aloud, and not by the lease"
    until(lambda: not d.tickets.writing)
    assert d.engine.pool.num_referenced == 0
    assert len(d.tickets) == 0


# --- KvOpen ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 1}, "rank 1 of 1"),
        ({"rank": -1}, "wants nothing of rank -1"),
        ({"ranks": 3}, "4 KV heads cannot be shared out evenly among 3 ranks"),
        ({"ranks": 0}, "0 ranks"),
        ({"ranks": 2**62}, f"{2**62} ranks"),
        ({"rank": 9, "ranks": 8}, "wants nothing of rank 9 of 8"),
        ({"layout": msgspec.structs.replace(LAYOUT, num_layers=2**40)}, f"is 2 here and {2**40} on p9"),
        ({"layout": msgspec.structs.replace(LAYOUT, dtype="int8")}, "is float32 here and int8 on p9"),
    ],
)
def test_an_opening_that_fits_nothing(
    d: DecodeSide, honest: PrefillSide, changes: dict[str, Any], reason: str
) -> None:
    liar = tcp(d, **changes)
    assert not liar.ready.ok
    assert liar.ready.final
    assert reason in liar.ready.reason
    assert liar.shut_out


def test_the_wrong_door_and_the_wrong_first_word(d: DecodeSide, honest: PrefillSide) -> None:
    for message in (KvOpen(road="shm", layout=LAYOUT), KvAbort("t", 1, "x")):
        liar = Liar(d, "tcp")
        send_frame(liar.sock, message)
        assert liar.shut_out


def test_an_opening_that_comes_byte_by_byte(d: DecodeSide) -> None:
    liar = Liar(d, "tcp")
    liar.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in encode(KvOpen(road="tcp", layout=LAYOUT)):
        liar.sock.sendall(bytes([byte]))
        time.sleep(0.001)
    answer = recv_frame(liar.sock, kv_to_sender)
    assert isinstance(answer, KvReady)
    assert answer.ok


def test_compression_of_what_is_in_integers_already() -> None:
    layout = msgspec.structs.replace(LAYOUT, dtype="int8")
    engine = PatternEngine(8)
    engine.layout = layout
    d = DecodeSide(engine, ["tcp"])
    liar = tcp(d, layout=layout, compression="fp8")
    assert not liar.ready.ok
    assert "int8" in liar.ready.reason
    d.stop()


GOOD = (CACHE_BYTES // NUM_BLOCKS, 1024, 512, 128, 32)


@pytest.mark.parametrize(
    "window",
    [
        {"num_bytes": CACHE_BYTES + 1},
        {"num_bytes": 0},
        {"num_bytes": -5},
        {"num_bytes": 2**47},
        {"num_bytes": CACHE_BYTES // 2},
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**63},
        {"num_blocks": NUM_BLOCKS + 1},
        {"num_blocks": 0},
        {"num_blocks": -1},
        {"num_blocks": 2**63},
        {"strides": (1, 2, 3)},
        {"strides": (*GOOD[:4], -32)},
        {"strides": (2**40, *GOOD[1:])},
        {"strides": (GOOD[0], 2**63, *GOOD[2:])},
        {"strides": (0, 0, 0, 0, 2**64 - 1)},
        {"strides": ()},
    ],
    ids=str,
)
def test_a_window_that_does_not_hold_what_it_says(
    d: DecodeSide, honest: PrefillSide, window: dict[str, Any]
) -> None:
    liar = Mapped(d, **window)
    assert not liar.ready.ok
    assert not liar.ready.final, "another road may do"
    assert liar.shut_out


def test_descriptors_that_are_none_of_a_window(d: DecodeSide, honest: PrefillSide) -> None:
    before = belongings()
    view = KvWindow(num_bytes=CACHE_BYTES, strides=GOOD, num_blocks=NUM_BLOCKS)
    opened = KvOpen(road="shm", layout=LAYOUT, window=view)
    pages = SharedPages(CACHE_BYTES)
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, CACHE_BYTES)
    pipe = os.pipe()
    for fds in ((), (pages.fd,), (pages.fd,) * 3, (pages.fd, pipe[0]), (unsealed, pages.fd), (pages.fd,) * 9):
        assert not Liar(d, "shm", opened, fds).ready.ok
    missing = Liar(d, "shm", KvOpen(road="shm", layout=LAYOUT))
    assert not missing.ready.ok
    del pages, missing
    until(lambda: belongings() <= before)
    for fd in (unsealed, *pipe):
        os.close(fd)


# --- KvBlocks --------------------------------------------------------------------------------------------------------

_WRONG: list[dict[str, Any]] = [
    {"count": -1},
    {"count": 0},
    {"count": 6},
    {"count": 2**62},
    {"first": 2**63},
    {"first": -(2**62)},
    {"first_layer": -1, "num_layers": 1},
    {"first_layer": 1, "num_layers": 2},
    {"num_layers": 2**63},
    {"num_layers": -3},
    {"first_layer": 2**62},
]


@pytest.mark.parametrize("wrong", _WRONG, ids=str)
def test_blocks_that_nobody_wants(d: DecodeSide, honest: PrefillSide, wrong: dict[str, Any]) -> None:
    for liar, body in ((Mapped(d), b""), (tcp(d), bytes(5 * LAYOUT.block_bytes))):
        d.lost.clear()
        ticket = d.reserve(work("a", [7, *PROMPT[1:]]))
        message = msgspec.structs.replace(announced(ticket, source=list(range(5))), **wrong)
        ack = liar.say(message, body)
        assert not ack.ok
        lost(d)
        good = d.reserve(work("b", [8]))
        send_frame(liar.sock, announced(good, 0, 1, source=[0]))
        if body:
            liar.sock.sendall(bytes(LAYOUT.block_bytes))
        assert recv_frame(liar.sock, kv_to_sender).ok, "still in step"
        d.cancel("b")


@pytest.mark.parametrize(
    "source",
    [[0, 1, 2, 3, NUM_BLOCKS], [-1, 0, 1, 2, 3], [0, 1, 2, 3], [0] * 6, [], [0, 1, 2, 3, 2**63], [2**62] * 5],
    ids=str,
)
def test_source_blocks_that_are_not_in_the_window(
    d: DecodeSide, honest: PrefillSide, source: list[int]
) -> None:
    liar = Mapped(d)
    ticket = d.reserve(work("a", [7, *PROMPT[1:]]))
    send_frame(liar.sock, announced(ticket, source=source))
    assert liar.shut_out
    lost(d)


def test_a_cache_of_more_blocks_than_there_are_numbers(d: DecodeSide, honest: PrefillSide) -> None:
    """Blocks that lie upon one another need no memory, so their number may be anything."""
    liar = Mapped(d, strides=(0, 0, 0, 0, 0), num_blocks=2**64 - 1)
    assert liar.ready.ok
    ticket = d.reserve(work("a", [7, *PROMPT[1:]]))
    assert liar.say(announced(ticket, source=[2**63 + 1] * 5)).ok
    d.cancel("a")


@pytest.mark.parametrize("offset", [-1, CACHE_BYTES, CACHE_BYTES - 5 * LAYOUT.block_bytes + 1, 2**63])
def test_offsets_outside_of_a_ring(d: DecodeSide, honest: PrefillSide, offset: int) -> None:
    pages = SharedPages(CACHE_BYTES)
    opened = KvOpen(road="shm", layout=LAYOUT, window=KvWindow(num_bytes=CACHE_BYTES))
    liar = Liar(d, "shm", opened, (pages.fd,))
    assert liar.ready.ok
    ticket = d.reserve(work("a", [7, *PROMPT[1:]]))
    send_frame(liar.sock, announced(ticket, offset=offset))
    assert liar.shut_out
    lost(d)


@pytest.mark.parametrize("num_bytes", [-1, 0, 5 * LAYOUT.block_bytes - 1, 5 * LAYOUT.block_bytes + 1, 2**63])
def test_a_number_of_bytes_that_is_not_the_blocks(d: DecodeSide, honest: PrefillSide, num_bytes: int) -> None:
    liar = tcp(d)
    ticket = d.reserve(work("a", [7, *PROMPT[1:]]))
    send_frame(liar.sock, announced(ticket, num_bytes=num_bytes))
    assert liar.shut_out
    lost(d)


@pytest.mark.parametrize("num_bytes", [-1, 2**63])
def test_the_same_for_a_ticket_that_is_gone(d: DecodeSide, honest: PrefillSide, num_bytes: int) -> None:
    ticket = d.reserve(work("a", [7, *PROMPT[1:]]))
    d.cancel("a")
    liar = tcp(d)
    send_frame(liar.sock, announced(ticket, num_bytes=num_bytes))
    if num_bytes > 0:
        liar.sock.shutdown(socket.SHUT_WR)
    assert liar.shut_out


def test_one_ticket_from_two_sides(d: DecodeSide, honest: PrefillSide) -> None:
    """The same transfer id from two senders, as if a router had given one ticket away twice."""
    ticket = d.reserve(work("a", [7, *PROMPT[1:]]))
    one, other = tcp(d), Mapped(d)
    assert one.say(announced(ticket, 0, 3), bytes(3 * LAYOUT.block_bytes)).ok
    assert other.say(announced(ticket, 3, 1, source=[0])).ok, "blocks may come on several connections"
    ack = other.say(announced(ticket, 1, 1, source=[0]))
    assert "twice" in ack.reason
    lost(d)
    assert not one.say(announced(ticket, 4, 1), bytes(LAYOUT.block_bytes)).ok


def test_pieces_by_layer_in_any_order_commit_once_all_are_there(d: DecodeSide, honest: PrefillSide) -> None:
    liar = Mapped(d)
    ticket = d.reserve(work("a", [7, *PROMPT[1:]]))
    tokens = [7, *PROMPT[1:]]
    for block in range(5):
        content = pattern(tokens[: 4 * block + 4]).tobytes()
        liar.pages.array[block * LAYOUT.block_bytes : (block + 1) * LAYOUT.block_bytes] = np.frombuffer(
            content, np.uint8
        )
    pieces = [(3, 2, 1), (0, 3, 0), (3, 2, 0), (0, 1, 1), (1, 2, 1)]
    for first, count, layer in pieces:
        assert not d.committed.get("a")
        message = announced(
            ticket,
            first,
            count,
            first_layer=layer,
            num_layers=1,
            source=list(range(first, first + count)),
        )
        assert liar.say(message).ok
    assert liar.say(KvFirstToken(ticket.transfer_id, ticket.epoch, 3, None, 0)).ok
    assert d.committed["a"]


def test_a_layer_that_is_missing_is_never_committed(d: DecodeSide, honest: PrefillSide) -> None:
    liar = tcp(d)
    ticket = d.reserve(work("a", [7, *PROMPT[1:]]))
    half = 5 * LAYOUT.block_bytes // 2
    message = announced(ticket, first_layer=1, num_layers=1, num_bytes=half)
    assert liar.say(message, bytes(half)).ok
    ack = liar.say(KvFirstToken(ticket.transfer_id, ticket.epoch, 3, None, 0))
    assert not ack.ok
    assert "2.5 of 5 blocks" in ack.reason
    lost(d)


# --- what ends a transfer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**63])
def test_a_first_token_that_is_none(d: DecodeSide, honest: PrefillSide, token: int) -> None:
    """It would be read from the embedding: outside of it there is other memory."""
    liar = tcp(d)
    ticket = d.reserve(work("a", [7, *PROMPT[1:]]))
    assert liar.say(announced(ticket), bytes(5 * LAYOUT.block_bytes)).ok
    ack = liar.say(KvFirstToken(ticket.transfer_id, ticket.epoch, token, None, 0))
    assert not ack.ok
    assert f"token {token} of a vocabulary of {VOCABULARY}" in ack.reason
    lost(d)


@pytest.mark.parametrize("count", [-1, 0, 4, 5, 6, 2**62])
def test_the_end_of_a_prefix_for_a_request(d: DecodeSide, honest: PrefillSide, count: int) -> None:
    liar = tcp(d)
    ticket = d.reserve(work("a", [7, *PROMPT[1:]]))
    assert liar.say(announced(ticket), bytes(5 * LAYOUT.block_bytes)).ok
    assert not liar.say(KvPrefix(ticket.transfer_id, ticket.epoch, count)).ok
    lost(d)
    assert d.committed == {"honest before": True}


class Prefix:
    """A Landing for blocks that the test holds."""

    def __init__(self, d: DecodeSide) -> None:
        self.held = d.engine.pool.allocate(5) or []
        self.told: list[Any] = []

    def blocks(self, first: int, count: int) -> list[int]:
        return self.held[first : first + count]

    def land(self, message: Any, opened: float, num_bytes: int) -> None:
        self.told.append(message.count)

    def lose(self, code: str, reason: str) -> None:
        self.told.append(code)


@pytest.mark.parametrize(
    ("sent", "count", "told"),
    [
        ([0, 1, 2], 3, 3),
        ([2, 0, 1], 3, 3),
        ([0, 1, 2], 2, "transfer_failed"),
        ([0, 1, 2], 4, "transfer_failed"),
        ([1, 2, 3], 3, "transfer_failed"),
        ([0, 2], 2, "transfer_failed"),
        ([0, 1, 2, 3, 4], 6, "transfer_failed"),
        ([0], -1, "transfer_failed"),
        ([], 5, "transfer_failed"),
        ([], 0, 0),
    ],
)
def test_a_prefix_that_is_not_what_has_come(
    d: DecodeSide, honest: PrefillSide, sent: list[int], count: int, told: Any
) -> None:
    liar = tcp(d)
    landing = Prefix(d)
    ticket = d.tickets.expect("t-prefix", landing, 0, 5, 5.0)  # type: ignore[arg-type]
    for block in sent:
        assert liar.say(announced(ticket, block, 1), bytes(LAYOUT.block_bytes)).ok
    assert liar.say(KvPrefix("t-prefix", ticket.epoch, count)).ok == (told == count)
    assert landing.told == [told]
    assert len(d.tickets) == 0
    d.engine.pool.release(landing.held)


def test_tokens_of_more_prompt_than_there_is(d: DecodeSide, honest: PrefillSide) -> None:
    seen = []
    d.tickets._on_commit = lambda arrival: (
        seen.append(arrival.new.request.num_cached_tokens),
        d._commit(arrival),
    )
    for name, said in [("a", 2**40), ("b", -(2**40))]:
        liar = tcp(d)
        ticket = d.reserve(work(name, [len(name), ord(name), *PROMPT[2:]]))
        assert liar.say(announced(ticket), bytes(5 * LAYOUT.block_bytes)).ok
        assert liar.say(KvFirstToken(ticket.transfer_id, ticket.epoch, 1, None, said)).ok
    assert seen == [20, 0]


def test_words_about_tickets_that_are_not_there(d: DecodeSide, honest: PrefillSide) -> None:
    liar = tcp(d)
    ticket = d.reserve(work("a", [7, *PROMPT[1:]]))
    for epoch in (ticket.epoch - 1, ticket.epoch + 1):
        send_frame(liar.sock, KvAbort(ticket.transfer_id, epoch, "another life"))
    send_frame(liar.sock, KvAbort("t-nobody", ticket.epoch, "x"))
    send_frame(liar.sock, KvRenew(ticket.epoch, ["t-nobody"] * 10_000))
    assert not liar.say(KvFirstToken("t-nobody", ticket.epoch, 1, None, 0)).ok
    assert not liar.say(KvFetch(ticket.transfer_id, ticket, [])).ok
    assert len(d.tickets) == 1
    d.cancel("a")


@pytest.mark.parametrize("road", ["shm", "tcp"])
def test_frames_that_are_cut_or_corrupt(d: DecodeSide, honest: PrefillSide, road: str) -> None:
    """Whichever bit of an announcement is wrong: the blocks are right, or nothing is committed."""
    ticket = d.reserve(work("probe", PROMPT))
    frame = encode(announced(ticket, source=list(range(5))))
    d.cancel("probe")
    rng = np.random.default_rng(3)
    for i in range(40):
        w = work(f"x{i}", [i + 100, *PROMPT[1:]])
        ticket = d.reserve(w, lease_s=1.0)
        frame = encode(announced(ticket, source=list(range(5))))
        liar = Mapped(d) if road == "shm" else tcp(d)
        bad = bytearray(frame)
        if i % 4 == 0:
            bad = bad[: int(rng.integers(1, len(bad)))]
        else:
            bad[int(rng.integers(0, len(bad)))] ^= 1 << int(rng.integers(0, 8))
        body = b"" if road == "shm" else bytes(int(rng.integers(0, 5 * LAYOUT.block_bytes)))
        try:
            liar.sock.sendall(bytes(bad) + body)
            liar.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        liar.sock.close()
        d.cancel(f"x{i}")
    until(lambda: not d.tickets.writing)
    assert set(d.committed) == {"honest before"}
    assert d.engine.pool.num_referenced == 0


# --- tickets and fetches that lie to the sender ----------------------------------------------------------------------


@pytest.fixture
def p() -> Iterator[PrefillSide]:
    side = PrefillSide(PatternEngine(64), ["shm", "tcp"])
    yield side
    side.stop()


@pytest.mark.parametrize(
    "changes",
    [
        {"first_block": -5},
        {"first_block": 6},
        {"num_blocks": -1},
        {"ranks": 0},
        {"ranks": 2**62},
        {"ranks": 3},
    ],
    ids=str,
)
def test_a_ticket_that_cannot_be_served_is_refused(
    d: DecodeSide, p: PrefillSide, changes: dict[str, Any]
) -> None:
    w = work("a", PROMPT)
    ticket = d.reserve(w)
    with pytest.raises(ValueError):
        p.accept(w, msgspec.structs.replace(ticket, **changes))
    p.accept(w, ticket)
    p.run()
    d.wait("a")
    assert d.committed["a"]
    at_rest(d, p)


def test_one_transfer_is_opened_once(d: DecodeSide, p: PrefillSide) -> None:
    w = work("a", PROMPT)
    ticket = d.reserve(w)
    p.accept(w, ticket)
    with pytest.raises(ValueError, match="t-a is already open"):
        p.accept(work("b", PROMPT), ticket)
    p.run()
    d.wait("a")
    assert d.committed["a"]
    at_rest(d, p)


def test_fewer_blocks_than_the_receiver_waits_for(d: DecodeSide, p: PrefillSide) -> None:
    w = work("a", PROMPT)
    p.accept(w, msgspec.structs.replace(d.reserve(w), num_blocks=4))
    p.run()
    lost(d)
    until(lambda: p.ended.get("a") == "transfer_failed")
    at_rest(d, p)


def fetch_of(d: DecodeSide, p: PrefillSide, **changes: Any) -> str | None:
    ticket = d.reserve(work("fetch", PROMPT))
    message = KvFetch(ticket.transfer_id, ticket, [b"\0" * 16] * 5)
    refusal = p.handoffs.send_prefix(msgspec.structs.replace(message, **changes))
    d.cancel("fetch")
    assert len(p.handoffs) == 0
    return refusal


def test_fetches_that_cannot_be_served(d: DecodeSide, p: PrefillSide) -> None:
    ticket = d.reserve(work("a", PROMPT))
    d.cancel("a")
    held = p.engine.pool.allocate(1)
    assert held
    p.engine.pool.store(held[0], b"\0" * 16, b"root")
    p.engine.pool.release(held)

    def changed(**changes: Any) -> Ticket:
        return msgspec.structs.replace(ticket, transfer_id="t-fetch", **changes)

    layout = msgspec.structs.replace(LAYOUT, block_size=8)
    expected = {
        "block size is 4 here and 8 on d0": {"ticket": changed(layout=layout)},
        "is asked for with a ticket of": {"transfer_id": "t-other"},
        "the ticket is for blocks -1..5": {"ticket": changed(first_block=-1)},
        "the ticket is for blocks 9..5": {"ticket": changed(first_block=9)},
        "0 ranks": {"ticket": changed(ranks=0)},
        f"{2**62} ranks": {"ticket": changed(ranks=2**62)},
        "none of these blocks is held here": {"hashes": [b"\1" * 16]},
        "none of these": {"hashes": []},
        "none of": {"ticket": changed(first_block=5)},
    }
    for reason, changes in expected.items():
        assert reason in (fetch_of(d, p, **changes) or "accepted"), changes
    at_rest(d, p)


# --- memory that fails ----------------------------------------------------------------------------------------------


class Broken:
    """A cache whose copies fail, as one on a device that has gone."""

    def __init__(self, memory: Any, method: str, error: type[Exception], after: int = 0) -> None:
        self.device, self.shared = memory.device, memory.shared if method == "pull" else None
        self._left = after

        def fail(*args: Any, **options: Any) -> Any:
            if self._left > 0:
                self._left -= 1
                return getattr(memory, method)(*args, **options)
            raise error("device lost")

        for name in ("outgoing", "incoming", "pull"):
            setattr(self, name, fail if name == method else getattr(memory, name))


@pytest.mark.parametrize("road", ["shm", "tcp"])
@pytest.mark.parametrize("error", [RuntimeError, MemoryError, OverflowError])
def test_a_sender_that_cannot_read_its_cache_says_so(road: str, error: type[Exception]) -> None:
    d = DecodeSide(PatternEngine(64), [road])
    engine = PatternEngine(64)
    (memory,) = engine.memories(staged=False)
    p = PrefillSide(engine, [road], memories=[Broken(memory, "outgoing", error)], lease_s=0.4)
    w = work("a", PROMPT)
    p.accept(w, d.reserve(w, lease_s=0.5))
    p.run()
    until(lambda: p.ended.get("a") == "transfer_failed", 15)
    assert "device lost" in p.reasons["a"]
    d.wait("a")
    at_rest(d, p)
    p.stop()
    d.stop()


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_receiver_that_cannot_write_its_cache_says_so(error: type[Exception]) -> None:
    engine = PatternEngine(64)
    (memory,) = engine.memories(staged=False)
    d = DecodeSide(engine, ["shm"], memories=[Broken(memory, "pull", error, after=1)])
    p = PrefillSide(PatternEngine(64), ["shm"], ring_memory=2 * LAYOUT.block_bytes)
    w = work("a", PROMPT)
    p.accept(w, d.reserve(w, lease_s=30))
    p.run()
    lost(d)
    assert "device lost" in d.lost_reasons["a"]
    until(lambda: p.ended.get("a") == "transfer_failed", 15)
    at_rest(d, p)
    p.stop()
    d.stop()


# --- ends of the sending side ----------------------------------------------------------------------------------------


def test_stopping_while_the_way_is_being_opened_opens_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, at_door, go_on = [], threading.Event(), threading.Event()
    real: Callable[..., Any] = peer.open_channel

    def slow(*args: Any, **options: Any) -> Any:
        opened.append(1)
        at_door.set()
        assert go_on.wait(20)
        return real(*args, **options)

    monkeypatch.setattr(peer, "open_channel", slow)
    d = DecodeSide(PatternEngine(64), ["tcp"])
    p = PrefillSide(PatternEngine(64), ["tcp"], tcp_streams=2)
    w = work("a", PROMPT)
    p.accept(w, d.reserve(w))
    assert at_door.wait(20)
    p.stop()
    go_on.set()
    until(lambda: not any("kv-open" in thread.name for thread in threading.enumerate()), 15)
    assert len(opened) == 1
    d.cancel("a")
    d.stop()


def test_a_descriptor_is_not_given_away_under_a_thread_that_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is closed may be another connection's at once, and the bytes of blocks would go there."""
    sending, go_on, fds = threading.Event(), threading.Event(), []
    real = tcp_road.send_views

    def slow(sock: socket.socket, views: Any) -> None:
        fds.append(sock.fileno())
        sending.set()
        assert go_on.wait(20)
        fds.append(sock.fileno())
        real(sock, views)

    monkeypatch.setattr(tcp_road, "send_views", slow)
    d = DecodeSide(PatternEngine(64), ["tcp"])
    p = PrefillSide(PatternEngine(64), ["tcp"], tcp_streams=1)
    w = work("a", PROMPT)
    p.accept(w, d.reserve(w))
    p.run()
    assert sending.wait(20)
    p.stop()
    assert p.ended["a"] == "transfer_failed"
    until(lambda: not any("kv-acks" in thread.name for thread in threading.enumerate()), 15)
    go_on.set()
    until(lambda: not any("kv-send" in thread.name for thread in threading.enumerate()), 15)
    assert fds[0] == fds[1] >= 0
    d.cancel("a")
    d.stop()


def test_nothing_is_opened_after_the_end(d: DecodeSide) -> None:
    p = PrefillSide(PatternEngine(64), ["tcp"])
    p.stop()
    w = work("a", PROMPT)
    with pytest.raises(ValueError, match="stops"):
        p.accept(w, d.reserve(w))
    d.cancel("a")


def test_an_answer_that_was_given_before_the_last_byte_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that refuses closes at once. Sending nothing to it fails, and its reason would be lost."""
    ours, theirs = socket.socketpair()
    real = socket.send_fds

    def send_and_be_left(*args: Any) -> int:
        sent = real(*args)
        send_frame(theirs, KvReady(ok=False, reason="another model", final=True))
        theirs.close()
        return sent

    monkeypatch.setattr(frames.socket, "send_fds", send_and_be_left)
    pages = SharedPages(4096)
    send_frame_with_fds(ours, KvOpen(road="shm", layout=LAYOUT), (pages.fd,))
    assert recv_frame(ours, kv_to_sender).reason == "another model"
    ours.close()


def test_names_that_are_no_text_break_the_protocol_and_nothing_else(
    d: DecodeSide, honest: PrefillSide
) -> None:
    frame = bytearray(encode(KvAbort("t-abcdef", 1, "reason")))
    frame[frame.index(b"abcdef")] = 0xFF
    with pytest.raises(ProtocolError, match="undecodable"):
        kv_to_receiver.decode(frame[4:])


def test_the_end_of_one_ticket_may_end_another(d: DecodeSide) -> None:
    """The reaper is one thread for all: whoever hears of a lost ticket may cancel others."""
    names = ["a", "b", "c"]
    told = d.tickets._on_lost

    def cancel_all(*lost: Any) -> None:
        told(*lost)
        for name in names:
            d.cancel(name)

    d.tickets._on_lost = cancel_all
    for name in names:
        d.reserve(work(name, PROMPT), lease_s=0.05)
    until(lambda: len(d.tickets) == 0)
    time.sleep(0.15)
    d.tickets._on_lost = told
    d.reserve(work("d", PROMPT), lease_s=0.05)
    d.wait("d", timeout_s=2)
    assert d.lost["d"] == "lease_expired"
