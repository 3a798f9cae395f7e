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
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from router.admission.drain import DrainRate, Typical
from router.config import DEFAULT_TENANT, AdmissionConfig
from router.generation import DeadlineExceeded, GenerationError, Overloaded, TenantLimit, Unavailable

Key = tuple[int, int, float, int]  # 0 resumed or 1 new, priority, start tag, order of arrival

_AGED_EVERY = 4  # one of so many places goes to a less urgent class whose next has waited ageing_s
_FIRST_GUESS_S = 0.25  # seconds between placements out of the line, until some were seen
_MIN_RETRY_AFTER_S = 1.0
_MAX_RETRY_AFTER_S = 60.0
# A prediction this much longer than queue_timeout_s turns a request away. Goals and deadlines are taken at their word.
_DOUBT = 1.5
# However long first tokens take, a request may wait this part of ttft_goal_s: a line that may not form keeps nobody busy.
_LEAST_WAIT = 0.1


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant may claim of the line."""

    weight: float = 1.0
    max_queue: int | None = None  # requests of its own that may wait


@dataclass(eq=False, slots=True)
class Entry:
    """A request on its way to a worker. The fields below the blank line are the line's own."""

    tenant: str = DEFAULT_TENANT
    priority: int = 0  # lower goes first
    need_blocks: int = 1  # an estimate
    work: float | Callable[[], float] = 1.0  # tokens to compute; asked for only when somebody waits
    resumed: bool = False
    deadline: float | None = None  # of the whole answer, on the line's clock

    entered_at: float = 0.0
    waited: bool = False
    why: GenerationError | None = None  # it was dropped
    _key: Key | None = None
    _cost: float = 0.0
    _parked: bool = False
    _counted: int = 0  # what its being let try has added to the credit of less urgent classes
    _tried: bool = False  # it was let try after waiting: it keeps a place from now on
    _give_up_at: float = 0.0
    _arrival: int = 2**62  # after everybody, until it enters


@dataclass(slots=True)
class _Flow:
    """A tenant in one class."""

    finish: float = 0.0  # tag of the end of its last request
    members: int = 0
    parked: int = 0


@dataclass(slots=True)
class _Class:
    """The requests of one priority, and the fair clock between its tenants."""

    virtual: float = 0.0  # start tag of what was last let try
    flows: dict[str, _Flow] = field(default_factory=dict)
    parked: list[tuple[Key, Entry]] = field(default_factory=list)  # sorted
    work: float = 0.0  # of those parked


class Line:
    """The line of one router replica. `shares` are those of the tenants; others have weight 1 and no limit."""

    def __init__(self, config: AdmissionConfig, shares: Mapping[str, Share] | None = None) -> None:
        self._config = config
        self._shares = dict(shares or {})
        self._arrivals = itertools.count()
        self._resumed: list[tuple[Key, Entry]] = []  # sorted
        self._classes: dict[int, _Class] = {}
        self._order: list[int] = []  # priorities of the classes in which somebody waits, sorted
        self._trying: dict[Entry, None] = {}  # let try after waiting, and not yet placed or parked again
        self._parked_of: dict[str, int] = {}  # tenant -> new requests that wait
        self._num_parked = 0
        self._give_ups: list[tuple[float, int, Entry]] = []  # a heap; those that have left are skipped
        self._dropped: list[Entry] = []  # to be told
        self._credit = (
            0  # of the less urgent classes: places that went to a more urgent one since they had one
        )
        self._drain = DrainRate()
        self._first_token = Typical()

    @property
    def waiting(self) -> int:
        return self._num_parked + len(self._trying)

    def waiting_of(self, tenant: str) -> int:
        return self._parked_of.get(tenant, 0) + sum(entry.tenant == tenant for entry in self._trying)

    # --- the life of an entry ---------------------------------------------------------------------------------------

    def enter(self, entry: Entry, now: float) -> bool:
        """True: it may try now. False: somebody is in front, it waits.

        Raises Overloaded, TenantLimit, Unavailable or DeadlineExceeded when it may not wait; it has left then.
        """
        entry._arrival = next(self._arrivals)
        entry.entered_at = now
        if entry.deadline is not None and entry.deadline <= now:
            raise deadline_exceeded(now - entry.deadline)
        return self.again(entry, now)

    def again(self, entry: Entry, now: float) -> bool:
        """After `aside`: as `enter`, with the place it had."""
        if not self.waiting:
            return True  # no tag: where nobody waits there is nothing to share, and nothing to compute
        key = entry._key or self._next_key(entry)
        if self._is_front(key, entry):
            if entry._key is None:
                self._join(entry, key)
            return True
        self.no_room(entry, now)
        return False

    def no_room(self, entry: Entry, now: float) -> None:
        """It has tried in vain, or may not try yet: it waits. Raises as `enter` does."""
        key = entry._key or self._next_key(entry)
        if not (entry.resumed or entry.waited):
            try:
                self._check_may_wait(entry, key, now)
            except GenerationError:
                self.leave(entry, now)
                raise
        if entry._key is None:
            self._join(entry, self._next_key(entry))  # anew: another may have been put out for it
        self._note_last_moment(entry)
        self._take_back(entry)
        self._park(entry)
        entry.waited = True
        self._drain.busy(True, now)

    def room(self, free_blocks: int, now: float) -> list[Entry]:
        """A worker has this many free blocks: let try, from the front, as many as they are enough for.

        The first is let try whenever there is a block at all, because its need is only an estimate: it may be cached.
        """
        self._drop_late(now)
        woken: list[Entry] = []
        budget = free_blocks
        while budget > 0 and self._num_parked:
            entry, aged = self._next(now)
            if budget < entry.need_blocks and woken:
                break
            budget -= entry.need_blocks
            self._let_try(entry, aged)
            woken.append(entry)
        return woken

    def placed(self, entry: Entry, now: float) -> list[Entry]:
        """A worker took it. Returns who may try next."""
        if entry.waited:
            self._drain.placed(entry._cost, now)
        self._forget(entry, served=True)
        entry._counted = 0
        return self.leave(entry, now)

    def leave(self, entry: Entry, now: float) -> list[Entry]:
        """Placed, refused or gone. Idempotent. Returns who may try next: it may have stood in the way."""
        woken = self.aside(entry, now)
        self._forget(entry)
        return woken

    def aside(self, entry: Entry, now: float) -> list[Entry]:
        """Out of the way for a while: it keeps its place among those that come `again`. Returns who may try next."""
        in_the_way = entry in self._trying or entry is self._front()
        if entry._parked:
            self._unpark(entry)
        self._take_back(entry)
        woken: list[Entry] = []
        if in_the_way and not self._trying:  # it may leave room that it was woken for
            self._drop_late(now)
            if self._num_parked:
                following, aged = self._next(now)
                self._let_try(following, aged)
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
        while self._give_ups and not self._give_ups[0][2]._parked:
            heapq.heappop(self._give_ups)[2]._give_up_at = 0.0
        return self._give_ups[0][0] if self._give_ups else None

    def last_moment(self, entry: Entry) -> float:
        """When this entry will have waited too long."""
        return self._last_moment(entry)[0]

    def predicted_wait_s(self, entry: Entry, now: float) -> float | None:
        """Seconds until this entry could be placed, if it came now. None: not enough was seen yet."""
        return self._predicted_s(entry._key or self._next_key(entry), now)

    def retry_after_s(self, tenant: str, now: float) -> float:
        """Seconds after which a new request of this tenant should find its way, at the pace of late."""
        predicted = self.predicted_wait_s(Entry(tenant), now)
        if predicted is None:
            predicted = _FIRST_GUESS_S * (self.waiting + 1)
        return min(max(predicted, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)

    def check(self) -> None:
        """The state is whole. For tests: it walks through everything."""
        assert self._order == sorted(p for p, c in self._classes.items() if c.parked)
        parked = [*self._resumed, *(pair for c in self._classes.values() for pair in c.parked)]
        assert len(parked) == self._num_parked
        assert all(entry._parked and entry not in self._trying for _, entry in parked)
        assert sum(self._parked_of.values()) == self._num_parked - len(self._resumed)
        assert all(count > 0 for count in self._parked_of.values())
        for queue in self._classes.values():
            assert queue.parked == sorted(queue.parked, key=lambda pair: pair[0])
            assert abs(queue.work - sum(entry._cost for _, entry in queue.parked)) < 1e-3 * (1 + queue.work)
            assert any(flow.members for flow in queue.flows.values()), "an empty class is kept"
            assert sum(flow.parked for flow in queue.flows.values()) == len(queue.parked)
        assert len(self._give_ups) <= 2 * self._num_parked + _SLACK + 1

    # --- order ------------------------------------------------------------------------------------------------------

    def _next_key(self, entry: Entry) -> Key:
        if entry.resumed:
            return (0, entry.priority, 0.0, entry._arrival)
        queue = self._classes.get(entry.priority)
        start = 0.0
        if queue is not None:
            flow = queue.flows.get(entry.tenant)
            start = max(queue.virtual, flow.finish) if flow is not None else queue.virtual
        return (1, entry.priority, start, entry._arrival)

    def _join(self, entry: Entry, key: Key) -> None:
        """Its place is fixed, and its tenant charged for it."""
        entry._key = key
        entry._cost = max(entry.work() if callable(entry.work) else entry.work, 1.0)
        if entry.resumed:
            return
        queue = self._classes.setdefault(entry.priority, _Class())
        flow = queue.flows.setdefault(entry.tenant, _Flow())
        flow.finish = key[2] + entry._cost / self._weight(entry.tenant)
        flow.members += 1

    def _forget(self, entry: Entry, served: bool = False) -> None:
        """Its key is void. Not served, its tenant owes nothing for it, unless others have their place behind it."""
        key, entry._key = entry._key, None
        if entry._parked:
            raise AssertionError("an entry that is parked has a key")
        if key is None or entry.resumed:
            return
        queue = self._classes[entry.priority]
        flow = queue.flows[entry.tenant]
        flow.members -= 1
        if not served and flow.finish == key[2] + entry._cost / self._weight(entry.tenant):
            flow.finish = key[2]
        if not flow.members and flow.finish <= queue.virtual:
            del queue.flows[entry.tenant]  # a newcomer would start where it stands
        if not any(flow.members for flow in queue.flows.values()):
            del self._classes[entry.priority]

    def _is_front(self, key: Key, entry: Entry) -> bool:
        front = self._front()
        if front is not None and front._key is not None and front._key < key:
            return False
        return not any(
            other._key is not None and other._key < key for other in self._trying if other is not entry
        )

    def _front(self) -> Entry | None:
        if self._resumed:
            return self._resumed[0][1]
        return self._classes[self._order[0]].parked[0][1] if self._order else None

    def _next(self, now: float) -> tuple[Entry, bool | None]:
        """Who is to try, and whether for its age; None: no less urgent class has anybody who waited that long."""
        front = self._front()
        assert front is not None
        if front.resumed or len(self._order) < 2:
            return front, None
        oldest = min(
            (self._classes[priority].parked[0][1] for priority in self._order[1:]), key=lambda e: e.entered_at
        )
        if now - oldest.entered_at < self._config.ageing_s:
            return front, None
        return (oldest, True) if self._credit >= _AGED_EVERY - 1 else (front, False)

    def _let_try(self, entry: Entry, aged: bool | None) -> None:
        if aged is not None:
            entry._counted = 1 - _AGED_EVERY if aged else 1
            self._credit += entry._counted
        self._unpark(entry)
        self._trying[entry] = None
        entry._tried = True
        assert entry._key is not None
        if not entry.resumed:
            queue = self._classes[entry.priority]
            queue.virtual = max(queue.virtual, entry._key[2])

    def _take_back(self, entry: Entry) -> None:
        """It does not try any more. When it was placed, nothing is left to take back of what that counts."""
        self._trying.pop(entry, None)
        self._credit -= entry._counted
        entry._counted = 0

    # --- the parked -------------------------------------------------------------------------------------------------

    def _park(self, entry: Entry) -> None:
        assert entry._key is not None
        entry._parked = True
        self._num_parked += 1
        if entry.resumed:
            insort(self._resumed, (entry._key, entry))
            return
        queue = self._classes[entry.priority]
        if not queue.parked:
            insort(self._order, entry.priority)
        insort(queue.parked, (entry._key, entry))  # keys are unique: entries are never compared
        queue.work += entry._cost
        queue.flows[entry.tenant].parked += 1
        self._parked_of[entry.tenant] = self._parked_of.get(entry.tenant, 0) + 1

    def _unpark(self, entry: Entry) -> None:
        assert entry._key is not None
        entry._parked = False
        self._num_parked -= 1
        if entry.resumed:
            del self._resumed[bisect_left(self._resumed, entry._key, key=lambda pair: pair[0])]
            return
        queue = self._classes[entry.priority]
        del queue.parked[bisect_left(queue.parked, entry._key, key=lambda pair: pair[0])]
        queue.work -= entry._cost
        queue.flows[entry.tenant].parked -= 1
        if not queue.parked:
            queue.work = 0.0  # sums of floats drift
            del self._order[bisect_left(self._order, entry.priority)]
        left = self._parked_of.pop(entry.tenant) - 1
        if left:
            self._parked_of[entry.tenant] = left

    # --- who may wait -----------------------------------------------------------------------------------------------

    def _check_may_wait(self, entry: Entry, key: Key, now: float) -> None:
        limit = self._share(entry.tenant).max_queue
        if limit is not None and self._parked_of.get(entry.tenant, 0) >= limit:
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
        before = self._work_before(key)
        if not before:
            return 0.0
        rate = self._drain.work_per_s(now)
        return None if rate is None else before / rate

    def _work_before(self, key: Key) -> float:
        work = sum(entry._cost for _, entry in self._resumed)
        if key[0] == 0:
            return work
        for priority in self._order:
            queue = self._classes[priority]
            if priority > key[1]:
                break
            if priority < key[1] or not queue.parked or queue.parked[-1][0] < key:
                work += queue.work
            else:
                at = bisect_left(queue.parked, key, key=lambda pair: pair[0])
                work += sum(entry._cost for _, entry in queue.parked[:at])
        return work

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
        if not self._order or self._order[-1] < entry.priority:
            return False
        worst = self._order[-1]
        queue = self._classes[worst]
        parked = {
            tenant: flow.parked / self._weight(tenant) for tenant, flow in queue.flows.items() if flow.parked
        }
        tenant = max(parked, key=lambda name: parked[name])
        if worst == entry.priority:
            own = queue.flows.get(entry.tenant)
            would_have = ((own.parked if own is not None else 0) + 1) / self._weight(entry.tenant)
            if parked[tenant] <= would_have:
                return False
        victim = next((e for _, e in reversed(queue.parked) if e.tenant == tenant and not e._tried), None)
        if victim is None:
            return False
        retry_after_s = self.retry_after_s(tenant, now)
        self._drop(
            victim,
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
        if entry._give_up_at:
            return  # it is in the heap since it waited before
        if len(self._give_ups) > 2 * self._num_parked + _SLACK:
            for _, _, other in self._give_ups:
                if not other._parked:
                    other._give_up_at = 0.0
            self._give_ups = [item for item in self._give_ups if item[2]._parked]
            heapq.heapify(self._give_ups)
        entry._give_up_at = self._last_moment(entry)[0]
        heapq.heappush(self._give_ups, (entry._give_up_at, entry._arrival, entry))

    def _drop(self, entry: Entry, why: GenerationError) -> None:
        entry.why = why
        self._unpark(entry)
        self._forget(entry)
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

    def _share(self, tenant: str) -> Share:
        return self._shares.get(tenant, _NO_SHARE)

    def _weight(self, tenant: str) -> float:
        return self._share(tenant).weight


_NO_SHARE = Share()
_SLACK = 64  # entries of the heap that may have left before it is cleaned


def deadline_exceeded(late_s: float, where: str = "") -> DeadlineExceeded:
    passed = f"passed {late_s:.1f} s ago" if late_s >= 0.05 else "has passed"
    return DeadlineExceeded(
        f"the request's timeout {passed}{' ' + where if where else ''}", reason="deadline"
    )
