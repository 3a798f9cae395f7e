"""Runs a plan and writes its answer, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from functools import partial
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.chat.answer import Piece
from router.generation import GenerationError
from router.http.collected import Collected
from router.http.errors import error_event, error_response
from router.http.explained import explaining
from router.http.front import Front
from router.http.plan import Plan
from router.http.usage import Usage
from router.metrics import RequestRecord
from router.sequences import close, run, run_all
from router.sessions import ClientGone, Session

_SSE_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx would wait for a full buffer
    ],
}
_DONE = b"data: [DONE]\n\n"


class Format(Protocol):
    """How one endpoint words its answers. The bytes of `opening`, `chunk` and `usage` are whole events, or none."""

    def opening(self, choice: int) -> bytes: ...

    def chunk(self, choice: int, piece: Piece) -> bytes: ...

    def usage(self, usage: dict[str, Any]) -> bytes: ...

    def whole(self, collected: list[Collected], usage: dict[str, Any]) -> bytes: ...


class Reply(Response):
    """An ASGI response that generates while it is sent. Closed at once when the client leaves."""

    def __init__(self, plan: Plan, form: Format, api: str, arrived: float, front: Front) -> None:
        """`arrived`: time.perf_counter() when the request came in."""
        # Not Response's own __init__: it wants the body and fixes the headers.
        self.status_code = 200
        self.background = None
        self._plan = plan
        self._form = form
        self._api = api
        self._arrived = arrived
        self._front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = self._front.metrics.request(self._plan.model.name, self._api, self._arrived)
        outcome = "cancelled"  # what remains when this task itself is cancelled
        send = explaining(scope, send, self._front.dispatcher, self._plan.request_id)
        writer = (
            _Stream(self._plan, self._form, send)
            if self._plan.stream
            else _Whole(self._plan, self._form, send)
        )
        try:
            async with self._front.sessions.open() as session:
                permit = self._plan.permit()
                watch = asyncio.create_task(_end_when_gone(receive, session))
                session.end_at(self._plan.deadline)
                finished = False
                try:
                    await self._generate(writer, record)
                    finished = True
                finally:
                    watch.cancel()
                    permit.settle(writer.usage.completion_tokens, finished, time.monotonic())
                    self._front.metrics.used(self._plan.tenant.name, permit)
            await writer.finish()
            outcome = writer.outcome
        except ClientGone as error:
            outcome = error.kind
        except GenerationError as error:
            outcome = error.kind
            if error.reason is not None:
                self._front.metrics.refused(self._plan.tenant.name, error.reason)
            await writer.fail(error, scope, receive)
        except Exception:
            outcome = "internal_error"
            raise
        finally:
            record.end(outcome)

    async def _generate(self, writer: _Stream | _Whole, record: RequestRecord) -> None:
        sequences = self._plan.sequences(self._front.prompts, record)
        record.prepared()
        if len(sequences) == 1:
            await run(self._front.dispatcher, sequences[0], partial(writer.add, 0))
            return
        pieces = run_all(self._front.dispatcher, sequences)
        try:
            async for choice, piece in pieces:
                await writer.add(choice, piece)
        finally:
            await close(pieces)


async def _end_when_gone(receive: Receive, session: Session) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    session.end(ClientGone())


async def _nothing() -> None:
    pass


class _Whole:
    """Collects, then sends one JSON object."""

    def __init__(self, plan: Plan, form: Format, send: Send) -> None:
        self._form = form
        self._send = send
        self.usage = Usage(plan)
        self._choices = [Collected() for _ in range(plan.num_choices)]
        self.outcome = "stop"

    async def add(self, choice: int, piece: Piece) -> None:
        self.usage.add(choice, piece)
        self._choices[choice].add(piece)
        if choice == 0 and piece.finish_reason is not None:
            self.outcome = piece.finish_reason

    async def finish(self) -> None:
        body = self._form.whole(self._choices, self.usage.as_dict())
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def fail(self, error: GenerationError, scope: Scope, receive: Receive) -> None:
        await error_response(error)(scope, receive, self._send)


class _Stream:
    """Sends events as pieces come. The status waits for the first piece: until then an error is an HTTP error."""

    def __init__(self, plan: Plan, form: Format, send: Send) -> None:
        self._include_usage = plan.include_usage
        self._form = form
        self._send = send
        self.usage = Usage(plan)
        self._opened = [False] * plan.num_choices
        self._started = False
        self.outcome = "stop"

    def add(self, choice: int, piece: Piece) -> Awaitable[None]:
        """To be awaited: returns when the client has taken enough of what came before."""
        self.usage.add(choice, piece)
        events = self._form.chunk(choice, piece)
        if not self._opened[choice]:
            self._opened[choice] = True
            events = self._form.opening(choice) + events
        if choice == 0 and piece.finish_reason is not None:
            self.outcome = piece.finish_reason
        if not self._started:
            return self._start(events)
        return self._write(events)

    async def _start(self, events: bytes) -> None:
        self._started = True
        await self._send(_SSE_START)
        await self._write(events)

    def _write(self, events: bytes) -> Awaitable[None]:
        if not events:
            return _nothing()
        return self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def finish(self) -> None:
        usage = self._form.usage(self.usage.as_dict()) if self._include_usage else b""
        await self._send({"type": "http.response.body", "body": usage + _DONE})

    async def fail(self, error: GenerationError, scope: Scope, receive: Receive) -> None:
        if self._started:
            await self._send({"type": "http.response.body", "body": error_event(error)})
        else:
            await error_response(error)(scope, receive, self._send)
