"""The queue without a clock: order, fairness, bounds, and what it does under three times the load it can carry."""

from __future__ import annotations

import ast
import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import router.admission.line
from router.admission.line import Line
from router.admission.order import Entry, Share
from router.config import AdmissionConfig
from router.generation import DeadlineExceeded, GenerationError, Overloaded, TenantLimit, Unavailable

EVER = 1e9


def line(shares: dict[str, Share] | None = None, **config) -> Line:
    return Line(AdmissionConfig(**{"queue_timeout_s": EVER, "max_queue": 100_000} | config), shares)


def full(queue: Line, *entries: Entry, now: float = 0.0) -> None:
    """They come while every worker is full."""
    for entry in entries:
        if queue.enter(entry, now):
            queue.no_room(entry, now)


def serve(queue: Line, count: int, now: float = 0.0) -> list[Entry]:
    """One place at a time, for whoever is next."""
    served = []
    for _ in range(count):
        woken = queue.room(1, now)
        for entry in woken:
            assert not queue.placed(entry, now) or True
            served.append(entry)
        # Whoever was woken by the placing finds no room.
        for entry in list(queue._order._trying):
            queue.no_room(entry, now)
    return served


def test_no_clock_and_no_loop() -> None:
    for name in ("line.py", "order.py", "drain.py", "quota.py"):
        path = Path(router.admission.line.__file__).with_name(name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {"asyncio", "time", "random"} & {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("asyncio", "time", "random")


# --- order --------------------------------------------------------------------------------------------------------------


def test_resumed_first_then_classes_then_first_come() -> None:
    queue = line()
    urgent, normal, later = Entry(priority=-1), Entry(), Entry()
    resumed = Entry(priority=5, resumed=True)
    full(queue, normal, later, urgent, resumed)
    assert serve(queue, 4) == [resumed, urgent, normal, later]
    queue.check()
    assert queue.waiting == 0
    assert not queue._order._classes


def test_a_less_urgent_class_does_not_starve() -> None:
    queue = line(ageing_s=5.0)
    low = [Entry(priority=1_000_000) for _ in range(3)]
    full(queue, *low)
    order = []
    for second in range(20):
        full(queue, Entry(priority=0), Entry(priority=0), now=float(second))  # more than is served
        order += [entry.priority for entry in serve(queue, 1, now=float(second))]
    assert 1_000_000 not in order[:5]  # strict while nobody has waited long
    aged = [at for at, priority in enumerate(order) if priority]
    assert len(aged) == 3
    assert [b - a for a, b in itertools.pairwise(aged)] == [4, 4]


def test_ageing_goes_by_class_and_not_by_request() -> None:
    """A tenant that floods the urgent class does not hide the age of the others behind its own."""
    queue = line(ageing_s=1.0)
    full(queue, *(Entry("flood") for _ in range(50)))
    low = Entry("quiet", priority=3)
    full(queue, low)
    assert low in serve(queue, 8, now=2.0)


# --- fairness -----------------------------------------------------------------------------------------------------------

weights = st.sampled_from([0.5, 1.0, 2.0, 5.0])
works = st.lists(st.integers(1, 5000), min_size=1, max_size=30)


@given(st.lists(st.tuples(weights, works), min_size=2, max_size=5), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_shares_differ_by_less_than_one_request_each(tenants, rng) -> None:
    """The bound of start-time fair queueing (Goyal et al., theorem 1), at every moment at which two tenants both wait."""
    shares = {str(n): Share(weight) for n, (weight, _) in enumerate(tenants)}
    queue = line(shares)
    entries = [Entry(str(n), work=float(w)) for n, (_, own) in enumerate(tenants) for w in own]
    rng.shuffle(entries)
    full(queue, *entries)
    left = {name: sum(e.tenant == name for e in entries) for name in shares}
    largest = {name: max(e.work for e in entries if e.tenant == name) for name in shares}
    got = dict.fromkeys(shares, 0.0)
    for entry in serve(queue, len(entries)):
        got[entry.tenant] += entry.work / shares[entry.tenant].weight
        left[entry.tenant] -= 1
        waiting = [name for name in shares if left[name]]
        for a in waiting:
            for b in waiting:
                bound = largest[a] / shares[a].weight + largest[b] / shares[b].weight
                assert abs(got[a] - got[b]) <= bound + 1e-6
    assert not any(left.values())


@pytest.mark.parametrize("flood", [0, 50, 2000])
def test_a_flood_does_not_raise_anothers_wait(flood: int) -> None:
    """One worker, one request at a time. `quiet` sends less than its half: it never waits for more than a request or two."""
    queue = line({"flood": Share(1.0), "quiet": Share(1.0)})
    full(queue, *(Entry("flood", work=100.0) for _ in range(flood)))
    longest = served = 0
    waiting: dict[Entry, int] = {}
    for step in range(400):
        if step % 3 == 0:
            entry = Entry("quiet", work=100.0)
            waiting[entry] = step
            full(queue, entry, now=float(step))
        full(queue, *(Entry("flood", work=100.0) for _ in range(flood // 100)), now=float(step))
        for entry in serve(queue, 1, now=float(step)):
            if entry in waiting:
                longest = max(longest, step - waiting.pop(entry))
                served += 1
        queue.check()
    assert served >= 132
    assert longest <= (2 if flood else 0)


def test_who_was_idle_has_saved_nothing() -> None:
    queue = line()
    full(queue, *(Entry("a", work=100.0) for _ in range(200)))
    serve(queue, 100)
    full(queue, *(Entry("b", work=100.0) for _ in range(100)))
    first = [entry.tenant for entry in serve(queue, 40)]
    assert first.count("a") == first.count("b") == 20


def test_a_tenant_is_not_charged_for_what_was_not_served() -> None:
    queue = line()
    full(queue, *(Entry("b", work=100.0) for _ in range(20)))
    gone = [Entry("a", work=10_000.0) for _ in range(20)]
    full(queue, *gone)
    for entry in reversed(gone):
        queue.leave(entry, 0.0)
    full(queue, *(Entry("a", work=100.0) for _ in range(5)))
    queue.check()
    assert [entry.tenant for entry in serve(queue, 10)].count("a") == 5


def test_idle_tenants_and_classes_are_forgotten() -> None:
    queue = line()
    for n in range(500):
        full(queue, Entry(f"tenant-{n}", priority=n % 7))
        serve(queue, 1)
    assert not queue._order._classes
    assert not queue._order._parked_of
    assert len(queue._give_ups) <= 66


# --- bounds -------------------------------------------------------------------------------------------------------------


def test_as_many_are_let_try_as_there_is_room_for() -> None:
    def woken(**room: float) -> int:
        queue = line()
        full(queue, *(Entry(need_blocks=5, work=100.0) for _ in range(10)))
        return len(queue.room(int(room.pop("blocks", 1000)), 0.0, **room))

    assert woken() == 10
    assert woken(blocks=16) == 3
    assert woken(requests=4) == 4
    assert woken(tokens=250) == 2
    assert woken(blocks=3) == woken(tokens=7) == 1, "its need is an estimate: it may be cached"
    assert woken(blocks=0) == woken(requests=0) == woken(tokens=0) == 0


def test_when_they_are_placed_the_next_is_let_try() -> None:
    queue = line()
    entries = [Entry(need_blocks=5) for _ in range(4)]
    full(queue, *entries)
    assert queue.room(11, 0.0) == entries[:2]
    assert queue.placed(entries[0], 0.0) == []
    assert queue.placed(entries[1], 0.0) == [entries[2]], "there may have been more room than was told"
    queue.no_room(entries[2], 0.0)
    assert queue.waiting == 2
    queue.check()


def test_a_full_line_drops_the_last_of_whoever_has_most() -> None:
    queue = line({"flood": Share(1.0), "quiet": Share(1.0)}, max_queue=10)
    floods = [Entry("flood") for _ in range(10)]
    full(queue, *floods)
    quiet = Entry("quiet")
    full(queue, quiet)
    (dropped,) = queue.expired(0.0)
    assert dropped is floods[-1]
    assert isinstance(dropped.why, Overloaded)
    assert queue.waiting == 10
    with pytest.raises(Overloaded, match="10 requests wait already"):
        full(queue, Entry("flood"))
    for _ in range(4):
        full(queue, Entry("quiet"))
    assert {queue.waiting_of("flood"), queue.waiting_of("quiet")} == {5}
    with pytest.raises(Overloaded):  # half is its share
        full(queue, Entry("quiet"))
    assert len(queue.expired(0.0)) == 4
    queue.check()


def test_a_full_line_drops_the_less_urgent_first() -> None:
    queue = line(max_queue=3)
    low = [Entry(priority=1) for _ in range(3)]
    full(queue, *low)
    full(queue, Entry(priority=0))
    assert queue.expired(0.0) == [low[-1]]
    with pytest.raises(Overloaded):
        full(queue, Entry(priority=2))
    queue.check()


def test_who_was_let_try_keeps_its_place() -> None:
    queue = line(max_queue=2)
    entries = [Entry("flood"), Entry("flood")]
    full(queue, *entries)
    for entry in queue.room(2, 0.0):
        queue.no_room(entry, 0.0)
    with pytest.raises(Overloaded):
        full(queue, Entry("quiet"))
    assert not queue.expired(0.0)
    queue.check()


def test_a_tenants_own_queue_is_bounded() -> None:
    queue = line({"a": Share(max_queue=2), "none": Share(max_queue=0)})
    full(queue, Entry("a"), Entry("a"), Entry("b"))
    with pytest.raises(TenantLimit, match=r"tenant 'a' has 2 requests waiting .* \(max_queue is 2\)"):
        full(queue, Entry("a"))
    with pytest.raises(TenantLimit):
        full(queue, Entry("none"))
    full(queue, Entry("a", resumed=True), Entry("b"))
    assert queue.waiting == 5
    queue.check()


def paced(queue: Line) -> float:
    """A line that moves by one request of 100 tokens a second, empty again at the time returned."""
    for start in range(0, 20, 4):
        full(queue, *(Entry(work=100.0) for _ in range(4)), now=float(start))
        for second in range(start + 1, start + 5):
            serve(queue, 1, now=float(second))
        assert queue.waiting == 0
    return 20.0


def test_the_wait_is_predicted_from_the_pace_and_the_work_ahead() -> None:
    queue = line()
    assert queue.predicted_wait_s(Entry(), 0.0) == 0.0
    now = paced(queue)
    full(queue, *(Entry(work=100.0) for _ in range(10)), Entry(work=500.0), now=now)
    assert queue.predicted_wait_s(Entry(work=9000.0), now) == pytest.approx(15, rel=0.1)
    assert queue.predicted_wait_s(Entry(priority=-1), now) == 0.0
    assert queue.predicted_wait_s(Entry(resumed=True), now) == 0.0
    assert queue.predicted_wait_s(Entry("other"), now) == pytest.approx(
        1, rel=0.1
    )  # behind the first of the others
    assert queue.retry_after_s("default", now) == pytest.approx(15, rel=0.1)
    assert queue.predicted_wait_s(Entry(), now + 10) > 25  # it has stood still meanwhile


def test_idle_time_is_no_pace() -> None:
    queue = line()
    paced(queue)
    full(queue, *(Entry(work=100.0) for _ in range(10)), now=100_000.0)
    assert queue.predicted_wait_s(Entry(), 100_000.0) == pytest.approx(10, rel=0.1)


def test_who_would_wait_longer_than_the_goal_is_refused_at_once() -> None:
    queue = line(ttft_goal_s=5.0)
    now = paced(queue)
    with pytest.raises(
        Overloaded, match=r"would wait about 5\.. s; admission.ttft_goal_s allows 5.0 s"
    ) as refused:
        full(queue, *(Entry(work=100.0) for _ in range(100)), now=now)
    assert 5 <= queue.waiting <= 6
    assert refused.value.reason == "predicted_wait"
    assert refused.value.retry_after_s == pytest.approx(1, abs=0.5)
    full(queue, Entry(resumed=True), Entry(priority=-1), now=now)  # they need not wait that long
    queue.check()


def test_a_goal_leaves_time_for_the_first_token() -> None:
    queue = line(ttft_goal_s=5.0)
    for _ in range(50):
        queue.first_token(2.0)
    entry = Entry()
    full(queue, entry)
    assert queue.last_moment(entry) == pytest.approx(3.0, abs=0.1)
    assert queue.expired(2.8) == []
    assert queue.expired(3.1) == [entry]
    assert isinstance(entry.why, Unavailable)
    assert entry.why.reason == "ttft_goal"


def test_deadlines() -> None:
    queue = line()
    with pytest.raises(DeadlineExceeded, match=r"passed 2\.0 s ago") as late:
        queue.enter(Entry(deadline=3.0), 5.0)
    assert late.value.status == 504
    now = paced(queue)
    full(queue, *(Entry(work=100.0) for _ in range(10)), now=now)
    with pytest.raises(Unavailable, match=r"its timeout leaves 4\.0 s") as refused:
        full(queue, Entry(deadline=now + 4), now=now)
    assert refused.value.reason == "deadline"
    patient = Entry(deadline=now + 30)
    full(queue, patient, now=now)
    assert queue.next_expiry() == now + 30
    assert queue.expired(now + 31) == [patient]
    assert isinstance(patient.why, DeadlineExceeded)
    assert len(serve(queue, 20, now + 31)) == 10
    queue.check()


def test_the_late_are_never_let_try() -> None:
    queue = line(queue_timeout_s=10.0)
    late, fresh = Entry(), Entry()
    full(queue, late, now=0.0)
    full(queue, fresh, now=5.0)
    assert queue.room(2, 10.0) == [fresh]
    assert queue.expired(10.0) == [late]


def test_until_enough_was_seen_nobody_is_refused_for_a_guess() -> None:
    queue = line(ttft_goal_s=5.0)
    full(queue, *(Entry(work=100.0) for _ in range(1000)))
    assert queue.waiting == 1000
    assert queue.predicted_wait_s(Entry(), 1.0) is None
    assert queue.retry_after_s("default", 1.0) == 60.0


# --- any order of events ------------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens, the state is whole, the line is bounded, and nobody overtakes in a class of one tenant."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.config = AdmissionConfig(max_queue=6, queue_timeout_s=20, ttft_goal_s=8, ageing_s=2)
        self.line = Line(self.config, {"a": Share(2.0), "b": Share(1.0, max_queue=3)})
        self.waits: set[Entry] = set()
        self.tries: set[Entry] = set()
        self.away: set[Entry] = set()

    def _woken(self, entries: list[Entry]) -> None:
        for entry in entries:
            assert entry in self.waits
            self.waits.discard(entry)
            self.tries.add(entry)
            assert self.now < entry.give_up_at

    def _settle(self) -> None:
        for entry in self.line.expired(self.now):
            assert entry.why is not None
            self.waits.remove(entry)

    def _ask(self, entry: Entry, how) -> None:
        try:
            free = how(entry, self.now)
        except GenerationError:
            assert not entry.resumed or entry.deadline is not None
        else:
            (self.tries if free else self.waits).add(entry)
        self._settle()

    @rule(
        tenant=st.sampled_from("abc"),
        priority=st.integers(-1, 1),
        need=st.integers(1, 4),
        work=st.integers(1, 500),
        resumed=st.booleans(),
        timeout=st.one_of(st.none(), st.floats(0.1, 10)),
    )
    def enter(self, tenant, priority, need, work, resumed, timeout) -> None:
        deadline = None if timeout is None else self.now + timeout
        self._ask(Entry(tenant, priority, need, float(work), resumed, deadline), self.line.enter)

    @rule(seconds=st.floats(0.01, 5))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._settle()

    @rule(free=st.integers(1, 8))
    def room(self, free: int) -> None:
        self._woken(self.line.room(free, self.now))
        self._settle()

    @precondition(lambda self: self.tries)
    @rule(data=st.data())
    def try_in_vain(self, data) -> None:
        entry = data.draw(st.sampled_from(sorted(self.tries, key=lambda e: e.arrival)))
        self.tries.discard(entry)
        self._ask(entry, lambda e, now: self.line.no_room(e, now))

    @precondition(lambda self: self.tries)
    @rule(data=st.data(), seconds=st.floats(0, 3))
    def place(self, data, seconds: float) -> None:
        entry = data.draw(st.sampled_from(sorted(self.tries, key=lambda e: e.arrival)))
        self.tries.discard(entry)
        self._woken(self.line.placed(entry, self.now))
        self.line.first_token(seconds)
        self._settle()

    @precondition(lambda self: self.tries)
    @rule(data=st.data())
    def step_aside(self, data) -> None:
        entry = data.draw(st.sampled_from(sorted(self.tries, key=lambda e: e.arrival)))
        self.tries.discard(entry)
        self._woken(self.line.aside(entry, self.now))
        self.away.add(entry)
        self._settle()

    @precondition(lambda self: self.away)
    @rule(data=st.data())
    def come_back(self, data) -> None:
        entry = data.draw(st.sampled_from(sorted(self.away, key=lambda e: e.arrival)))
        self.away.discard(entry)
        self._ask(entry, self.line.again)

    @precondition(lambda self: self.waits or self.tries or self.away)
    @rule(data=st.data())
    def leave(self, data) -> None:
        entry = data.draw(
            st.sampled_from(sorted(self.waits | self.tries | self.away, key=lambda e: e.arrival))
        )
        for those in (self.waits, self.tries, self.away):
            those.discard(entry)
        self._woken(self.line.leave(entry, self.now))
        self.line.leave(entry, self.now)  # idempotent
        self._settle()

    @invariant()
    def whole(self) -> None:
        self.line.check()
        parked = {e for _, e in self.line._order._resumed}
        parked |= {e for c in self.line._order._classes.values() for _, e in c.parked}
        assert parked == self.waits
        assert set(self.line._order._trying) <= self.tries
        assert sum(not (e.resumed or e.tried) for e in self.waits) <= self.config.max_queue
        assert sum(e.tenant == "b" and not (e.resumed or e.tried) for e in self.waits) <= 3

    def teardown(self) -> None:
        for entry in self.waits | self.tries | self.away:
            self.line.leave(entry, self.now)
        self.line.expired(self.now)
        assert self.line.waiting == 0
        assert not self.line._order._classes
        assert not self.line._order._parked_of


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# --- three times too much -----------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    good: int = 0  # first tokens within the goal
    late: int = 0
    refused: int = 0  # at once
    dropped: int = 0  # after having waited

    @property
    def asked(self) -> int:
        return self.good + self.late + self.refused + self.dropped


SLOTS, SERVICE_S, PREFILL_S, GOAL_S, SECONDS = 32, 4.0, 0.5, 3.0, 300.0


def overload(queue: Line, load: float, seed: int, quiet: float = 0.0) -> dict[str, Outcome]:
    """`SLOTS` places that each hold an answer for SERVICE_S on average (exponential), requests at random (Poisson).

    `load` 1 is as many as the places can carry; the part `quiet` of the requests is of a tenant of that name, the others
    are of `flood`. A first token comes PREFILL_S after a place was had.
    """
    rng = random.Random(seed)
    outcomes = {"flood": Outcome(), "quiet": Outcome()}
    rate = load * SLOTS / SERVICE_S
    now, arrival, busy = 0.0, rng.expovariate(rate), 0
    ends: list[float] = []

    def place(entry: Entry) -> None:
        nonlocal busy
        busy += 1
        ends.append(now + rng.expovariate(1 / SERVICE_S))
        prefill_s = rng.uniform(0.5, 1.5) * PREFILL_S
        queue.first_token(prefill_s)
        within = now - entry.entered_at + prefill_s <= GOAL_S
        outcome = outcomes[entry.tenant]
        outcome.good += within
        outcome.late += not within
        try_all(queue.placed(entry, now))

    def try_all(entries: list[Entry]) -> None:
        for entry in entries:
            if busy < SLOTS:
                place(entry)
            else:
                queue.no_room(entry, now)

    while now < SECONDS:
        end = min(ends, default=EVER)
        now = min(arrival, end)
        if end <= arrival:
            ends.remove(end)
            busy -= 1
            try_all(queue.room(1, now))
        else:
            arrival = now + rng.expovariate(rate)
            tenant = "quiet" if rng.random() < quiet else "flood"
            entry = Entry(tenant, work=rng.uniform(200, 1800))
            try:
                if queue.enter(entry, now):
                    if busy < SLOTS:
                        place(entry)
                    else:
                        queue.no_room(entry, now)
            except Overloaded:
                outcomes[tenant].refused += 1
        for entry in queue.expired(now):
            outcomes[entry.tenant].dropped += 1
    return outcomes


def test_goodput_does_not_collapse_at_three_times_the_load(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {}
    for name, config in {
        "plain queue, 60 s": {"queue_timeout_s": 60.0},
        "with ttft_goal_s": {"queue_timeout_s": 60.0, "ttft_goal_s": GOAL_S},
    }.items():
        for load in (1.0, 3.0):
            runs = [overload(line(**config), load, seed)["flood"] for seed in range(3)]
            rows[name, load] = Outcome(
                *(sum(getattr(run, f) for run in runs) for f in ("good", "late", "refused", "dropped"))
            )
    with capsys.disabled():
        print(f"\n{'goal ' + str(GOAL_S) + ' s':20} load   good/s  late/s  refused/s  dropped/s")
        for (name, load), o in rows.items():
            per_s = 3 * SECONDS
            print(
                f"{name:20} {load:g}x   {o.good / per_s:7.2f} {o.late / per_s:7.2f} {o.refused / per_s:10.2f} "
                f"{o.dropped / per_s:10.2f}"
            )
    shed, at_capacity = rows["with ttft_goal_s", 3.0], rows["with ttft_goal_s", 1.0]
    assert shed.good >= 0.9 * at_capacity.good
    assert shed.good >= 0.9 * rows["plain queue, 60 s", 1.0].good
    assert shed.late <= 0.02 * shed.good
    # Turned away at once rather than after waiting, most of them.
    assert shed.refused > 5 * shed.dropped
    # The same places, the same load: whoever waits in a plain queue is served too late.
    assert rows["plain queue, 60 s", 3.0].good < 0.3 * shed.good


def test_a_flood_costs_others_nothing_even_at_three_times_the_load() -> None:
    """`quiet` asks for 0.3 of what the places carry, `flood` for 2.7: each has a right to half."""
    flood, quiet = Outcome(), Outcome()
    for seed in range(3):
        outcomes = overload(line(ttft_goal_s=GOAL_S), 3.0, seed, quiet=0.1)
        for total, run in ((flood, outcomes["flood"]), (quiet, outcomes["quiet"])):
            total.good += run.good
            total.refused += run.refused + run.dropped + run.late
    assert quiet.good >= 0.99 * (quiet.good + quiet.refused)
    assert flood.good >= 0.6 * SLOTS / SERVICE_S * SECONDS * 3  # what is left is not wasted
