"""Requests that are being served: who ends them when their client leaves, and when the router stops."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from types import TracebackType

from router.generation import DeadlineExceeded, GenerationError, Unavailable


class ClientGone(GenerationError):
    """Nobody is left to read an answer. Nothing is sent, only counted."""

    status = 499
    kind = "cancelled"

    def __init__(self) -> None:
        super().__init__("the client closed the connection")


class Session:
    """`async with sessions.open() as session:` around the serving of one request, in the request's own task.

    `end(error)` stops the body wherever it waits, as asyncio.timeout does: what the body holds is released by its own
    `finally` clauses, and the error comes out of the `async with`.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._error: GenerationError | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._timer: asyncio.TimerHandle | None = None

    def end(self, error: GenerationError) -> None:
        if self._task is not None and self._error is None:
            self._error = error
            self._task.cancel()

    def end_at(self, deadline: float | None) -> None:
        """With DeadlineExceeded, at this time.monotonic(); None: never. Once, inside the `async with`."""
        if deadline is not None:
            error = DeadlineExceeded("the request's timeout has passed", reason="deadline")
            left_s = max(deadline - time.monotonic(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(left_s, self.end, error)

    async def __aenter__(self) -> Session:
        if self._sessions.draining:
            raise restarting()
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()
        self._sessions._enter(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sessions._leave(self)
        if self._timer is not None:
            self._timer.cancel()
        task, self._task = self._task, None
        assert task is not None
        if (
            self._error is not None
            and task.uncancel() <= self._cancelling
            and kind is not None
            and issubclass(kind, asyncio.CancelledError)
        ):
            raise self._error from error


class Sessions:
    """Those of one router, of HTTP and gRPC together."""

    def __init__(self) -> None:
        self._open: set[Session] = set()
        self._none_open = asyncio.Event()
        self._none_open.set()
        self.draining = False

    def open(self) -> Session:
        return Session(self)

    def __len__(self) -> int:
        return len(self._open)

    async def drain(self, timeout_s: float) -> None:
        """Nothing new is taken; what has not ended after `timeout_s` is ended with an error that says retry."""
        self.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none_open.wait()
        for session in list(self._open):
            session.end(restarting())

    def _enter(self, session: Session) -> None:
        self._open.add(session)
        self._none_open.clear()

    def _leave(self, session: Session) -> None:
        self._open.discard(session)
        if not self._open:
            self._none_open.set()


def restarting() -> Unavailable:
    return Unavailable("this router is being stopped: retry, another one will answer", retry_after_s=1.0)
