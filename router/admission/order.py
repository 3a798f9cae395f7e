"""Who is next among those that wait: resumed streams, classes, tenants by weight, first come first served.

The order is described in line.py; here it is kept. An entry gets a key when its place is fixed (`join`), by which it is
sorted where it waits, and which it keeps until it has left (`forget`). Pure.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from router.config import DEFAULT_TENANT
from router.generation import GenerationError

Key = tuple[int, int, float, int]  # 0 resumed or 1 new, priority, start tag, order of arrival

_AGED_EVERY = 4  # one of so many places goes to a less urgent class whose next has waited long enough


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
    key: Key | None = None
    cost: float = 0.0
    parked: bool = False
    counted: int = 0  # what its being let try has added to the credit of less urgent classes
    tried: bool = False  # it was let try after waiting: it keeps a place from now on
    give_up_at: float = 0.0
    arrival: int = 2**62  # after everybody, until it enters


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


class Order:
    """Those that wait (parked), and those that were let try and are not yet placed or parked again."""

    def __init__(self, shares: Mapping[str, Share], ageing_s: float) -> None:
        self._shares = dict(shares)
        self._ageing_s = ageing_s
        self._resumed: list[tuple[Key, Entry]] = []  # sorted
        self._classes: dict[int, _Class] = {}
        self._waiting: list[int] = []  # priorities of the classes in which somebody waits, sorted
        self._trying: dict[Entry, None] = {}
        self._parked_of: dict[str, int] = {}  # tenant -> new requests that wait
        # Of the less urgent classes: places that went to a more urgent one since they had one.
        self._credit = 0
        self.num_parked = 0

    @property
    def waiting(self) -> int:
        return self.num_parked + len(self._trying)

    @property
    def anybody_tries(self) -> bool:
        return bool(self._trying)

    def tries(self, entry: Entry) -> bool:
        return entry in self._trying

    def parked_of(self, tenant: str) -> int:
        """Resumed requests are not counted: they are bounded by what was admitted."""
        return self._parked_of.get(tenant, 0)

    def waiting_of(self, tenant: str) -> int:
        return self.parked_of(tenant) + sum(entry.tenant == tenant for entry in self._trying)

    def share(self, tenant: str) -> Share:
        return self._shares.get(tenant, _NO_SHARE)

    def _weight(self, tenant: str) -> float:
        return self.share(tenant).weight

    # --- keys ------------------------------------------------------------------------------------------------------------

    def key_for(self, entry: Entry) -> Key:
        if entry.resumed:
            return (0, entry.priority, 0.0, entry.arrival)
        queue = self._classes.get(entry.priority)
        start = 0.0
        if queue is not None:
            flow = queue.flows.get(entry.tenant)
            start = max(queue.virtual, flow.finish) if flow is not None else queue.virtual
        return (1, entry.priority, start, entry.arrival)

    def join(self, entry: Entry, key: Key) -> None:
        """Its place is fixed, and its tenant charged for it."""
        entry.key = key
        entry.cost = max(entry.work() if callable(entry.work) else entry.work, 1.0)
        if entry.resumed:
            return
        queue = self._classes.setdefault(entry.priority, _Class())
        flow = queue.flows.setdefault(entry.tenant, _Flow())
        flow.finish = key[2] + entry.cost / self._weight(entry.tenant)
        flow.members += 1

    def forget(self, entry: Entry, served: bool = False) -> None:
        """Its key is void. Not served, its tenant owes nothing for it, unless others have their place behind it."""
        key, entry.key = entry.key, None
        assert not entry.parked, f"an entry that is parked has a key: {entry}"
        if key is None or entry.resumed:
            return
        queue = self._classes[entry.priority]
        flow = queue.flows[entry.tenant]
        flow.members -= 1
        if not served and flow.finish == key[2] + entry.cost / self._weight(entry.tenant):
            flow.finish = key[2]
        if not flow.members and flow.finish <= queue.virtual:
            del queue.flows[entry.tenant]  # a newcomer would start where it stands
        if not any(flow.members for flow in queue.flows.values()):
            del self._classes[entry.priority]

    def is_front(self, key: Key, entry: Entry) -> bool:
        front = self.front()
        if front is not None and front.key is not None and front.key < key:
            return False
        return not any(
            other.key is not None and other.key < key for other in self._trying if other is not entry
        )

    def front(self) -> Entry | None:
        if self._resumed:
            return self._resumed[0][1]
        return self._classes[self._waiting[0]].parked[0][1] if self._waiting else None

    def next(self, now: float) -> tuple[Entry, bool | None]:
        """Who is to try, and whether for its age; None: no less urgent class has anybody who waited that long."""
        front = self.front()
        assert front is not None
        if front.resumed or len(self._waiting) < 2:
            return front, None
        oldest = min(
            (self._classes[priority].parked[0][1] for priority in self._waiting[1:]),
            key=lambda e: e.entered_at,
        )
        if now - oldest.entered_at < self._ageing_s:
            return front, None
        return (oldest, True) if self._credit >= _AGED_EVERY - 1 else (front, False)

    def let_try(self, entry: Entry, aged: bool | None) -> None:
        if aged is not None:
            entry.counted = 1 - _AGED_EVERY if aged else 1
            self._credit += entry.counted
        self.unpark(entry)
        self._trying[entry] = None
        entry.tried = True
        assert entry.key is not None
        if not entry.resumed:
            queue = self._classes[entry.priority]
            queue.virtual = max(queue.virtual, entry.key[2])

    def take_back(self, entry: Entry) -> None:
        """It does not try any more. When it was placed, nothing is left to take back of what that counts."""
        self._trying.pop(entry, None)
        self._credit -= entry.counted
        entry.counted = 0

    # --- the parked -------------------------------------------------------------------------------------------------

    def park(self, entry: Entry) -> None:
        assert entry.key is not None
        entry.parked = True
        self.num_parked += 1
        if entry.resumed:
            insort(self._resumed, (entry.key, entry))
            return
        queue = self._classes[entry.priority]
        if not queue.parked:
            insort(self._waiting, entry.priority)
        insort(queue.parked, (entry.key, entry))  # keys are unique: entries are never compared
        queue.work += entry.cost
        queue.flows[entry.tenant].parked += 1
        self._parked_of[entry.tenant] = self._parked_of.get(entry.tenant, 0) + 1

    def unpark(self, entry: Entry) -> None:
        assert entry.key is not None
        entry.parked = False
        self.num_parked -= 1
        if entry.resumed:
            del self._resumed[bisect_left(self._resumed, entry.key, key=lambda pair: pair[0])]
            return
        queue = self._classes[entry.priority]
        del queue.parked[bisect_left(queue.parked, entry.key, key=lambda pair: pair[0])]
        queue.work -= entry.cost
        queue.flows[entry.tenant].parked -= 1
        if not queue.parked:
            queue.work = 0.0  # sums of floats drift
            del self._waiting[bisect_left(self._waiting, entry.priority)]
        left = self._parked_of.pop(entry.tenant) - 1
        if left:
            self._parked_of[entry.tenant] = left

    def work_before(self, key: Key) -> float:
        work = sum(entry.cost for _, entry in self._resumed)
        if key[0] == 0:
            return work
        for priority in self._waiting:
            queue = self._classes[priority]
            if priority > key[1]:
                break
            if priority < key[1] or not queue.parked or queue.parked[-1][0] < key:
                work += queue.work
            else:
                at = bisect_left(queue.parked, key, key=lambda pair: pair[0])
                work += sum(entry.cost for _, entry in queue.parked[:at])
        return work

    def weaker(self, entry: Entry) -> Entry | None:
        """One that waits and has less right to a place than this one. None: there is none."""
        if not self._waiting or self._waiting[-1] < entry.priority:
            return None
        worst = self._waiting[-1]
        queue = self._classes[worst]
        parked = {
            tenant: flow.parked / self._weight(tenant) for tenant, flow in queue.flows.items() if flow.parked
        }
        tenant = max(parked, key=lambda name: parked[name])
        if worst == entry.priority:
            own = queue.flows.get(entry.tenant)
            would_have = ((own.parked if own is not None else 0) + 1) / self._weight(entry.tenant)
            if parked[tenant] <= would_have:
                return None
        return next((e for _, e in reversed(queue.parked) if e.tenant == tenant and not e.tried), None)

    def check(self) -> None:
        """The state is whole. For tests: it walks through everything."""
        assert self._waiting == sorted(p for p, c in self._classes.items() if c.parked)
        parked = [*self._resumed, *(pair for c in self._classes.values() for pair in c.parked)]
        assert len(parked) == self.num_parked
        assert all(entry.parked and entry not in self._trying for _, entry in parked)
        assert sum(self._parked_of.values()) == self.num_parked - len(self._resumed)
        assert all(count > 0 for count in self._parked_of.values())
        for queue in self._classes.values():
            assert queue.parked == sorted(queue.parked, key=lambda pair: pair[0])
            assert abs(queue.work - sum(entry.cost for _, entry in queue.parked)) < 1e-3 * (1 + queue.work)
            assert any(flow.members for flow in queue.flows.values()), "an empty class is kept"
            assert sum(flow.parked for flow in queue.flows.values()) == len(queue.parked)


_NO_SHARE = Share()
