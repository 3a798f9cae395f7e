"""What an attempt hears from its workers: events, in one queue."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from workers.protocol.messages import Accepted, Failed, PrefillDone, Ticketed, TokenDelta

if TYPE_CHECKING:
    from router.worker_link import WorkerLink


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

    __slots__ = ("_events", "_getter")

    def __init__(self) -> None:
        self._events: deque[tuple[WorkerLink, Event]] = deque()
        self._getter: asyncio.Future[None] | None = None

    def put(self, link: WorkerLink, event: Event) -> None:
        self._events.append((link, event))
        if self._getter is not None and not self._getter.done():
            self._getter.set_result(None)

    async def get(self, timeout_s: float) -> tuple[WorkerLink, Event]:
        """The next event and who sent it. Raises TimeoutError. One reader at a time."""
        while not self._events:
            self._getter = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._getter
            finally:
                self._getter = None
        return self._events.popleft()
