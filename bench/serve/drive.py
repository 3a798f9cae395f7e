"""Sends sessions to a server: in an open loop when they are due, in a closed loop when a user is free.

Latencies count from when a request was due. In an open loop a slow server, or a generator that falls behind, therefore
can't hide the waiting it causes (coordinated omission); how late sends were is kept in each record.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench.serve.prompts import Part, Piece, PromptMaker
from bench.serve.server import Record, Said, Server
from bench.serve.work import Session


@dataclass
class Run:
    """What a run has done so far; times are time.perf_counter()."""

    began: float
    records: list[Record] = field(default_factory=list)  # in the order of being sent
    in_flight: int = 0
    most_in_flight: int = 0
    sessions: int = 0
    skipped_turns: int = 0  # of sessions in which an earlier turn failed
    ended: float = 0.0
    cpu_s: float = 0.0  # of the generator's own process

    @property
    def done(self) -> int:
        return len(self.records) - self.in_flight


async def open_loop(server: Server, maker: PromptMaker, sessions: Iterable[Session], run: Run) -> None:
    """Every session begins when it is due. Returns when all have ended."""
    loop = asyncio.get_running_loop()
    talks: set[asyncio.Task[None]] = set()
    with _undisturbed(run):
        for session in sessions:
            due = run.began + session.due_s
            for part in session.turns[0].parts:
                maker.piece(part)  # made now, while nothing is due, and remembered
            if (wait_s := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            talk = loop.create_task(_talk(server, maker, session, due, run))
            talks.add(talk)
            talk.add_done_callback(talks.discard)
            if not run.sessions & 15:
                await asyncio.sleep(0)  # behind schedule: the answers must be read all the same
        while talks:
            await asyncio.wait(talks)


async def closed_loop(
    server: Server,
    maker: PromptMaker,
    sessions: Iterable[Session],
    run: Run,
    *,
    users: int,
    until_s: float | None = None,
) -> None:
    """`users` sessions at a time; no new one begins after `until_s`."""
    waiting: Iterator[Session] = iter(sessions)

    async def user() -> None:
        for session in waiting:
            now = time.perf_counter()
            if until_s is not None and now - run.began >= until_s:
                return
            await _talk(server, maker, session, now, run)

    with _undisturbed(run):
        await asyncio.gather(*(user() for _ in range(users)))


async def _talk(server: Server, maker: PromptMaker, session: Session, due: float, run: Run) -> None:
    said: list[Said] = []
    held = 0  # tokens in `said`
    run.sessions += 1
    for number, turn in enumerate(session.turns):
        said.append(Said("user", tuple(maker.piece(part) for part in turn.parts)))
        held += turn.num_tokens
        record = Record(due, turn=number, asked_prompt_tokens=held, asked_output_tokens=turn.output_tokens)
        await _one(server, maker, said, record, run)
        if record.error:
            run.skipped_turns += len(session.turns) - number - 1
            return
        if number + 1 == len(session.turns):
            return
        said.append(Said("assistant", (_answer(maker, record, session),)))
        held += record.tokens
        due = record.ended + session.turns[number + 1].think_s
        await asyncio.sleep(max(0.0, due - time.perf_counter()))


def _answer(maker: PromptMaker, record: Record, session: Session) -> Piece:
    if maker.form == "text":
        return record.text
    if record.token_ids:
        return record.token_ids
    # A server that takes ids but tells none: as many others, which it can't have cached.
    return maker.piece(Part(("answer", id(session), record.turn), record.tokens))


async def _one(server: Server, maker: PromptMaker, said: list[Said], record: Record, run: Run) -> None:
    run.records.append(record)
    run.in_flight += 1
    run.most_in_flight = max(run.most_in_flight, run.in_flight)
    try:
        await server.ask(said, maker, record)
    finally:
        run.in_flight -= 1


@contextmanager
def _undisturbed(run: Run) -> Iterator[None]:
    """The collector's pauses, longer the more records there are, would be lateness of ours."""
    gc.collect()
    gc.freeze()
    before = _cpu_s()
    thresholds = gc.get_threshold()
    gc.set_threshold(10_000, 50, 1_000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        run.ended = time.perf_counter()
        run.cpu_s = _cpu_s() - before


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def told(run: Run, say: Callable[[Run], None], every_s: float = 1.0) -> None:
    """Call `say` again and again, until cancelled."""
    while True:
        await asyncio.sleep(every_s)
        say(run)
