from __future__ import annotations

import asyncio

import pytest

from router.generation import Unavailable
from router.sessions import ClientGone, Session, Sessions


async def held(sessions: Sessions, entered: list[Session], log: list[str]) -> str:
    async with sessions.open() as session:
        entered.append(session)
        try:
            await asyncio.sleep(10)
        finally:
            log.append("released")
    return "ended"


async def test_ending_a_session_stops_its_body_and_raises_the_error() -> None:
    sessions, entered, log = Sessions(), [], []
    task = asyncio.create_task(held(sessions, entered, log))
    await asyncio.sleep(0)
    assert len(sessions) == 1
    entered[0].end(ClientGone())
    entered[0].end(Unavailable("too late: the first reason counts"))
    with pytest.raises(ClientGone):
        await task
    assert log == ["released"]
    assert len(sessions) == 0
    assert task.cancelling() == 0


async def test_a_cancellation_from_outside_stays_one() -> None:
    sessions, entered, log = Sessions(), [], []
    task = asyncio.create_task(held(sessions, entered, log))
    await asyncio.sleep(0)
    task.cancel()
    entered[0].end(ClientGone())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(sessions) == 0


async def test_an_error_of_the_body_is_kept() -> None:
    async def failing() -> None:
        async with sessions.open() as session:
            try:
                session.end(ClientGone())
                await asyncio.sleep(1)
            finally:
                raise KeyError("the body's own")

    sessions = Sessions()
    with pytest.raises(KeyError):
        await asyncio.create_task(failing())
    assert len(sessions) == 0


async def test_ending_after_the_end_does_nothing() -> None:
    sessions = Sessions()
    async with sessions.open() as session:
        pass
    session.end(ClientGone())
    await asyncio.sleep(0)


async def test_draining_waits_then_ends_and_takes_nothing_new() -> None:
    sessions, entered, log = Sessions(), [], []

    async def short() -> str:
        async with sessions.open():
            await asyncio.sleep(0.05)
        return "ended"

    quick = asyncio.create_task(short())
    slow = asyncio.create_task(held(sessions, entered, log))
    await asyncio.sleep(0)
    await sessions.drain(0.2)
    assert await quick == "ended"
    with pytest.raises(Unavailable, match="retry"):
        await slow
    with pytest.raises(Unavailable, match="retry"):
        await short()
    await sessions.drain(10.0)  # nothing is open: at once
