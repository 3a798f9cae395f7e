from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from router.config import PolicyConfig
from router.load import LoadBook
from router.policies.cost import CostPolicy
from router.policy import Demand
from router.prefix_index import CachedPrefix
from router.roster import Listed, Roster, host_of
from tests.router.fake_worker import ROOT
from tests.router.simulated_pool import info
from workers.protocol.messages import KvEndpoint, Load

POLICY = CostPolicy(PolicyConfig(), random.Random(1))

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["book", "release", "report", "leave", "join", "wait"]),
        st.integers(0, 9),
        st.integers(0, 2000),
        st.sampled_from([0.0, 1e-4, 2e-4, 4e-4]),
    ),
    max_size=60,
)


@given(CHANGES, st.sets(st.integers(0, 9)))
@settings(max_examples=150, deadline=None)
def test_kept_sorted_is_sorted(changes, unusable):
    """Whatever was booked, reported or left: a roster says what sorting all views at once says."""
    now = [0.0]
    book = LoadBook(clock=lambda: now[0])
    roster = Roster(book, POLICY.standing, random.Random(2))
    infos = [info(f"w{n}", "decode" if n % 2 else "prefill", host=f"h{n % 3}") for n in range(10)]
    for one in infos:
        roster.enlist(one)
    bookings = []
    for what, number, amount, token_s in changes:
        name = infos[number].worker_id
        if what == "book":
            bookings.append(book.book(name, prefill_tokens=amount, decode_blocks=amount // 10))
        elif what == "release" and bookings:
            bookings.pop(amount % len(bookings)).release()
        elif what == "report":
            book.report(
                name, Load(queued_prefill_tokens=amount, active_blocks=amount, prefill_token_s=token_s)
            )
        elif what == "leave":
            roster.strike(name)
            book.forget(name)
        elif what == "join":
            roster.enlist(infos[number])
        elif what == "wait":
            now[0] += amount / 1000
    left_out = {f"w{n}" for n in unusable}
    usable = roster.views(ROOT, lambda worker_id: worker_id not in left_out)
    everybody = Listed(list(roster.views(ROOT)), POLICY.standing, random.Random(3))
    for role in ("prefill", "decode"):
        pool, summed = usable.pool(role), everybody.pool(role)
        assert (pool.size, pool.prefill_token_s) == (summed.size, summed.prefill_token_s)
        assert abs(pool.recent_requests - summed.recent_requests) < 1e-6
        for host in (None, "h0", "h1", "h2"):
            kept = list(usable.ranked(role, host))
            wanted = [(s, v) for s, v in everybody.ranked(role, host) if v.worker_id not in left_out]
            assert [standing for standing, _ in kept] == [standing for standing, _ in wanted]
            assert {view.worker_id for _, view in kept} == {view.worker_id for _, view in wanted}
            assert all(POLICY.standing(view, pool) == standing for standing, view in kept)
    for booking in bookings:
        booking.release()
    assert book.num_open == 0


def test_other_models_and_roles_are_apart():
    roster = Roster(LoadBook())
    roster.enlist(info("d", "decode"))
    roster.enlist(info("p", "prefill"))
    views = roster.views(ROOT)
    assert sorted(view.worker_id for view in views) == ["d", "p"]
    assert views.get("d", "decode") is not None
    assert views.get("d", "prefill") is None
    assert list(roster.views(b"another model")) == []
    roster.strike("d")
    roster.strike("nobody")
    assert [view.worker_id for view in roster.views(ROOT)] == ["p"]


def test_equals_take_turns():
    book = LoadBook()
    roster = Roster(book, POLICY.standing)
    for n in range(100):
        roster.enlist(info(f"d{n}", "decode"))
    first = Counter()
    for _ in range(400):
        choice = POLICY.choose(Demand(100, 16, {}), roster.views(ROOT))
        first[choice.decode.worker_id] += 1
        book.book(choice.decode.worker_id, decode_blocks=7).release()
    assert len(first) > 60
    assert max(first.values()) < 40


def test_thousands_are_not_looked_at():
    """The best is found among many, and few had to be weighed for it."""
    book = LoadBook()
    policy = CostPolicy(PolicyConfig(), random.Random(1))
    roster = Roster(book, policy.standing)
    rng = random.Random(4)
    for n in range(1000):
        roster.enlist(info(f"d{n}", "decode"))
        book.report(f"d{n}", Load(active_blocks=rng.randrange(1000, 9000)))
    held = {f"d{n}": CachedPrefix(rng.randrange(1, 300)) for n in rng.sample(range(1000), 40)}
    asked = Demand(5000, 16, held)
    usable = roster.views(ROOT)
    weighed = []
    original = policy._weigh
    policy._weigh = lambda *args: weighed.append(1) or original(*args)
    choice = policy.choose(asked, usable)
    costs = [original(policy._asked(asked), view, usable.pool("decode")).cost for view in usable]
    assert choice.cost == min(costs)
    assert len(weighed) < 50


def test_what_stands_for_a_host():
    plain = info("d", "decode", host="10.0.0.1")
    assert host_of(plain) == "10.0.0.1"
    from msgspec.structs import replace

    shm = replace(plain, endpoints=[KvEndpoint("tcp", "x:1"), KvEndpoint("shm", "name", host_id="boot-7")])
    assert host_of(shm) == "boot-7"
