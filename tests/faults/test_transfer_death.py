"""Either end of a transfer dies, stands still or is cut off, at any byte: it fails aloud, and nothing wrong is committed."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import threading
import time
from typing import Any

import msgspec
import pytest

from tests.faults.transfer_process import Process
from tests.nursery import Nursery
from tests.workers.transfer.pair import (
    LAYOUT,
    DecodeSide,
    PatternEngine,
    PrefillSide,
    at_rest,
    until,
    work,
)

PROMPT = list(range(100, 160))  # fifteen blocks
ROADS = ["shm", "shm, staged", "tcp"]


def way(road: str) -> dict[str, Any]:
    name, _, staged = road.partition(", ")
    return {
        "channels": [name],
        "staged": bool(staged),
        "ring_memory": 4 * LAYOUT.block_bytes,
        "io_timeout_s": 0.4,
    }


async def hand_over(p: Process, d: Process, name: str, prompt: list[int]) -> tuple[Any, Any]:
    """What becomes of it, on either side."""
    landed, left = d.event("landed", name), p.event("left", name)
    given = await d.ask("reserve", "ticket", name=name, prompt=prompt, lease_s=0.6)
    if given["event"] == "died":
        return given, {"event": "died"}
    p.tell("send", name=name, prompt=prompt, ticket=given["ticket"])
    return await landed, await left


# --- real deaths ------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize("victim", ["sender", "receiver"])
@pytest.mark.parametrize("road", ["shm", "tcp"])
async def test_killed_at_any_moment(nursery: Nursery, road: str, victim: str) -> None:
    """Two pairs share one side: when the other side of one dies, that of the other goes on as if nothing had been."""
    rng = random.Random(victim + road)
    stays = await Process(nursery, "stays", **way(road)).start()
    friend = await Process(nursery, "friend", **way(road)).start()
    whole = []
    took_s = 0.0  # without a death: so that the others come at all stages, however fast the machine is
    for i in range(7):
        dies = await Process(nursery, "dies", ranks=rng.choice([1, 2]), **way(road)).start()
        p, d = (dies, stays) if victim == "sender" else (stays, dies)
        q, e = (friend, stays) if victim == "sender" else (stays, friend)
        prompt = [i, *PROMPT]
        began = time.monotonic()
        mine = [asyncio.ensure_future(hand_over(p, d, f"mine{i}-{j}", [j, *prompt])) for j in range(3)]
        others = [asyncio.ensure_future(hand_over(q, e, f"other{i}-{j}", [j, 7, *prompt])) for j in range(3)]
        if i == 0:
            await asyncio.gather(*mine)
            took_s = time.monotonic() - began
        else:
            await asyncio.sleep((i - 1) / 5 * took_s)
        await dies.kill()
        for landed, left in await asyncio.gather(*others):
            assert landed["right"]
            assert left["code"] is None
        for landed, left in await asyncio.wait_for(asyncio.gather(*mine), 20):
            whole.append(landed.get("right") is True and left.get("code", "died") is None)
            if victim == "sender":
                assert landed["right"] or landed["reason"], "aloud"
            else:
                assert left["event"] == "died" or left["code"] in (None, "transfer_failed"), "aloud"
        await stays.lets_go()  # a request of which a step is in flight holds its blocks until that ends
    assert all(whole[:3])
    assert not all(whole[3:])
    assert not stays.wrong
    assert not friend.wrong
    await asyncio.gather(stays.at_rest(), friend.at_rest())
    await asyncio.gather(stays.kill(), friend.kill())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stalled", ["sender", "receiver"])
@pytest.mark.parametrize("road", ROADS)
async def test_stopped_for_longer_than_anybody_waits(nursery: Nursery, road: str, stalled: str) -> None:
    """SIGSTOP in the middle; the other side gives up and uses its blocks anew; SIGCONT: the late copy counts nowhere."""
    p = await Process(nursery, "p", num_blocks=70, **way(road)).start()
    d = await Process(nursery, "d", num_blocks=70, **way(road)).start()
    victim = p if stalled == "sender" else d
    lost = 0

    async def three(i: int) -> list[Any]:
        return await asyncio.gather(*(hand_over(p, d, f"r{i}-{j}", [i, j, *PROMPT]) for j in range(3)))

    await three(0)  # opens the way
    began = time.monotonic()
    await three(1)
    took_s = time.monotonic() - began
    i = 2
    while i < 4 or not lost:  # a signal may come too late for all three, but not every time
        under_way = asyncio.ensure_future(three(i))
        await asyncio.sleep(took_s * (i % 3) / 3)
        victim.signal(signal.SIGSTOP)
        await asyncio.sleep(0.9)
        victim.signal(signal.SIGCONT)
        for landed, _ in await asyncio.wait_for(under_way, 20):
            assert landed["right"] or landed["reason"]
            lost += not landed["right"]
        landed, left = await asyncio.wait_for(hand_over(p, d, f"next{i}", [9, i, *PROMPT]), 20)
        assert landed["right"], "the two find a new way"
        assert left["code"] is None
        i += 1
    assert not d.wrong
    await asyncio.gather(p.at_rest(), d.at_rest())
    await asyncio.gather(p.kill(), d.kill())


# --- between the copy and its commit ------------------------------------------------------------------------------------


class Paused:
    """A receiver's cache that stands still at one place of the second piece."""

    def __init__(self, engine: PatternEngine, where: str) -> None:
        (self._memory,) = engine.memories(staged=False)
        self.device, self.shared = self._memory.device, self._memory.shared
        self._where, self._pieces = where, 0
        self.there, self.go_on = threading.Event(), threading.Event()

    def pull(self, *piece: Any) -> None:
        self._pieces += 1
        if self._pieces == 2 and self._where == "before the copy":
            self._pause()
        self._memory.pull(*piece)
        if self._pieces == 2 and self._where == "behind the copy":
            self._pause()

    def _pause(self) -> None:
        self.there.set()
        assert self.go_on.wait(30)


@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize("where", ["before the copy", "behind the copy"])
@pytest.mark.parametrize("how", ["times out", "stops"])
def test_blocks_that_were_given_up_while_they_were_copied(where: str, how: str) -> None:
    """The receiver reads the sender's cache in place, and is slow: meanwhile the sender gives the way up, and other
    bytes lie there. Whether it copied the right ones or the others, it may not tell them apart: they count nowhere."""
    engine = PatternEngine(64)
    memory = Paused(engine, where)
    d = DecodeSide(engine, ["shm"], memories=[memory], io_timeout_s=5)
    p = PrefillSide(PatternEngine(64), ["shm"], io_timeout_s=0.3, ring_memory=6 * LAYOUT.block_bytes)
    w = work("a", PROMPT)
    p.accept(w, d.reserve(w, lease_s=30))
    p.run()
    assert memory.there.wait(20)
    if how == "stops":
        p.stop()
    until(lambda: p.ended.get("a") == "transfer_failed", 15)
    assert p.engine.pool.num_referenced == 0, "the blocks are free"
    for block in range(64):
        p.engine.write_block(block, [block, 666])
    memory.go_on.set()
    d.wait("a", timeout_s=15)
    assert d.lost["a"] == "transfer_failed"
    assert d.committed == {}
    assert "gave the blocks up" in d.lost_reasons["a"]
    if how == "times out":
        w = work("b", [7, *PROMPT])
        p.accept(w, d.reserve(w))
        p.run()
        d.wait("b")
        assert d.committed == {"b": True}
    at_rest(d, p)
    p.stop()
    d.stop()


@pytest.mark.usefixtures("nothing_leaks")
def test_a_ticket_that_is_reaped_between_the_copy_and_its_commit() -> None:
    engine = PatternEngine(64)
    memory = Paused(engine, "behind the copy")
    d = DecodeSide(engine, ["shm"], memories=[memory], io_timeout_s=5)
    p = PrefillSide(PatternEngine(64), ["shm"], ring_memory=6 * LAYOUT.block_bytes, lease_s=30)
    p.handoffs._keep_leases = lambda: None  # type: ignore[method-assign]
    p.handoffs._computing = lambda: False  # a sender whose engine is stuck renews no lease
    w = work("a", PROMPT)
    p.accept(w, d.reserve(w, lease_s=0.3))
    p.run()
    assert memory.there.wait(20)
    d.wait("a")
    assert d.lost["a"] == "lease_expired"
    with d.engine.lock:
        held = set(d.tickets.writing[0])
        assert d.engine.pool.num_referenced == len(held), "those that are written, by the writer alone"
        others = d.engine.pool.allocate(64 - len(held))
        assert others
        for block in others:
            d.engine.write_block(block, [5])
    memory.go_on.set()
    until(lambda: p.ended.get("a") == "transfer_failed", 15)
    assert "no ticket" in p.reasons["a"]
    with d.engine.lock:
        assert all(d.engine.block_holds(block, [5]) for block in others)
        d.engine.pool.release(others)
    at_rest(d, p)
    p.stop()
    d.stop()


# --- cut off at any byte ------------------------------------------------------------------------------------------------


class Cut:
    """Passes bytes on between a sender and a receiver, until so many have gone in one direction; then `how`."""

    def __init__(self, address: str, towards: str, after: int, how: str) -> None:
        self._to, self._towards, self._left, self._how = address, towards, after, how
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.passed: dict[str, int] = {"receiver": 0, "sender": 0}
        self._socks: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:
                return
            host, port = self._to.split(":")
            theirs = socket.create_connection((host, int(port)))
            self._socks += [ours, theirs]
            for source, target, towards in ((ours, theirs, "receiver"), (theirs, ours, "sender")):
                thread = threading.Thread(target=self._pass, args=(source, target, towards), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pass(self, source: socket.socket, target: socket.socket, towards: str) -> None:
        try:
            while data := source.recv(4096):
                if towards == self._towards:
                    data, over = data[: self._left], len(data) > self._left
                    self._left -= len(data)
                    target.sendall(data)
                    self.passed[towards] += len(data)
                    if over:
                        self._end()
                        return
                else:
                    target.sendall(data)
                    self.passed[towards] += len(data)
        except OSError:
            pass
        for sock in (source, target):
            if self._how != "stands still":
                with_no_more(sock)

    def _end(self) -> None:
        if self._how == "stands still":
            return
        for sock in self._socks:
            if self._how == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            with_no_more(sock)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._socks:
            with_no_more(sock)
        for thread in self._threads:
            thread.join(5)
        for sock in self._socks:
            sock.close()


def with_no_more(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def through(cut: Cut, ticket: Any) -> Any:
    endpoints = [msgspec.structs.replace(e, address=cut.address) for e in ticket.endpoints]
    return msgspec.structs.replace(ticket, endpoints=endpoints)


@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize("how", ["closed", "reset", "stands still"])
@pytest.mark.parametrize("towards", ["receiver", "sender"])
def test_a_connection_that_ends_at_any_byte(towards: str, how: str) -> None:
    """One hand-over is cut at each of many places, all at once, while others go on: aloud, or it is whole."""
    d = DecodeSide(PatternEngine(400), ["tcp"], io_timeout_s=0.3)
    d.engine.scheduler.max_num_seqs = 200
    prompt = PROMPT[:20]
    probe = Cut(d.receiver.endpoints[0].address, towards, 1 << 30, how)
    w = work("probe", [999, *prompt[1:]])
    p = PrefillSide(PatternEngine(16), ["tcp"], tcp_streams=1)
    p.accept(w, through(probe, d.reserve(w)))
    p.run()
    d.wait("probe")
    at_rest(d, p)
    total = probe.passed[towards]
    assert total > 100
    probe.close()
    p.stop()

    rng = random.Random(how)
    places = sorted({0, 1, 3, 4, 5, total - 1, *(rng.randrange(total) for _ in range(14))})
    cuts, senders = [], []
    for i, place in enumerate(places):
        cut = Cut(d.receiver.endpoints[0].address, towards, place, how)
        q = PrefillSide(PatternEngine(16), ["tcp"], tcp_streams=1, io_timeout_s=0.3, worker_id=f"p{i}")
        w = work(f"cut{i}", [i, *prompt[1:]])
        q.accept(w, through(cut, d.reserve(w, lease_s=0.6)))
        cuts.append(cut)
        senders.append(q)
        q.run()
    good = PrefillSide(PatternEngine(64), ["tcp"], worker_id="good")
    for j in range(5):
        w = work(f"good{j}", [j, 5, *prompt])
        good.accept(w, d.reserve(w))
        good.run()
        d.wait(f"good{j}")
        assert d.committed[f"good{j}"]
    names = [f"cut{i}" for i in range(len(places))]
    d.wait(*names)
    for i, q in enumerate(senders):
        until(lambda i=i, q=q: q.ended.get(f"cut{i}", "") != "", 20)
    assert all(d.committed.values())
    for i, name in enumerate(names):
        if towards == "receiver":
            assert name in d.lost, f"byte {places[i]} of {total} never came"
            assert senders[i].ended[name] == "transfer_failed"
        else:
            assert senders[i].ended[name] == "transfer_failed", "it was not told of all that arrived"
    at_rest(d, good, *senders)
    for side in (good, *senders):
        side.stop()
    for cut in cuts:
        cut.close()
    d.stop()
