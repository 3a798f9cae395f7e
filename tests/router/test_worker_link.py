from __future__ import annotations

import asyncio

import msgspec
import pytest

from router.inbox import Inbox, LinkLost
from router.worker_link import LinkDown, WorkerLink
from tests.router.fake_cluster import until
from tests.router.fake_worker import SECRET, FakeWorker
from workers.protocol import frames
from workers.protocol.messages import (
    Accepted,
    Failed,
    Heartbeat,
    Load,
    Reserve,
    Sampling,
    StatusReply,
    TokenDelta,
    Tokens,
    Work,
    WorkerInfo,
)


async def connect(worker: FakeWorker, **kwargs) -> WorkerLink:
    link = new_link(worker.info, **kwargs)
    await link.connect()
    return link


def new_link(info: WorkerInfo, *, secret: bytes = SECRET, timeout_s: float = 1.0, **kwargs) -> WorkerLink:
    return WorkerLink(info, secret=secret, router_id="r", heartbeat_s=0.05, timeout_s=timeout_s, **kwargs)


@pytest.fixture
async def worker():
    worker = FakeWorker("d0", "decode", heartbeat_s=0.02)
    await worker.start()
    yield worker
    worker.die()


def reserve(request_id: str, prompt: int = 10, max_tokens: int = 3) -> Reserve:
    work = Work(request_id, list(range(1, prompt + 1)), Sampling(max_tokens=max_tokens, seed=1))
    return Reserve(work, "t-" + request_id, 5.0, 2**31 - 1)


async def test_events_reach_their_own_inbox_in_order(worker):
    link = await connect(worker)
    inboxes = {name: Inbox() for name in "abc"}
    for name, inbox in inboxes.items():
        link.open(name, inbox)
        link.send(reserve(name, max_tokens=3))
    for name, inbox in inboxes.items():
        events = [await inbox.get(5.0) for _ in range(4)]
        assert all(source is link for source, _ in events)
        assert events[0][1] == Accepted(name, 0)
        assert [event.index for _, event in events[1:]] == [0, 1, 2]
        assert {event.request_id for _, event in events[1:]} == {name}
    link.close()


async def test_messages_of_one_turn_are_one_write(worker, monkeypatch):
    link = await connect(worker)
    await asyncio.sleep(0)
    writes = []
    monkeypatch.setattr(link._writer.transport, "write", writes.append, raising=False)
    for n in range(20):
        link.send(reserve(str(n)))
    assert writes == []
    await asyncio.sleep(0)
    assert len(writes) == 1
    link.close()


async def test_late_messages_are_counted_and_dropped(worker):
    late = []
    link = await connect(worker, on_late=lambda: late.append(1))
    inbox = Inbox()
    link.open("a", inbox)
    link.send(reserve("a", max_tokens=5))
    await inbox.get(5.0)
    link.forget("a")
    # A token that came in one read with the answer to Reserve was in time.
    await until(lambda: link.late_messages + len(inbox._events) == 5)
    assert len(late) == link.late_messages > 0
    link.close()


async def test_the_end_of_the_worker_is_told_to_all_at_once(worker):
    link = await connect(worker)
    inboxes = [Inbox() for _ in range(3)]
    for n, inbox in enumerate(inboxes):
        link.open(str(n), inbox)
    query = asyncio.create_task(link.query(timeout_s=5))
    worker.stalled = True
    await asyncio.sleep(0.01)
    worker.die()
    for inbox in inboxes:
        _, event = await inbox.get(5.0)
        assert isinstance(event, LinkLost)
    with pytest.raises(LinkDown):
        await query
    assert (link.state, link.num_requests) == ("down", 0)
    await link.wait_down()
    link.send(reserve("x"))  # nobody is there: dropped
    link.open("x", inboxes[0])
    assert isinstance((await inboxes[0].get(5.0))[1], LinkLost)
    with pytest.raises(LinkDown):
        await link.query(timeout_s=1)


async def test_silence_is_death(worker):
    link = await connect(worker, timeout_s=0.3)
    inbox = Inbox()
    link.open("a", inbox)
    await asyncio.sleep(0.4)
    assert link.state == "up"  # heartbeats keep it alive
    worker.stalled = True
    _, event = await inbox.get(5.0)
    assert isinstance(event, LinkLost)
    assert "silent" in event.reason


async def test_our_own_pause_is_not_the_workers_fault(worker):
    import time

    link = await connect(worker, timeout_s=0.3)
    for _ in range(3):
        time.sleep(0.5)  # noqa: ASYNC251  the router itself stands still
        await asyncio.sleep(0.06)
    assert link.state == "up"
    link.close()


async def test_heartbeats_carry_the_load_and_end_busy(worker):
    loads = []
    link = await connect(worker, on_load=lambda link, load: loads.append(load))
    link._route(Failed("x", "busy", ""))
    assert link.busy
    await until(lambda: not link.busy)
    assert link.load.free_blocks == worker.num_blocks
    assert loads
    link.close()


async def test_a_query_is_answered_or_times_out(worker):
    link = await connect(worker)
    reply = await link.query(want_metrics=True, timeout_s=1)
    assert reply.metrics.startswith(b"fake_worker_up")
    worker.stalled = True
    with pytest.raises(TimeoutError):
        await link.query(timeout_s=0.05)
    link._route(StatusReply(99, Load(), 0, 0, 0))  # an answer that nobody waits for any more
    link.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"secret": b"another secret, quite wrong"}, "wrong cluster secret"),
        ({"epoch": 2}, "stale registration"),
        ({"worker_id": "d1"}, "stale registration"),
        ({"address": "127.0.0.1:1"}, "connect"),
        ({"address": "nonsense"}, "connect"),
    ],
)
async def test_links_that_must_not_be_made(worker, change, reason):
    secret = change.pop("secret", SECRET)
    link = new_link(msgspec.structs.replace(worker.info, **change), secret=secret)
    with pytest.raises(LinkDown, match=reason):
        await link.connect()
    assert link.state == "down"


async def test_a_server_that_never_answers(worker):
    async def silent(reader, writer):
        await asyncio.sleep(60)

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    link = new_link(msgspec.structs.replace(worker.info, address=f"{host}:{port}"), timeout_s=0.1)
    with pytest.raises(LinkDown):
        await link.connect()
    server.close()


@pytest.mark.parametrize(
    "nonsense",
    [b"\xff\xff\xff\xff", frames.encode({"type": "what"}), frames.encode(Heartbeat(Load()))[:-1] + b"\xc1"],
)
async def test_nonsense_ends_the_link(worker, nonsense):
    link = await connect(worker)
    inbox = Inbox()
    link.open("a", inbox)
    next(iter(worker._connections)).writer.write(nonsense)
    _, event = await inbox.get(5.0)
    assert isinstance(event, LinkLost)
    assert "protocol" in event.reason


async def test_the_inbox_waits_and_times_out():
    inbox = Inbox()
    with pytest.raises(TimeoutError):
        await inbox.get(0.01)
    getter = asyncio.create_task(inbox.get(1.0))
    await asyncio.sleep(0)
    delta = TokenDelta("a", 0, [1])
    inbox.put(None, delta)
    inbox.put(None, delta)
    assert await getter == (None, delta)
    assert await inbox.get(5.0) == (None, delta)


async def test_a_frame_of_many_deltas(worker):
    link = await connect(worker)
    inbox = Inbox()
    link.open("a", inbox)
    link._route(Tokens([TokenDelta("a", 0, [1]), TokenDelta("b", 0, [1]), TokenDelta("a", 1, [2])]))
    assert [(await inbox.get(5.0))[1].index for _ in range(2)] == [0, 1]
    assert link.late_messages == 1
    link.close()
