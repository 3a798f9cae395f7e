"""The queue for workers: who is next, who waits, who is turned away. Pure: no clock, no loop; `now` is in seconds.

Order. A resumed stream goes before everybody, since its client is in the middle of an answer. Then classes: a lower
`priority` goes first, strictly, except that of four places one goes to a less urgent class in which the next request
has waited `ageing_s`, so that none starves. Within a class tenants share by weight: start-time fair queueing (Goyal,
Vin, Cheng, 1996) over estimated work, so that a tenant waits for its own requests and for its share, however many the
others send. Within a tenant, first come first served. Nobody overtakes a request that waits in front of it.

Bounds. At most `max_queue` requests wait. When the line is full a request of a tenant that has little in it takes the
place of the last one of whoever has most, or of a less urgent class. A request whose predicted wait (work before it by
the measured rate at which the line moves) is longer than it may wait is turned away when it comes, not after it has
waited; and whoever waits too long all the same is dropped before it costs a worker anything. A resumed request was
admitted once and always finds a place, and so does one that was let try and found no room.

The life of an entry: `enter`; False, it waits, until it is among those that `room` (or another's `placed`, `leave`,
`aside`) returns. Let try, it is `placed`, or finds `no_room` and waits again. Or it `leave`s, at any time.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping

from router.admission.drain import DrainRate, Typical
from router.admission.order import Entry, Key, Order, Share
from router.config import AdmissionConfig
from router.generation import DeadlineExceeded, GenerationError, Overloaded, TenantLimit, Unavailable

__all__ = ["Entry", "Line", "Share"]

_FIRST_GUESS_S = 0.25  # seconds between placements out of the line, until some were seen
_MIN_RETRY_AFTER_S = 1.0
_MAX_RETRY_AFTER_S = 60.0
# A prediction this much longer than queue_timeout_s turns a request away. Goals and deadlines are taken at their word.
_DOUBT = 1.5
# However long first tokens take, a request may wait this part of ttft_goal_s: a line that may not form keeps nobody busy.
_LEAST_WAIT = 0.1
_SLACK = 64  # entries of the heap that may have left before it is cleaned


class Line:
    """The line of one router replica. `shares` are those of the tenants; others have weight 1 and no limit."""

    def __init__(self, config: AdmissionConfig, shares: Mapping[str, Share] | None = None) -> None:
        self._config = config
        self._order = Order(shares or {}, config.ageing_s)
        self._arrivals = itertools.count()
        self._give_ups: list[tuple[float, int, Entry]] = []  # a heap; those that have left are skipped
        self._dropped: list[Entry] = []  # to be told
        self._drain = DrainRate()
        self._first_token = Typical()

    @property
    def waiting(self) -> int:
        return self._order.waiting

    def waiting_of(self, tenant: str) -> int:
        return self._order.waiting_of(tenant)

    # --- the life of an entry ---------------------------------------------------------------------------------------

    def enter(self, entry: Entry, now: float) -> bool:
        """True: it may try now. False: somebody is in front, it waits.

        Raises Overloaded, TenantLimit, Unavailable or DeadlineExceeded when it may not wait; it has left then.
        """
        entry.arrival = next(self._arrivals)
        entry.entered_at = now
        if entry.deadline is not None and entry.deadline <= now:
            raise deadline_exceeded(now - entry.deadline)
        return self.again(entry, now)

    def again(self, entry: Entry, now: float) -> bool:
        """After `aside`: as `enter`, with the place it had."""
        if not self.waiting:
            return True  # no tag: where nobody waits there is nothing to share, and nothing to compute
        key = entry.key or self._order.key_for(entry)
        if self._order.is_front(key, entry):
            if entry.key is None:
                self._order.join(entry, key)
            return True
        self.no_room(entry, now)
        return False

    def no_room(self, entry: Entry, now: float) -> None:
        """It has tried in vain, or may not try yet: it waits. Raises as `enter` does."""
        key = entry.key or self._order.key_for(entry)
        if not (entry.resumed or entry.waited):
            try:
                self._check_may_wait(entry, key, now)
            except GenerationError:
                self.leave(entry, now)
                raise
        if entry.key is None:
            self._order.join(entry, self._order.key_for(entry))  # anew: another may have been put out for it
        self._note_last_moment(entry)
        self._order.take_back(entry)
        self._order.park(entry)
        entry.waited = True
        self._drain.busy(True, now)

    def room(
        self, free_blocks: int, now: float, *, requests: float = math.inf, tokens: float = math.inf
    ) -> list[Entry]:
        """A worker can take so many blocks, requests and tokens to compute: let try, from the front, whom they are enough for.

        The first is let try whenever there is anything at all, because its need is only an estimate: it may be cached.
        When there was more room than these need, the next is let try as soon as they are placed.
        """
        self._drop_late(now)
        woken: list[Entry] = []
        while free_blocks > 0 and requests > 0 and tokens > 0 and self._order.num_parked:
            entry, aged = self._order.next(now)
            if woken and (free_blocks < entry.need_blocks or tokens < entry.cost):
                break
            free_blocks -= entry.need_blocks
            tokens -= entry.cost
            requests -= 1
            self._order.let_try(entry, aged)
            woken.append(entry)
        return woken

    def placed(self, entry: Entry, now: float) -> list[Entry]:
        """A worker took it. Returns who may try next."""
        if entry.waited:
            self._drain.placed(entry.cost, now)
        self._order.forget(entry, served=True)
        entry.counted = 0
        return self.leave(entry, now)

    def leave(self, entry: Entry, now: float) -> list[Entry]:
        """Placed, refused or gone. Idempotent. Returns who may try next: it may have stood in the way."""
        woken = self.aside(entry, now)
        self._order.forget(entry)
        return woken

    def aside(self, entry: Entry, now: float) -> list[Entry]:
        """Out of the way for a while: it keeps its place among those that come `again`. Returns who may try next."""
        in_the_way = self._order.tries(entry) or entry is self._order.front()
        if entry.parked:
            self._order.unpark(entry)
        self._order.take_back(entry)
        woken: list[Entry] = []
        if in_the_way and not self._order.anybody_tries:  # it may leave room that it was woken for
            self._drop_late(now)
            if self._order.num_parked:
                following, aged = self._order.next(now)
                self._order.let_try(following, aged)
                woken.append(following)
        if not self.waiting:
            self._drain.busy(False, now)
        return woken

    def expired(self, now: float) -> list[Entry]:
        """Those dropped since the last call: too late, or put out by another. `entry.why` says what they are told."""
        self._drop_late(now)
        dropped, self._dropped = self._dropped, []
        return dropped

    def first_token(self, seconds: float) -> None:
        """What a request took from being placed to its first token: goals and deadlines must leave time for it."""
        self._first_token.add(seconds)

    # --- what lies ahead --------------------------------------------------------------------------------------------

    def next_expiry(self) -> float | None:
        """When the next entry will have waited too long, if it is still here."""
        while self._give_ups and not self._give_ups[0][2].parked:
            heapq.heappop(self._give_ups)[2].give_up_at = 0.0
        return self._give_ups[0][0] if self._give_ups else None

    def last_moment(self, entry: Entry) -> float:
        """When this entry will have waited too long."""
        return self._last_moment(entry)[0]

    def predicted_wait_s(self, entry: Entry, now: float) -> float | None:
        """Seconds until this entry could be placed, if it came now. None: not enough was seen yet."""
        return self._predicted_s(entry.key or self._order.key_for(entry), now)

    def retry_after_s(self, tenant: str, now: float) -> float:
        """Seconds after which a new request of this tenant should find its way, at the pace of late."""
        predicted = self.predicted_wait_s(Entry(tenant), now)
        if predicted is None:
            predicted = _FIRST_GUESS_S * (self.waiting + 1)
        return min(max(predicted, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)

    def check(self) -> None:
        """The state is whole. For tests: it walks through everything."""
        self._order.check()
        assert len(self._give_ups) <= 2 * self._order.num_parked + _SLACK + 1

    # --- who may wait -----------------------------------------------------------------------------------------------

    def _check_may_wait(self, entry: Entry, key: Key, now: float) -> None:
        limit = self._order.share(entry.tenant).max_queue
        if limit is not None and self._order.parked_of(entry.tenant) >= limit:
            retry_after_s = self.retry_after_s(entry.tenant, now)
            raise TenantLimit(
                f"tenant {entry.tenant!r} has {limit} requests waiting for room already (max_queue is {limit}); "
                f"retry in {retry_after_s:.0f} s",
                retry_after_s=retry_after_s,
                reason="tenant_queue",
            )
        self._check_can_make_it(entry, key, now)
        if self.waiting >= self._config.max_queue and not self._put_out(entry, now):
            retry_after_s = self.retry_after_s(entry.tenant, now)
            raise Overloaded(
                f"every worker is full and {self.waiting} requests wait already "
                f"(admission.max_queue is {self._config.max_queue}); retry in {retry_after_s:.0f} s",
                retry_after_s=retry_after_s,
                reason="queue_full",
            )

    def _check_can_make_it(self, entry: Entry, key: Key, now: float) -> None:
        last_moment, bound = self._last_moment(entry)
        left_s = last_moment - now
        predicted_s = self._predicted_s(key, now)
        if predicted_s is None and left_s > 0:
            return
        predicted_s = predicted_s or 0.0
        may_s = left_s * _DOUBT if bound == "queue_timeout" else left_s
        if predicted_s <= may_s and left_s > 0:
            return
        retry_after_s = min(max(predicted_s - left_s, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)
        if bound == "deadline":
            raise Unavailable(
                f"the request would wait about {predicted_s:.1f} s for a worker and its timeout leaves "
                f"{max(left_s, 0.0):.1f} s for that; retry in {retry_after_s:.0f} s or with a longer timeout",
                retry_after_s=retry_after_s,
                reason="deadline",
            )
        setting = "ttft_goal_s" if bound == "ttft_goal" else "queue_timeout_s"
        raise Overloaded(
            f"every worker is full, and a request that comes now would wait about {predicted_s:.1f} s; "
            f"admission.{setting} allows {max(left_s, 0.0):.1f} s; retry in {retry_after_s:.0f} s",
            retry_after_s=retry_after_s,
            reason="predicted_wait",
        )

    def _predicted_s(self, key: Key, now: float) -> float | None:
        before = self._order.work_before(key)
        if not before:
            return 0.0
        rate = self._drain.work_per_s(now)
        return None if rate is None else before / rate

    def _last_moment(self, entry: Entry) -> tuple[float, str]:
        """When waiting has no sense any more, and what says so."""
        bounds = [(entry.entered_at + self._config.queue_timeout_s, "queue_timeout")]
        goal_s = self._config.ttft_goal_s
        if goal_s is not None and not entry.resumed:
            may_wait_s = max(goal_s - self._first_token.upper, _LEAST_WAIT * goal_s)
            bounds.append((entry.entered_at + may_wait_s, "ttft_goal"))
        if entry.deadline is not None:
            bounds.append((entry.deadline - self._first_token.upper, "deadline"))
        return min(bounds)

    def _put_out(self, entry: Entry, now: float) -> bool:
        """The line is full: drop one that has less right to a place than this one. False: there is none."""
        weaker = self._order.weaker(entry)
        if weaker is None:
            return False
        retry_after_s = self.retry_after_s(weaker.tenant, now)
        self._drop(
            weaker,
            Overloaded(
                f"every worker is full, {self.waiting} requests wait (admission.max_queue is "
                f"{self._config.max_queue}), and others have a better right to a place; "
                f"retry in {retry_after_s:.0f} s",
                retry_after_s=retry_after_s,
                reason="queue_full",
            ),
        )
        return True

    # --- those that waited too long ---------------------------------------------------------------------------------

    def _drop_late(self, now: float) -> None:
        while (at := self.next_expiry()) is not None and at <= now:
            entry = self._give_ups[0][2]
            self._drop(entry, self.too_late(entry, now))
        if not self.waiting:
            self._drain.busy(False, now)

    def _note_last_moment(self, entry: Entry) -> None:
        if entry.give_up_at:
            return  # it is in the heap since it waited before
        if len(self._give_ups) > 2 * self._order.num_parked + _SLACK:
            for _, _, other in self._give_ups:
                if not other.parked:
                    other.give_up_at = 0.0
            self._give_ups = [item for item in self._give_ups if item[2].parked]
            heapq.heapify(self._give_ups)
        entry.give_up_at = self._last_moment(entry)[0]
        heapq.heappush(self._give_ups, (entry.give_up_at, entry.arrival, entry))

    def _drop(self, entry: Entry, why: GenerationError) -> None:
        entry.why = why
        self._order.unpark(entry)
        self._order.forget(entry)
        self._dropped.append(entry)

    def too_late(self, entry: Entry, now: float) -> GenerationError:
        """What an entry is told that waited as long as it may."""
        bound = self._last_moment(entry)[1]
        retry_after_s = self.retry_after_s(entry.tenant, now)
        if bound == "deadline":
            return deadline_exceeded(0.0, f"after {now - entry.entered_at:.1f} s in the queue")
        if bound == "ttft_goal":
            return Unavailable(
                f"no worker had room for the request in time for its first token "
                f"(admission.ttft_goal_s is {self._config.ttft_goal_s:g})",
                retry_after_s=retry_after_s,
                reason="ttft_goal",
            )
        return Unavailable(
            f"no worker had room for the request within {self._config.queue_timeout_s:g} s "
            "(admission.queue_timeout_s)",
            retry_after_s=retry_after_s,
            reason="queue_timeout",
        )


def deadline_exceeded(late_s: float, where: str = "") -> DeadlineExceeded:
    passed = f"passed {late_s:.1f} s ago" if late_s >= 0.05 else "has passed"
    return DeadlineExceeded(
        f"the request's timeout {passed}{' ' + where if where else ''}", reason="deadline"
    )
