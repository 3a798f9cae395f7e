from __future__ import annotations

import random
import statistics
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.config import PolicyConfig
from router.policies.cost import CostPolicy
from router.policy import PREFILL_EVERYTHING, Demand, WorkerView, fetch_from
from router.prefix_index import CachedPrefix
from router.roster import Listed
from tests.router.simulated_pool import SimulatedPool
from workers.protocol.messages import PeerStatus


def decode(worker_id: str, queued: int = 0, blocks: int = 0) -> WorkerView:
    return WorkerView(worker_id, "decode", queued, blocks)


def prefill(worker_id: str, queued: int = 0) -> WorkerView:
    return WorkerView(worker_id, "prefill", queued, 0)


def policy(**settings) -> CostPolicy:
    return CostPolicy(PolicyConfig(**settings), random.Random(1))


def demand(prompt: int = 1000, **cached_blocks: int | CachedPrefix) -> Demand:
    prefixes = {w: CachedPrefix(c) if isinstance(c, int) else c for w, c in cached_blocks.items()}
    return Demand(prompt, 16, prefixes)


def test_nobody_to_choose_from():
    assert policy().choose(demand(), []) is None
    assert policy().choose(demand(), [prefill("p")]) is None
    assert policy().choose(demand(), [decode("d")], exclude={"d"}) is None


def test_without_a_prefill_worker_the_decode_worker_does_it_all():
    choice = policy().choose(demand(), [decode("d")])
    assert (choice.decode.worker_id, choice.prefill, choice.local_prefill_max) == (
        "d",
        None,
        PREFILL_EVERYTHING,
    )
    excluded = policy().choose(demand(), [decode("d"), prefill("p")], exclude={"p"})
    assert (excluded.prefill, excluded.local_prefill_max) == (None, PREFILL_EVERYTHING)


def test_the_cost_is_the_designs_formula():
    views = [decode("d", queued=30, blocks=7), prefill("p", queued=50)]
    chooser = policy(cache_credit=0.5, decode_block_weight=2, tier_credit={"remote": 0})
    choice = chooser.choose(demand(1000, d=10, p=20), views)
    assert choice.decode.cost == 30 + 1000 - 0.5 * 160 + 2 * 7
    assert choice.prefill.cost == 50 + 1000 - 0.5 * 320
    assert (choice.decode.uncached_tokens, choice.prefill.uncached_tokens) == (840, 680)
    assert [score.worker_id for score in choice.scores] == ["d", "p"]


def test_a_short_uncached_rest_needs_no_prefill_worker():
    views = [decode("d"), prefill("p")]
    assert policy(local_prefill_max=64).choose(demand(1024, d=60), views).prefill is None
    assert policy(local_prefill_max=63).choose(demand(1024, d=60), views).prefill.worker_id == "p"


def test_what_a_prefill_worker_costs_counts_when_decode_workers_are_compared():
    # d1 looks a little cheaper, but would need the crowded prefill worker; d2 can do the rest alone.
    views = [decode("d1"), decode("d2", blocks=1000), prefill("p", queued=5000)]
    assert policy().choose(demand(1000, d2=60), views).decode.worker_id == "d2"


def test_cache_and_load_are_weighed_against_each_other():
    views = [decode("cached", queued=100), decode("idle")]
    assert policy().choose(demand(1000, cached=30), views).decode.worker_id == "cached"
    views = [decode("cached", queued=600), decode("idle")]
    assert policy().choose(demand(1000, cached=30), views).decode.worker_id == "idle"


def test_more_cached_than_the_prompt_is_worth_the_prompt():
    assert policy().choose(demand(10, d=5), [decode("d")]).decode.uncached_tokens == 0


def test_slower_tiers_are_worth_less_but_are_cached_all_the_same():
    views = [decode("d"), decode("h"), decode("k"), prefill("p")]
    held = {"d": CachedPrefix(40), "h": CachedPrefix(40, host=30), "k": CachedPrefix(40, host=10, disk=20)}
    alone = policy(cache_credit=0.5, local_prefill_max=500, tier_credit={"remote": 0})
    choice = alone.choose(demand(1000, **held), views)
    cost = {score.worker_id: score.cost for score in choice.scores}
    assert cost["d"] == 1000 - 0.5 * 16 * 40
    assert cost["h"] == 1000 - 0.5 * 16 * (10 + 0.75 * 30)
    assert cost["k"] == 1000 - 0.5 * 16 * (10 + 0.75 * 10 + 0.25 * 20)
    assert {s.uncached_tokens for s in choice.scores if s.role == "decode"} == {360}
    # What has to be loaded first need not be computed: no prefill worker, although the credit is small.
    only_disk = demand(1024, k=CachedPrefix(60, disk=60))
    assert policy(local_prefill_max=64).choose(only_disk, [decode("k"), prefill("p")]).prefill is None
    equal = policy(tier_credit={"host": 1, "disk": 1, "remote": 0}).choose(demand(1000, **held), views)
    assert len({s.cost for s in equal.scores if s.role == "decode"}) == 1


def test_what_can_be_fetched_from_another_worker_counts_in_part():
    views = [decode("d"), decode("e"), prefill("p")]
    chooser = policy(fetch_min_tokens=64, tier_credit={"remote": 0.5})
    cost = {s.worker_id: s.cost for s in chooser.choose(demand(1000, d=50, e=47, p=10), views).scores}
    assert cost["d"] == 1000 - 800, "nobody has more"
    assert cost["e"] == 1000 - 752, "three blocks are not worth the way"
    assert cost["p"] == 1000 - 160 - 0.5 * (640 - 64)
    below = chooser.choose(demand(1000, d=CachedPrefix(50, host=48)), views)
    assert {s.worker_id: s.cost for s in below.scores}["e"] == 1000, "only a KV cache is fetched from"


def test_whom_to_fetch_from():
    held = demand(1000, d=50, e=40, p=10)
    assert fetch_from(held, "p", lambda worker: True, 64) == ("d", 50)
    assert fetch_from(held, "p", lambda worker: worker != "d", 64) == ("e", 40)
    assert fetch_from(held, "d", lambda worker: True, 64) is None
    assert fetch_from(demand(1000, d=13, p=10), "p", lambda worker: True, 64) is None
    assert fetch_from(demand(1000, d=14, p=10), "p", lambda worker: True, 64) == ("d", 14)
    assert fetch_from(demand(1000, d=CachedPrefix(50, host=30)), "p", lambda worker: True, 64) == ("d", 20)
    assert fetch_from(demand(1000), "p", lambda worker: True, 64) is None


def test_ties_are_broken_at_random():
    chooser = policy()
    views = [decode("d1"), decode("d2"), decode("d3"), prefill("p1"), prefill("p2")]
    choices = [chooser.choose(demand(), views) for _ in range(300)]
    assert min(Counter(c.decode.worker_id for c in choices).values()) > 60
    assert min(Counter(c.prefill.worker_id for c in choices).values()) > 100


def test_what_is_nearly_equal_may_count_as_equal():
    views = [decode("d1"), decode("d2", blocks=90), decode("d3", blocks=110)]
    chooser = policy(tolerance=0.1)
    picked = Counter(chooser.choose(demand(1000), views).decode.worker_id for _ in range(200))
    assert set(picked) == {"d1", "d2"}
    assert min(picked.values()) > 60
    prefills = [prefill("p1"), prefill("p2", queued=100), prefill("p3", queued=101)]
    assert {chooser.choose_prefill(demand(1000), prefills).worker_id for _ in range(60)} == {"p1", "p2"}


def test_choosing_only_a_prefill_worker():
    views = [decode("d"), prefill("p1", queued=9), prefill("p2")]
    assert policy().choose_prefill(demand(), views).worker_id == "p2"
    assert policy().choose_prefill(demand(), views, exclude={"p2"}).worker_id == "p1"
    assert policy().choose_prefill(demand(), views, exclude={"p1", "p2"}) is None


def test_a_slower_worker_is_as_if_it_had_more_to_do():
    slow = WorkerView("slow", "prefill", 100, 0, prefill_token_s=2e-4)
    fast = WorkerView("fast", "prefill", 1000, 0, prefill_token_s=1e-4)
    views = [decode("d"), slow, fast]
    cost = {s.worker_id: s.cost for s in policy().choose(demand(1000), views).scores}
    assert (cost["slow"], cost["fast"]) == (2 * (100 + 1000), 1000 + 1000)
    # Who has said nothing counts as fast, so that it gets work and can measure.
    assert policy().choose_prefill(demand(), [slow, fast, prefill("new", queued=500)]).worker_id == "new"
    steps = [
        WorkerView("a", "decode", 0, 100, decode_step_s=0.03),
        WorkerView("b", "decode", 0, 400, decode_step_s=0.01),
    ]
    score = policy().choose(demand(1600), steps).decode
    assert score.worker_id == "b"
    a = next(s for s in policy().choose(demand(1600), steps).scores if s.worker_id == "a")
    assert a.decode == pytest.approx(3 * 100 + 2 * 100), "its streams, and what the request itself brings"


def test_tokens_cost_more_the_more_they_attend_to():
    attention = 1e-3  # a position that is attended to costs a thousandth of a token
    waits = WorkerView("p", "prefill", 500, 0, prefill_token_s=1e-4, queued_prefill_pairs=400_000)
    asks = WorkerView("q", "prefill", 4000, 0, prefill_token_s=1e-4, prefill_pair_s=1e-4 * attention)
    scores = policy(tier_credit={"remote": 0}).choose(demand(3200, q=100), [decode("d"), waits, asks]).scores
    by_name = {score.worker_id: score for score in scores}
    assert by_name["p"].queued == pytest.approx(500 + 400)
    assert by_name["p"].prompt == pytest.approx(sum(1 + attention * (at + 0.5) for at in range(3200)))
    last = sum(1 + attention * (at + 0.5) for at in range(1600, 3200))
    assert by_name["q"].cost == pytest.approx(4000 + last), "it computes the end, which is the dearer half"
    unknown = policy().choose(demand(3200), [decode("d"), waits]).scores
    assert next(score.queued for score in unknown if score.worker_id == "p") == 500


def test_what_will_be_fetched_is_not_work():
    views = [decode("d"), prefill("p"), prefill("q", queued=5000)]
    chosen = policy(fetch_min_tokens=64).choose(demand(1600, q=90), views).prefill
    assert (chosen.worker_id, chosen.cached_tokens, chosen.uncached_tokens) == ("p", 0, 1600)
    assert (chosen.fetch_tokens, chosen.prefill_tokens, chosen.prompt_tokens) == (1440, 160, 1600)
    near = policy(fetch_min_tokens=64).choose(demand(1600, p=87, q=90), views).prefill
    assert (near.worker_id, near.fetch_tokens, near.prefill_tokens) == ("p", 0, 1600 - 87 * 16)


def test_credit_shrinks_with_heat_and_a_lone_conversation_stays():
    def views(hot: float, others: float) -> list[WorkerView]:
        return [
            WorkerView("hot", "decode", 0, 0, hot),
            *(WorkerView(f"d{n}", "decode", 0, 0, others) for n in range(3)),
        ]

    def credit(hot: float, others: float, **settings) -> float:
        choice = policy(**settings, tier_credit={"remote": 0}).choose(
            demand(1600, hot=100), views(hot, others)
        )
        return next(score.credit for score in choice.scores if score.worker_id == "hot")

    assert credit(4, 4) == 1600
    assert credit(6, 2) == 1600 * 0, "twice the mean of 3"
    assert credit(4.5, 2.5) == pytest.approx(1600 * 0.5)
    assert credit(4.5, 2.5, heat_limit=4) == pytest.approx(1600 * (1 - 0.5 / 3))
    assert credit(40, 2, heat_limit=None) == 1600
    assert credit(1, 0) == 1600, "one request at a time is no heat, however idle the others are"


def test_the_way_between_prefill_and_decode_counts():
    def view(name: str, role: str, host: str, **peers: float) -> WorkerView:
        ways = {peer: PeerStatus("tcp", bytes_per_s=rate) for peer, rate in peers.items()}
        return WorkerView(name, role, 0, 0, host=host, prefill_token_s=1e-4, peers=ways)

    def asked(views: list[WorkerView]) -> tuple[str, str, float]:
        choice = policy().choose(Demand(1000, 16, {}, token_bytes=100_000), views)
        return choice.decode.worker_id, choice.prefill.worker_id, choice.distance

    far = [view("d0", "decode", "a"), view("p0", "prefill", "b")]
    assert asked(far) == ("d0", "p0", pytest.approx(1000 * 100_000 / 1e9 / 1e-4))
    many = [view(f"p{n}", "prefill", f"h{n}") for n in range(1, 60)]
    assert asked([*far, *many, view("near", "prefill", "a")])[:2] == ("d0", "near")
    assert asked([*far, view("d1", "decode", "b"), view("d2", "decode", "c")])[:2] == ("d1", "p0")
    # What was measured goes before what is only assumed of hosts.
    measured = [view("quick", "prefill", "c", d0=1e10), view("near", "prefill", "a", d0=1e9)]
    assert asked([far[0], *measured]) == ("d0", "quick", pytest.approx(1000 * 100_000 / 1e10 / 1e-4))
    # A way that was never taken is thought to be as the slowest of those that were.
    assert asked([far[0], view("p", "prefill", "c", d7=2e10, d8=5e9)])[2] == pytest.approx(
        1000 * 100_000 / 5e9 / 1e-4
    )


def test_the_nearest_is_not_worth_any_queue():
    d = WorkerView("d", "decode", 0, 0, host="a", prefill_token_s=1e-4)
    near = WorkerView("near", "prefill", 2000, 0, host="a", prefill_token_s=1e-4)
    far = WorkerView("far", "prefill", 0, 0, host="b", prefill_token_s=1e-4)
    asked = Demand(1000, 16, {}, token_bytes=100_000)
    assert policy(local_prefill_stall_s=0).choose(asked, [d, near, far]).prefill.worker_id == "far"
    # 100 MB at 4 and at 1 GB/s: 250 and 1,000 tokens of work
    assert (
        policy().choose(asked, [d, near._replace(queued_prefill_tokens=700), far]).prefill.worker_id == "near"
    )


def test_decode_workers_help_out_while_prefill_workers_are_behind():
    def local_max(queued: int, blocks: int = 0, own: int = 0, token_s: float = 1e-4, **settings) -> int:
        d = WorkerView("d", "decode", own, blocks, prefill_token_s=2 * token_s)
        p = WorkerView("p", "prefill", queued, 0, prefill_token_s=token_s)
        return policy(**settings).choose(demand(3000), [d, p]).local_prefill_max

    assert local_max(0) == 64, "nobody waits"
    assert local_max(100) == 64
    assert local_max(4000) == 2000, "what it can compute until P could begin"
    assert local_max(4000, own=500) == 1500
    assert local_max(4000, blocks=1) == 500, "running streams are held up by 0.1 s at most"
    assert local_max(4000, blocks=1, own=450) == 64
    assert local_max(4000, blocks=1, local_prefill_stall_s=0) == 64
    assert local_max(4000, token_s=0.0) == 64, "nobody knows how long that would take"
    choice = policy().choose(
        demand(1900), [decode("d"), WorkerView("p", "prefill", 4000, 0, prefill_token_s=1e-4)]
    )
    assert choice.prefill is None


WORKERS = st.lists(
    st.tuples(
        st.sampled_from(["decode", "prefill"]),
        st.integers(0, 3000),
        st.integers(0, 500),
        st.integers(0, 70),
        st.sampled_from([0.0, 1e-4, 2e-4, 5e-4]),
        st.floats(0, 8),
        st.sampled_from([0.0, 1e-7, 3e-7]),
    ),
    min_size=1,
    max_size=60,
)


def seen(workers: list[tuple], prompt: int) -> tuple[list[WorkerView], Demand]:
    views = [
        WorkerView(
            f"{role[0]}{n}",
            role,
            queued,
            blocks,
            recent,
            token_s,
            queued_prefill_pairs=queued * 700,
            prefill_pair_s=pair_s,
        )
        for n, (role, queued, blocks, _, token_s, recent, pair_s) in enumerate(workers)
    ]
    held = {
        view.worker_id: CachedPrefix(worker[3])
        for view, worker in zip(views, workers, strict=True)
        if worker[3]
    }
    return views, Demand(prompt, 16, held)


@given(WORKERS, st.integers(1, 1100))
@settings(max_examples=150, deadline=None)
def test_no_pair_is_cheaper(workers, prompt):
    """Against every pair, by a formula of its own."""
    views, asked = seen(workers, prompt)
    chooser = policy(tier_credit={"remote": 0}, local_prefill_stall_s=0)
    shares: dict[str, list[tuple[float, int]]] = {"decode": [], "prefill": []}
    for view in views:
        pool = [v for v in views if v.role == view.role]
        fastest = min((v.prefill_token_s for v in pool if v.prefill_token_s), default=0)
        pace = view.prefill_token_s / fastest if view.prefill_token_s else 1
        mean = sum(v.recent_requests for v in pool) / len(pool)
        heat = view.recent_requests / max(mean, 1 if view.role == "decode" else 0.25)
        cached = min(16 * asked.cached_blocks.get(view.worker_id, CachedPrefix(0)).blocks, prompt)
        told = [v.prefill_pair_s / v.prefill_token_s for v in pool if v.prefill_pair_s and v.prefill_token_s]
        more = statistics.median(told) if told else 0
        queued = view.queued_prefill_tokens * (1 + 700 * more)
        own, saved = (prompt + more * prompt**2 / 2), (cached + more * cached**2 / 2)
        share = pace * (queued + own - saved * min(max(2 - heat, 0), 1))
        shares[view.role].append(
            (share + (view.active_blocks if view.role == "decode" else 0), prompt - cached)
        )
    choice = chooser.choose(asked, views)
    if not shares["decode"]:
        assert choice is None
        return
    cheapest = min((share for share, _ in shares["prefill"]), default=0)
    idle = [view for view in views if view.role == "decode" and not view.active_blocks]
    if idle and shares["prefill"]:
        return  # may read longer prompts by itself: another test's
    costs = [
        share + (cheapest if shares["prefill"] and uncached > 64 else 0)
        for share, uncached in shares["decode"]
    ]
    assert choice.cost == pytest.approx(min(costs))


@given(WORKERS, st.integers(1, 1100), st.integers(0, 59), st.integers(1, 40), st.integers(1, 2000))
@settings(max_examples=150, deadline=None)
def test_more_cached_never_costs_more_and_more_queue_never_less(workers, prompt, number, blocks, tokens):
    number %= len(workers)
    chooser = policy(fetch_min_tokens=64)

    def cost(views: list[WorkerView], asked: Demand) -> float:
        pool = Listed(views, chooser.standing, random.Random(1))
        view = views[number]
        return chooser._weigh(chooser._asked(asked), view, pool.pool(view.role)).cost

    views, asked = seen(workers, prompt)
    before = cost(views, asked)
    name = views[number].worker_id
    for tier in ("device", "host", "disk"):
        held = asked.cached_blocks.get(name, CachedPrefix(0))
        more = CachedPrefix(held.blocks + blocks, blocks * (tier == "host"), blocks * (tier == "disk"))
        richer = Demand(prompt, 16, {**asked.cached_blocks, name: more})
        if more.blocks * 16 <= prompt:  # beyond the prompt there is nothing to save
            assert cost(views, richer) <= before + 1e-6, tier
    queue = [
        v._replace(queued_prefill_tokens=v.queued_prefill_tokens + tokens) if v.worker_id == name else v
        for v in views
    ]
    assert cost(queue, asked) >= before
    streams = [
        v._replace(active_blocks=v.active_blocks + tokens) if v.worker_id == name else v for v in views
    ]
    assert cost(streams, asked) >= before


def pools(size: int = 8, slow: int = 0, **settings) -> SimulatedPool:
    paces = {f"p{n}": 3e-4 if n < slow else 1e-4 for n in range(size)}
    return SimulatedPool(policy(**settings), paces | {f"d{n}": 1e-4 for n in range(size)})


def spread(simulated: SimulatedPool, role: str) -> list[int]:
    return [simulated.picked[worker_id] for worker_id in simulated.token_s if worker_id[0] == role]


def test_a_popular_prefix_spreads_and_stays_spread():
    """One prefix that all requests share, held by one worker of each pool when the rush begins."""
    simulated = pools()
    simulated.run(0.5, 20, lambda n: 0, prefix=8000, fresh=200)
    assert max(spread(simulated, "p")) == sum(spread(simulated, "p")), "alone it would stay where it is"
    simulated.picked.clear()
    began = simulated.now
    simulated.run(100, 30, lambda n: 0, prefix=8000, fresh=200)
    for role in ("p", "d"):
        counts = spread(simulated, role)
        assert max(counts) <= 2 * sum(counts) / 8, role
        assert min(counts) >= sum(counts) / 8 / 3, "nobody starves"
    for start in range(10, 30, 4):  # once spread it does not swing from one worker to the other
        window = Counter(w for at, w in simulated.log if start <= at - began < start + 4 and w[0] == "p")
        assert max(window.values()) <= 2 * sum(window.values()) / 8
    assert simulated.book.num_open == 0


def test_without_heat_it_would_not_spread():
    simulated = pools(heat_limit=None)
    simulated.run(0.5, 20, lambda n: 0, prefix=8000, fresh=200)
    simulated.picked.clear()
    simulated.run(100, 15, lambda n: 0, prefix=8000, fresh=200)
    assert max(spread(simulated, "p")) > 6 * sum(spread(simulated, "p")) / 8


def test_slow_workers_get_what_they_can_do():
    simulated = pools(slow=4)
    simulated.run(30, 20, lambda n: n, prefix=0, fresh=1500)  # the fast four alone could do 27 a second
    counts = spread(simulated, "p")
    assert 3 < sum(counts[4:]) / sum(counts[:4]) < 10
    assert min(counts) > 0
    assert sorted(simulated.ttft)[len(simulated.ttft) // 2] < 1.5


def test_conversations_stay_where_their_prefix_is():
    simulated = pools()
    simulated.run(4, 40, lambda n: n % 5, prefix=2000, fresh=100)
    assert sum(1 for seconds in simulated.ttft if seconds < 0.1) > 0.85 * len(simulated.ttft)
