"""The line with a clock and asyncio around it: what a request awaits on its way to a worker."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from router.admission.line import Line
from router.admission.order import Entry, Share
from router.config import DEFAULT_TENANT, AdmissionConfig
from router.generation import Unavailable


class QueueMetrics(Protocol):
    """What is counted by tenant. The names are in router/dispatch_metrics.py."""

    def waited(self, tenant: str, seconds: float) -> None:
        """A request of the tenant was placed, after so many seconds in the line; 0 when it need not wait."""


class Admission:
    """The line of one router replica. Lives in one event loop. Without `shares` there is one tenant."""

    def __init__(
        self,
        config: AdmissionConfig,
        shares: Mapping[str, Share] | None = None,
        metrics: QueueMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._line = Line(config, shares)
        self._metrics = metrics
        self._clock = clock
        self._turns: dict[Entry, Turn] = {}  # of those that wait
        self._closed = False
        self._rooms = 0  # times that room appeared

    @property
    def waiting(self) -> int:
        return self._line.waiting

    def waiting_of(self, tenant: str) -> int:
        return self._line.waiting_of(tenant)

    def enter(
        self,
        *,
        priority: int,
        need_blocks: int,
        resumed: bool = False,
        tenant: str = DEFAULT_TENANT,
        deadline: float | None = None,
        work: float | Callable[[], float] = 1.0,
    ) -> Turn:
        """A request that needs a worker. Whatever becomes of it, it must `leave`.

        `deadline` on the clock of this object; `work` in tokens, asked for only when somebody waits.
        """
        return Turn(self, Entry(tenant, priority, need_blocks, work, resumed, deadline))

    def room(self, free_blocks: int, *, requests: float = math.inf, tokens: float = math.inf) -> None:
        """A worker can take so many blocks, requests and tokens to compute: wake, from the front, whom they are enough for."""
        if free_blocks <= 0:
            return
        self._rooms += 1
        now = self._clock()
        self._wake(self._line.room(free_blocks, now, requests=requests, tokens=tokens))
        self._tell_dropped(now)

    def first_token(self, seconds: float) -> None:
        """What a request took from being placed to its first token."""
        self._line.first_token(seconds)

    def close(self) -> None:
        """The router stops: whoever waits gets Unavailable, and so does whoever comes later."""
        self._closed = True
        for turn in list(self._turns.values()):
            turn.wake()

    def retry_after_s(self, tenant: str = DEFAULT_TENANT) -> float:
        """Seconds after which a new request of this tenant should find its way."""
        return self._line.retry_after_s(tenant, self._clock())

    # --- used by Turn -----------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("this router is stopping; another one can take the request", retry_after_s=1.0)

    def _wake(self, entries: list[Entry]) -> None:
        for entry in entries:
            turn = self._turns.get(entry)
            if turn is not None:  # else its task was cancelled, and it leaves in a moment
                turn.wake()

    def _tell_dropped(self, now: float) -> None:
        for entry in self._line.expired(now):
            turn = self._turns.get(entry)
            if turn is not None:
                turn.wake()


class Turn:
    """One request's place in the line, from looking for a worker to having one."""

    def __init__(self, admission: Admission, entry: Entry) -> None:
        self._admission = admission
        self._line = admission._line
        self._entry = entry
        self._entered_at = admission._clock()
        self._entered = False
        self._woken: asyncio.Future[None] | None = None
        self._rooms_seen = 0
        self._granted = False  # woken: it need not ask again whether somebody is in front
        self._left = False

    def leave(self, *, placed: bool = False) -> None:
        """Out of the line: `placed` when a worker took the request. Idempotent; every turn must be left."""
        if self._left:
            return
        self._left = True
        admission, entry, now = self._admission, self._entry, self._admission._clock()
        if placed and admission._metrics is not None:
            admission._metrics.waited(entry.tenant, now - self._entered_at if entry.waited else 0.0)
        admission._wake(self._line.placed(entry, now) if placed else self._line.leave(entry, now))
        admission._tell_dropped(now)

    def age_s(self) -> float:
        return self._admission._clock() - self._entered_at

    async def mine(self) -> None:
        """Return when nobody is in front.

        Raises Overloaded or TenantLimit when it may not wait, Unavailable or DeadlineExceeded when it waited too long.
        """
        admission, line = self._admission, self._line
        admission._check_open()
        if not self._granted:
            now = admission._clock()
            first, self._entered = not self._entered, True
            free = line.enter(self._entry, now) if first else line.again(self._entry, now)
            if not free:
                admission._tell_dropped(now)
                await self._wait()
        self._rooms_seen = admission._rooms

    async def no_room(self) -> None:
        """Every worker was busy: wait for room. Raises as `mine` does."""
        admission = self._admission
        now = admission._clock()
        if self._rooms_seen == admission._rooms:
            self._line.no_room(self._entry, now)
            admission._tell_dropped(now)
            await self._wait()
        elif now >= self._line.last_moment(self._entry):
            raise self._line.too_late(self._entry, now)
        else:
            await asyncio.sleep(0)  # room appeared while the answer was on its way

    async def step_aside(self, pause_s: float) -> None:
        """There may be room, but not for this request yet: let others pass meanwhile. Raises as `mine` does."""
        admission, now = self._admission, self._admission._clock()
        self._granted = False
        admission._wake(self._line.aside(self._entry, now))
        left_s = self._line.last_moment(self._entry) - now
        await asyncio.sleep(max(min(pause_s, left_s), 0.0))
        if pause_s >= left_s:
            raise self._line.too_late(self._entry, admission._clock())

    def wake(self) -> None:
        self._granted = True
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def _wait(self) -> None:
        """The line has it among those that wait."""
        admission, entry = self._admission, self._entry
        if entry.why is not None:
            raise entry.why
        self._granted = False
        self._woken = asyncio.get_running_loop().create_future()
        admission._turns[entry] = self
        try:
            async with asyncio.timeout(max(self._line.last_moment(entry) - admission._clock(), 0.0)):
                await self._woken
        except TimeoutError:
            if entry.why is None:
                raise self._line.too_late(entry, admission._clock()) from None
        finally:
            self._woken = None
            del admission._turns[entry]
        if entry.why is not None:
            raise entry.why
        admission._check_open()
