"""What an attempt hears from its workers: events, in one queue.

A reader that falls behind finds the tokens that came meanwhile in one event: a client that reads slowly costs the
router a few bytes a token, however long the answer is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from workers.protocol.messages import Accepted, Failed, PrefillDone, Ticketed, TokenDelta

if TYPE_CHECKING:
    from router.worker_link import WorkerLink

MERGED_BEYOND = 64  # unread events; a reader that is merely busy gets each step's tokens by themselves


class LinkLost:
    """Event: nothing more will come from this worker."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __repr__(self) -> str:
        return f"LinkLost({self.reason!r})"


Event = Ticketed | Accepted | TokenDelta | PrefillDone | Failed | LinkLost


class Inbox:
    """Events of one attempt, from all the workers that take part in it, in order of arrival."""

    __slots__ = ("_deadline", "_due", "_events", "_getter", "_merging", "_timer")

    def __init__(self) -> None:
        self._events: deque[tuple[WorkerLink, Event]] = deque()
        self._getter: asyncio.Future[None] | None = None
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0  # when it rings; not after the deadline
        self._merging = False  # the last event is a delta of this inbox's own making

    def put(self, link: WorkerLink, event: Event) -> None:
        events = self._events
        if len(events) >= MERGED_BEYOND and type(event) is TokenDelta and self._merge(link, event):
            return
        events.append((link, event))
        self._merging = False
        getter = self._getter
        if getter is not None and not getter.done():
            getter.set_result(None)

    async def get(self, timeout_s: float) -> tuple[WorkerLink, Event]:
        """The next event and who sent it. Raises TimeoutError. One reader at a time."""
        events = self._events
        while not events:
            loop = asyncio.get_running_loop()
            self._getter = getter = loop.create_future()
            self._deadline = deadline = loop.time() + timeout_s
            if self._timer is None or deadline < self._due:
                self._set_timer(loop)
            try:
                await getter
            finally:
                self._getter = None
        return events.popleft()

    def close(self) -> None:
        """Nobody reads any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _merge(self, link: WorkerLink, event: TokenDelta) -> bool:
        """Put the tokens behind those of the last event. False: they do not follow it."""
        sender, last = self._events[-1]
        if sender is not link or type(last) is not TokenDelta or last.finish_reason is not None:
            return False
        if event.index != last.index + len(last.tokens):
            return False
        if not self._merging:  # messages are not changed, lists of this inbox's own are
            self._merging = True
            tokens, logprobs = list(last.tokens), list(last.logprobs)
        else:
            tokens, logprobs = last.tokens, last.logprobs
        tokens += event.tokens
        logprobs += event.logprobs
        if event.finish_reason is None and tokens is last.tokens:
            return True
        merged = TokenDelta(
            last.request_id,
            last.index,
            tokens,
            logprobs,
            event.finish_reason,
            event.stop_token,
            last.cached_tokens,
        )
        self._events[-1] = (link, merged)
        return True

    # One timer for many waits: making and cancelling one for each would cost more than the wait itself.

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self.close()
        self._due = self._deadline
        self._timer = loop.call_at(self._due, self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        getter = self._getter
        if getter is None or getter.done():
            return
        if loop.time() >= self._deadline:
            getter.set_exception(TimeoutError())
        else:
            self._set_timer(loop)
