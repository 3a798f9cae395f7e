"""Admission: who may try to find a worker now, who waits, and who is turned away.

A request that finds every worker full waits in one line, ordered by priority, then resumed streams before new ones,
then first come first served. It is woken when room appears: a heartbeat that shows free blocks, or load that this
replica released. Nobody overtakes a request that waits in front of it.

The line is bounded: when `max_queue` requests wait, the next new one is told to come back later (`Overloaded`).
A resumed request was admitted once and always finds a place. Whoever waits longer than `queue_timeout_s` for one
placement gets `Unavailable`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from bisect import bisect_left, insort
from collections.abc import Callable

from router.config import AdmissionConfig
from router.generation import Overloaded, Unavailable

Key = tuple[int, int, int]  # priority, 0 resumed or 1 new, order of arrival

_FIRST_GUESS_S = 0.25  # seconds between placements out of the line, until some were seen
_MAX_RETRY_AFTER_S = 60.0


class Admission:
    """The line of one router replica. Lives in one event loop."""

    def __init__(self, config: AdmissionConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._arrivals = itertools.count()
        self._parked: list[tuple[Key, Turn]] = []  # sorted
        self._retrying: dict[Turn, None] = {}  # woken, and not yet placed or parked again
        self._closed = False
        self._rooms = 0  # times that room appeared
        self._interval_s = _FIRST_GUESS_S  # smoothed time between placements out of the line
        self._last_placed: float | None = None

    @property
    def waiting(self) -> int:
        return len(self._parked) + len(self._retrying)

    def enter(self, *, priority: int, need_blocks: int, resumed: bool = False) -> Turn:
        """A request that needs a worker. Whatever becomes of it, it must `leave`."""
        key = (priority, 0 if resumed else 1, next(self._arrivals))
        return Turn(self, key, need_blocks, self._config.queue_timeout_s)

    def room(self, free_blocks: int) -> None:
        """A worker has this many free blocks: wake, from the front, as many as they are enough for.

        The first is woken whenever there is a block at all, because its need is only an estimate: it may be cached.
        """
        if free_blocks <= 0:
            return
        self._rooms += 1
        budget = free_blocks
        while self._parked:
            turn = self._parked[0][1]
            if budget < turn.need_blocks and budget < free_blocks:
                return
            budget -= turn.need_blocks
            self._wake(turn)
            if budget <= 0:
                return

    def close(self) -> None:
        """The router stops: whoever waits gets Unavailable, and so does whoever comes later."""
        self._closed = True
        for _, turn in list(self._parked):
            self._wake(turn)

    def retry_after_s(self) -> float:
        """Seconds after which the line should have moved on by its whole length."""
        return min(max(1.0, self._interval_s * (self.waiting + 1)), _MAX_RETRY_AFTER_S)

    # --- used by Turn -----------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("this router is stopping; another one can take the request", retry_after_s=1.0)

    def _someone_before(self, key: Key) -> bool:
        if self._parked and self._parked[0][0] < key:
            return True
        return any(turn.key < key for turn in self._retrying)

    def _park(self, turn: Turn) -> None:
        resumed_or_back = turn.key[1] == 0 or turn.waited
        if not resumed_or_back and self.waiting >= self._config.max_queue:
            retry_after_s = self.retry_after_s()
            raise Overloaded(
                f"every worker is full and {self.waiting} requests wait already "
                f"(admission.max_queue is {self._config.max_queue}); retry in {retry_after_s:.0f} s",
                retry_after_s=retry_after_s,
            )
        self._retrying.pop(turn, None)
        insort(self._parked, (turn.key, turn))

    def _unpark(self, turn: Turn) -> None:
        at = bisect_left(self._parked, turn.key, key=lambda entry: entry[0])
        if at < len(self._parked) and self._parked[at][1] is turn:
            del self._parked[at]

    def _wake(self, turn: Turn) -> None:
        self._unpark(turn)
        self._retrying[turn] = None
        turn.wake()

    def _make_way(self, turn: Turn) -> None:
        """It may have stood in the way of the next, or leave room that it was woken for."""
        self._unpark(turn)
        self._retrying.pop(turn, None)
        if turn.waited and not self._retrying and self._parked:
            self._wake(self._parked[0][1])

    def _count_placed(self) -> None:
        now = self._clock()
        if self._last_placed is not None:
            gap = min(now - self._last_placed, _MAX_RETRY_AFTER_S)
            self._interval_s += 0.1 * (gap - self._interval_s)
        self._last_placed = now


class Turn:
    """One request's place in the line, from looking for a worker to having one."""

    def __init__(self, admission: Admission, key: Key, need_blocks: int, queue_timeout_s: float) -> None:
        self.key = key
        self.need_blocks = need_blocks
        self.waited = False
        self._admission = admission
        self._entered_at = admission._clock()
        self._deadline = self._entered_at + queue_timeout_s
        self._woken: asyncio.Future[None] | None = None
        self._rooms_seen = 0
        self._granted = False  # woken: it need not ask again whether somebody is in front
        self._left = False

    def leave(self, *, placed: bool = False) -> None:
        """Out of the line: `placed` when a worker took the request. Idempotent; every turn must be left."""
        if self._left:
            return
        self._left = True
        if placed and self.waited:
            self._admission._count_placed()
        self._admission._make_way(self)

    def age_s(self) -> float:
        return self._admission._clock() - self._entered_at

    async def mine(self) -> None:
        """Return when nobody is in front. Raises Overloaded when the line is full, Unavailable after the time-out."""
        self._admission._check_open()
        if not self._granted and self._admission._someone_before(self.key):
            await self._wait()
        self._rooms_seen = self._admission._rooms

    async def no_room(self) -> None:
        """Every worker was busy: wait for room. Raises as `mine` does."""
        if self._rooms_seen == self._admission._rooms:
            await self._wait()
        elif self._admission._clock() >= self._deadline:
            raise self._too_late()
        else:
            await asyncio.sleep(0)  # room appeared while the answer was on its way

    async def step_aside(self, pause_s: float) -> None:
        """There may be room, but not for this request yet: let others pass meanwhile. Raises Unavailable."""
        self._granted = False
        self._admission._make_way(self)
        left_s = self._deadline - self._admission._clock()
        await asyncio.sleep(max(min(pause_s, left_s), 0.0))
        if pause_s >= left_s:
            raise self._too_late()

    def wake(self) -> None:
        self._granted = True
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def _wait(self) -> None:
        admission = self._admission
        admission._park(self)
        self.waited, self._granted = True, False
        self._woken = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(max(self._deadline - admission._clock(), 0.0)):
                await self._woken
        except TimeoutError:
            raise self._too_late() from None
        finally:
            self._woken = None
        admission._check_open()

    def _too_late(self) -> Unavailable:
        seconds = self._admission._config.queue_timeout_s
        return Unavailable(
            f"no worker had room for the request within {seconds:g} s (admission.queue_timeout_s)",
            retry_after_s=self._admission.retry_after_s(),
        )
