"""Events of an attempt: in order, bounded when nobody reads, and waited for no longer than asked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.inbox import MERGED_BEYOND, Event, Inbox, LinkLost
from workers.protocol.messages import Accepted, PrefillDone, TokenDelta, TokenLogprobs

LINK: Any = "a link"
OTHER: Any = "another"
DONE = PrefillDone("r", 0, 0.0, 0.0, 0.0, 0, "shm")


async def unread(inbox: Inbox) -> list[tuple[Any, Event]]:
    return [await inbox.get(1.0) for _ in range(len(inbox._events))]


def deltas(count: int, start: int = 0) -> list[TokenDelta]:
    return [
        TokenDelta("r", index, [index], [TokenLogprobs(-1.0 * index)], cached_tokens=7 if index == 0 else 0)
        for index in range(start, start + count)
    ]


async def test_what_nobody_reads_becomes_one_event() -> None:
    inbox = Inbox()
    sent = deltas(10_000)
    for delta in sent:
        inbox.put(LINK, delta)
    last = TokenDelta("r", 10_000, [1, 2], [], "stop", 2)
    inbox.put(LINK, last)
    events = [event for _, event in await unread(inbox)]
    assert len(events) == MERGED_BEYOND
    assert events[:-1] == sent[: MERGED_BEYOND - 1]  # a reader that is merely busy sees each step
    merged = events[-1]
    assert isinstance(merged, TokenDelta)
    assert merged.index == MERGED_BEYOND - 1
    assert merged.tokens == [*range(MERGED_BEYOND - 1, 10_000), 1, 2]
    assert [one.logprob for one in merged.logprobs] == [-1.0 * n for n in range(MERGED_BEYOND - 1, 10_000)]
    assert (merged.finish_reason, merged.stop_token) == ("stop", 2)
    assert [delta.tokens for delta in sent] == [[n] for n in range(10_000)]  # messages are not changed


async def test_merging_begins_anew_when_the_reader_has_caught_up() -> None:
    inbox = Inbox()
    for delta in deltas(200):
        inbox.put(LINK, delta)
    tokens = [token for _, event in await unread(inbox) for token in event.tokens]  # type: ignore[union-attr]
    for delta in deltas(200, start=200):
        inbox.put(LINK, delta)
    again = [event for _, event in await unread(inbox)]
    assert again[0] == TokenDelta("r", 200, [200], [TokenLogprobs(-200.0)])
    tokens += [token for event in again for token in event.tokens]  # type: ignore[union-attr]
    assert tokens == list(range(400))


_event = st.one_of(
    st.just(DONE),
    st.just(Accepted("r", 0)),
    st.just(LinkLost("gone")),
    st.builds(
        TokenDelta,
        st.just("r"),
        st.integers(0, 3),  # 0: follows what came before; else it leaves a gap
        st.lists(st.integers(0, 9), max_size=3),
        finish_reason=st.sampled_from([None, None, None, "stop"]),
    ),
)


@given(st.lists(st.tuples(st.sampled_from([LINK, OTHER]), _event), max_size=40), st.integers(0, 20))
@settings(max_examples=200, deadline=None)
def test_nothing_is_lost_added_or_put_in_another_order(sent: list[tuple[Any, Event]], read: int) -> None:
    """Against a queue that merges nothing, by what the events say of tokens and of everything else."""

    async def scenario() -> None:
        inbox = Inbox()
        for delta in deltas(MERGED_BEYOND - 1):
            inbox.put(OTHER, delta)
        follows = MERGED_BEYOND - 1
        given_: list[tuple[Any, Event]] = [(OTHER, delta) for delta in deltas(MERGED_BEYOND - 1)]
        got: list[tuple[Any, Event]] = []
        for number, (link, event) in enumerate(sent):
            if isinstance(event, TokenDelta):
                event = TokenDelta("r", follows + event.index, event.tokens, [], event.finish_reason)
                follows = event.index + len(event.tokens)
            given_.append((link, event))
            inbox.put(link, event)
            if number == read:
                got.append(await inbox.get(1.0))
        got += await unread(inbox)
        assert flat(got) == flat(given_)

    asyncio.run(scenario())


def flat(events: list[tuple[Any, Event]]) -> list[Any]:
    found: list[Any] = []
    for link, event in events:
        if isinstance(event, TokenDelta):
            found += [(link, event.index + at, token) for at, token in enumerate(event.tokens)]
            if event.finish_reason is not None:
                found.append((link, event.finish_reason))
        else:
            found.append((link, event))
    return found


async def test_waiting_ends_in_time_whatever_was_waited_for_before() -> None:
    inbox = Inbox()
    loop = asyncio.get_running_loop()
    loop.call_later(0.01, inbox.put, LINK, DONE)
    assert await inbox.get(60.0) == (LINK, DONE)  # leaves a timer that is much too late for the next
    for _ in range(2):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await inbox.get(0.02)
    waiter = asyncio.create_task(inbox.get(60.0))  # and one that is too early
    await asyncio.sleep(0.06)
    assert not waiter.done()
    inbox.put(LINK, DONE)
    assert await waiter == (LINK, DONE)


async def test_a_cancelled_reader_leaves_nothing_behind() -> None:
    inbox = Inbox()
    waiter = asyncio.create_task(inbox.get(60.0))
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    timer = inbox._timer
    assert timer is not None
    inbox.close()
    assert timer.cancelled()
    inbox.close()  # any number of times
