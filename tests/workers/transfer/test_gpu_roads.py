"""nccl and cuda_ipc over a stand-in for CUDA: the whole protocol, every fault that can be staged without a GPU."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.workers.transfer.fake_cuda import FakeCuda, World
from tests.workers.transfer.gpu_pair import on_gpu
from tests.workers.transfer.pair import (
    LAYOUT,
    DecodeSide,
    PatternEngine,
    PrefillSide,
    at_rest,
    until,
    work,
)
from workers.protocol.messages import KvEndpoint
from workers.transfer import roads
from workers.transfer.block_memory import HostBlocks
from workers.transfer.cuda_ipc import CudaIpc
from workers.transfer.nccl import Nccl
from workers.transfer.shm import host_id

pytestmark = pytest.mark.usefixtures("nothing_leaks")


class Gpus:
    """Prefill on one GPU, decode on another. A process has one of each road; here the two sides are one process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = World()
        self.p, self.d = FakeCuda(self.world, "GPU P"), FakeCuda(self.world, "GPU D")
        self.p_nccl, self.d_nccl = Nccl(self.p), Nccl(self.d)
        self._patch = monkeypatch
        self._sides: list[Any] = []

    def decode(self, channels: list[str], ranks: int = 1, num_blocks: int = 64, **options: Any) -> DecodeSide:
        self._use(self.d_nccl, CudaIpc(self.d))
        engine = PatternEngine(num_blocks, ranks)
        side = DecodeSide(engine, channels, memories=on_gpu(engine, self.d), **options)
        self._sides.append(side)
        self._use(self.p_nccl, CudaIpc(self.p))  # a sender looks them up when it opens a channel
        return side

    def prefill(
        self, channels: list[str], ranks: int = 1, exported: bool = True, num_blocks: int = 64, **options: Any
    ) -> PrefillSide:
        self._use(self.p_nccl, CudaIpc(self.p))
        engine = PatternEngine(num_blocks, ranks)
        memories = on_gpu(engine, self.p, exported=exported)
        side = PrefillSide(engine, channels, memories=memories, **options)
        self._sides.append(side)
        return side

    def _use(self, *kinds: Any) -> None:
        for kind in kinds:
            self._patch.setitem(roads.ROADS, kind.name, kind)

    def end(self) -> None:
        for side in self._sides:
            side.stop()
        self._sides.clear()
        self.world.released.set()


@pytest.fixture
def gpus(nothing_leaks: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    found = Gpus(monkeypatch)
    yield found
    found.end()
    until(lambda: found.p_nccl.seats.taken == 0 and found.d_nccl.seats.taken == 0)
    until(lambda: found.d.open_handles == {})
    assert found.world.wrong == []


def hand_over(d: DecodeSide, p: PrefillSide, *lengths: int, name: str = "w") -> None:
    rng = random.Random(len(name))
    names = []
    for i, length in enumerate(lengths):
        w = work(f"{name}{i}", [rng.randrange(1000) for _ in range(length)])
        p.accept(w, d.reserve(w))
        names.append(w.request_id)
        p.run()
    d.wait(*names)
    assert [d.committed.get(one) for one in names] == [True] * len(names), (d.lost_reasons, p.reasons)
    at_rest(d, p)


def fail(d: DecodeSide, p: PrefillSide, name: str, length: int = 20) -> str:
    """Hand over what can't arrive; the reason that the prefill side gives."""
    w = work(name, list(range(length)))
    p.accept(w, d.reserve(w, lease_s=1.0))
    p.run()
    until(lambda: name in p.ended)
    assert p.ended[name] == "transfer_failed"
    return p.reasons[name]


def passed_over(p: PrefillSide) -> str:
    (status,) = p.handoffs.peers().values()
    return "; ".join(status.passed_over)


# --- right bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("road", ["nccl", "cuda_ipc"])
@pytest.mark.parametrize("ranks", [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (1, 8), (8, 1)], ids=str)
def test_right_bytes_on_every_rank(gpus: Gpus, road: str, ranks: tuple[int, int]) -> None:
    d = gpus.decode([road], ranks[1])
    p = gpus.prefill([road], ranks[0])
    hand_over(d, p, 1, 8, 150, 33)
    assert set(p.roads.values()) == {road}


@pytest.mark.parametrize("compression", ["int8", "fp8"])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 4)], ids=str)
def test_nccl_compresses(gpus: Gpus, compression: str, ranks: tuple[int, int]) -> None:
    d = gpus.decode(["nccl"], ranks[1], compression=compression)
    p = gpus.prefill(["nccl"], ranks[0], compression=compression)
    hand_over(d, p, 5, 150)
    (status,) = p.handoffs.peers().values()
    blocks = 2 + 38
    assert status.sent_bytes == blocks * LAYOUT.wire_bytes(1, 2, 4, compression)  # type: ignore[arg-type]


@pytest.mark.parametrize("road", ["nccl", "cuda_ipc"])
def test_many_at_once_from_two_prefill_sides_stay_in_step(gpus: Gpus, road: str) -> None:
    d = gpus.decode([road], num_blocks=128)
    sides = [
        gpus.prefill([road], worker_id=name, ring_memory=4 * LAYOUT.block_bytes) for name in ("p0", "p1")
    ]
    rng = random.Random(1)
    works = [work(f"w{i}", [rng.randrange(2) for _ in range(rng.randrange(1, 60))]) for i in range(60)]

    def feed(side: PrefillSide, mine: list[Any]) -> None:
        for w in mine:
            while (ticket := d.reserve(w)) is None:
                side.step()
                time.sleep(0.001)
            side.accept(w, ticket)
            side.step()
        while side.step() or len(side.handoffs):
            time.sleep(0.001)

    threads = [threading.Thread(target=feed, args=(side, works[i::2])) for i, side in enumerate(sides)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    d.wait(*(w.request_id for w in works))
    assert all(d.committed.values())
    assert len(d.committed) == len(works)
    at_rest(d, *sides)
    if road == "nccl":
        posted = [sorted(c.order for c in cuda.communicators) for cuda in (gpus.p, gpus.d)]
        assert posted[0] == posted[1]
        assert len(posted[0]) == 2, "one communicator for each connection"


@pytest.mark.parametrize("road", ["nccl", "cuda_ipc"])
def test_a_late_transfer_is_dropped_and_the_channel_stays_in_step(gpus: Gpus, road: str) -> None:
    d, p = gpus.decode([road]), gpus.prefill([road])
    w = work("late", list(range(40)))
    ticket = d.reserve(w, lease_s=0.2)
    d.wait("late")
    assert d.lost["late"] == "lease_expired"
    p.accept(w, ticket)
    p.run()
    until(lambda: "late" in p.ended)
    assert "no ticket" in p.reasons["late"]
    assert d.engine.untouched
    hand_over(d, p, 30)
    if road == "nccl":
        assert [len(cuda.communicators) for cuda in (gpus.p, gpus.d)] == [1, 1]


# --- which road is taken, and what is said of the others -----------------------------------------------------------------


def test_nccl_refuses_one_gpu_twice_and_cuda_ipc_serves_that(gpus: Gpus) -> None:
    gpus.d.name = gpus.p.name
    d, p = gpus.decode(["nccl", "cuda_ipc"]), gpus.prefill(["nccl", "cuda_ipc"])
    hand_over(d, p, 20)
    assert set(p.roads.values()) == {"cuda_ipc"}
    assert "both on GPU P" in passed_over(p)
    assert "cuda_ipc serves that" in passed_over(p)


def test_memory_that_cannot_be_opened_leaves_the_next_road(gpus: Gpus) -> None:
    gpus.d.unreachable = "cudaErrorPeerAccessUnsupported"
    d, p = gpus.decode(["cuda_ipc", "tcp"]), gpus.prefill(["cuda_ipc", "tcp"])
    hand_over(d, p, 20)
    assert set(p.roads.values()) == {"tcp"}
    assert "can't be opened on GPU D: cudaErrorPeerAccessUnsupported (no peer access" in passed_over(p)


def test_a_cache_that_is_not_exported_leaves_the_next_road(gpus: Gpus) -> None:
    d, p = gpus.decode(["cuda_ipc", "tcp"]), gpus.prefill(["cuda_ipc", "tcp"], exported=False)
    hand_over(d, p, 20)
    assert set(p.roads.values()) == {"tcp"}
    assert "not allocated so that others can open it" in passed_over(p)


def test_a_driver_that_cannot_export_leaves_the_next_road(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: Any, address: int) -> bytes:
        raise RuntimeError("cudaErrorNotSupported")

    monkeypatch.setattr(gpus.p, "export", refuse)
    d, p = gpus.decode(["cuda_ipc", "tcp"]), gpus.prefill(["cuda_ipc", "tcp"])
    hand_over(d, p, 20)
    assert "can't be exported: cudaErrorNotSupported" in passed_over(p)


def test_cuda_ipc_stays_within_the_host(gpus: Gpus) -> None:
    road = CudaIpc(gpus.p)
    (memory,) = on_gpu(PatternEngine(4), gpus.p)
    assert road.bars(memory, KvEndpoint("cuda_ipc", "x", host_id=host_id())) is None
    assert "another host" in (road.bars(memory, KvEndpoint("cuda_ipc", "x", host_id="other")) or "")


@pytest.mark.parametrize("kind", [Nccl, CudaIpc])
def test_what_is_missing_is_said(gpus: Gpus, kind: Any) -> None:
    engine = PatternEngine(4)
    rank = engine.ranks[0]
    host = HostBlocks(rank.pages.array, LAYOUT, shared=rank.pages)
    assert "not on an NVIDIA GPU" in kind(gpus.p).lacks(host)
    (memory,) = on_gpu(engine, gpus.p)
    assert kind(gpus.p).lacks(memory) is None
    gpus.p.missing = "no driver"
    assert kind(gpus.p).lacks(memory) == "no driver; shm and tcp do without"
    assert "not on an NVIDIA GPU" in kind().lacks(memory), "the real one does not take a CPU's cache"


@pytest.mark.parametrize("full", ["sender", "receiver"])
def test_no_communicator_is_left(gpus: Gpus, full: str) -> None:
    seats = (gpus.p_nccl if full == "sender" else gpus.d_nccl).seats
    d = gpus.decode(["nccl", "tcp"], io_timeout_s=60.0)
    p = gpus.prefill(["nccl", "tcp"], io_timeout_s=60.0)
    taken = [seats.take(16) for _ in range(16)]
    begun = time.monotonic()
    hand_over(d, p, 20)
    assert time.monotonic() - begun < 30, "the sender waits for no join that was refused"
    assert set(p.roads.values()) == {"tcp"}
    assert "all 16 communicators that transfer.max_communicators allows" in passed_over(p)
    for seat in taken:
        seat.leave()
        seat.leave()
    assert seats.taken == (0 if full == "receiver" else seats.taken)


def test_communicators_are_given_back(gpus: Gpus) -> None:
    d = gpus.decode(["nccl"])
    for i in range(20):
        p = gpus.prefill(["nccl"], worker_id=f"p{i}")
        hand_over(d, p, 5, name=f"n{i}-")
        p.stop()
        until(lambda: gpus.p_nccl.seats.taken == 0 and gpus.d_nccl.seats.taken == 0)
    assert gpus.p.num_aborts == 20


def test_pieces_larger_than_the_receiver_has_room_for(gpus: Gpus) -> None:
    d = gpus.decode(["nccl", "tcp"])  # its ring_memory: 32 MiB
    p = gpus.prefill(["nccl", "tcp"], ring_memory=64 << 20)
    hand_over(d, p, 20)
    assert set(p.roads.values()) == {"tcp"}
    assert "transfer.ring_memory has room for" in passed_over(p)


# --- a communicator that does not do what it should --------------------------------------------------------------------


@pytest.mark.parametrize("who", ["p", "d"])
def test_a_peer_that_never_joins(gpus: Gpus, who: str) -> None:
    getattr(gpus, who).never_joins = True
    d = gpus.decode(["nccl", "tcp"], io_timeout_s=0.4)
    p = gpus.prefill(["nccl", "tcp"], io_timeout_s=0.4, tcp_streams=1)
    hand_over(d, p, 20)
    assert set(p.roads.values()) == {"tcp"}
    assert "NCCL did not connect in time" in passed_over(p)
    assert gpus.p_nccl.seats.taken == 1, "what can't be aborted keeps its seat"
    gpus.world.released.set()
    until(lambda: gpus.p_nccl.seats.taken == 0)


def test_a_first_byte_that_never_comes_is_a_blocked_road(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.workers.transfer.fake_cuda.FakeCommunicator._put", lambda *_: None)
    d = gpus.decode(["nccl", "tcp"], io_timeout_s=0.4)
    p = gpus.prefill(["nccl", "tcp"], io_timeout_s=0.4)
    hand_over(d, p, 20)
    assert set(p.roads.values()) == {"tcp"}
    until(lambda: gpus.p_nccl.seats.taken == 0 and gpus.d_nccl.seats.taken == 0)


@pytest.mark.parametrize("who", ["p", "d"])
def test_an_error_in_the_background_ends_the_connection_and_a_new_one_serves(gpus: Gpus, who: str) -> None:
    d = gpus.decode(["nccl"], io_timeout_s=1.0)
    p = gpus.prefill(["nccl"], io_timeout_s=1.0)
    hand_over(d, p, 20)
    for cuda in (gpus.p, gpus.d):
        cuda.transfers_hang = True
    getattr(gpus, who).async_error = "NCCL_ERROR_REMOTE_ERROR"
    fail(d, p, "broken", 40)
    at_rest(d, p)
    for cuda in (gpus.p, gpus.d):
        cuda.transfers_hang, cuda.async_error = False, None
    hand_over(d, p, 30, name="after")
    assert [len(cuda.communicators) for cuda in (gpus.p, gpus.d)] == [2, 2]


@pytest.mark.parametrize("how", ["transfers_hang", "post_hangs"])
@pytest.mark.parametrize("who", ["p", "d"])
def test_a_hang_fails_its_own_requests_only(gpus: Gpus, who: str, how: str) -> None:
    d = gpus.decode(["nccl"], io_timeout_s=0.5)
    p = gpus.prefill(["nccl"], io_timeout_s=0.5)
    other = Gpus(gpus._patch)
    e = other.decode(["nccl"], worker_id="d1")
    q = other.prefill(["nccl"], worker_id="p1")
    hand_over(e, q, 20)
    gpus._use(gpus.p_nccl)
    hand_over(d, p, 20)
    setattr(getattr(gpus, who), how, True)
    fail(d, p, "stuck", 40)
    hand_over(e, q, 100, name="meanwhile")
    at_rest(d, p)
    until(lambda: gpus.p_nccl.seats.taken == 0 and gpus.d_nccl.seats.taken == 0)
    setattr(getattr(gpus, who), how, False)
    hand_over(d, p, 30, name="rebuilt")
    other.end()
    assert other.world.wrong == []


def test_close_while_a_send_hangs_returns_at_once(gpus: Gpus) -> None:
    d = gpus.decode(["nccl"], io_timeout_s=60.0)
    p = gpus.prefill(["nccl"], io_timeout_s=60.0, ring_memory=1)
    hand_over(d, p, 4)
    gpus.d.transfers_hang = True
    w = work("a", list(range(100)))
    p.accept(w, d.reserve(w, lease_s=60.0))
    p.run()
    time.sleep(0.1)
    begun = time.monotonic()
    p.stop()
    until(lambda: gpus.p_nccl.seats.taken == 0 and gpus.d_nccl.seats.taken == 0)
    assert time.monotonic() - begun < 30
    d.wait("a")
    assert d.lost["a"] == "transfer_failed"
    at_rest(d)


def test_the_decode_side_dies(gpus: Gpus) -> None:
    d, p = gpus.decode(["nccl"]), gpus.prefill(["nccl"])
    hand_over(d, p, 20)
    d.stop()
    assert fail(d, p, "a")
    until(lambda: gpus.d_nccl.seats.taken == 0)


# --- copies out of the sender's cache ------------------------------------------------------------------------------------


@contextmanager
def held_copies(cuda: FakeCuda) -> Iterator[tuple[threading.Event, threading.Event]]:
    """(a copy has begun, it may go on)"""
    begun, go = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        go.wait(30)

    cuda.copies_slowly = wait
    try:
        yield begun, go
    finally:
        go.set()
        cuda.copies_slowly = lambda: None


def test_a_copy_is_void_once_the_sender_has_given_the_blocks_up(gpus: Gpus) -> None:
    d, p = gpus.decode(["cuda_ipc"]), gpus.prefill(["cuda_ipc"])
    hand_over(d, p, 8)
    with held_copies(gpus.d) as (begun, go):
        w = work("a", list(range(40)))
        p.accept(w, d.reserve(w))
        p.run()
        assert begun.wait(20)
        p.stop()
        assert p.engine.pool.num_referenced == 0, "they may be anybody's from here on"
        assert d.tickets.writing
        go.set()
        d.wait("a")
    assert d.lost["a"] == "transfer_failed"
    at_rest(d)


def test_blocks_are_held_until_a_slow_copy_is_done_though_the_peer_is_told_in_time(gpus: Gpus) -> None:
    d = gpus.decode(["cuda_ipc"], io_timeout_s=0.3)
    p = gpus.prefill(["cuda_ipc"], io_timeout_s=60.0)
    hand_over(d, p, 8)
    with held_copies(gpus.d) as (_, go):
        begun = time.monotonic()
        fail(d, p, "slow", 40)
        assert time.monotonic() - begun < 25
        assert d.tickets.writing, "the device still writes to them"
        assert d.engine.pool.num_referenced > 0
        go.set()
        at_rest(d, p)
    hand_over(d, p, 30, name="after")


def test_a_sender_of_cuda_ipc_announces_only_what_is_computed(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    d, p = gpus.decode(["cuda_ipc"]), gpus.prefill(["cuda_ipc"])
    hand_over(d, p, 8)
    computed = threading.Event()
    monkeypatch.setattr(
        "tests.workers.transfer.fake_cuda._FakeEvent.query",
        lambda event: computed.is_set() and event._done.is_set(),
    )
    w = work("a", list(range(40)))
    p.accept(w, d.reserve(w))
    p.run()
    time.sleep(0.1)
    assert not d.tickets.writing
    computed.set()
    d.wait("a")
    assert d.committed["a"]
