from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from router.config import PolicyConfig
from router.policies.cost import CostPolicy
from router.policy import PREFILL_EVERYTHING, Demand, WorkerView, fetch_from
from router.prefix_index import CachedPrefix


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


def test_choosing_only_a_prefill_worker():
    views = [decode("d"), prefill("p1", queued=9), prefill("p2")]
    assert policy().choose_prefill(demand(), views).worker_id == "p2"
    assert policy().choose_prefill(demand(), views, exclude={"p2"}).worker_id == "p1"
    assert policy().choose_prefill(demand(), views, exclude={"p1", "p2"}) is None


@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500), st.integers(0, 70)), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 70)), max_size=4),
    st.integers(1, 1100),
)
def test_no_pair_is_cheaper(decodes, prefills, prompt):
    views = [decode(f"d{i}", q, b) for i, (q, b, _) in enumerate(decodes)]
    views += [prefill(f"p{i}", q) for i, (q, _) in enumerate(prefills)]
    cached = {f"d{i}": c for i, (_, _, c) in enumerate(decodes)}
    cached |= {f"p{i}": c for i, (_, c) in enumerate(prefills)}
    chooser = policy(local_prefill_max=64, tier_credit={"remote": 0})
    choice = chooser.choose(demand(prompt, **cached), views)

    def tokens(worker: str) -> int:
        return min(16 * cached[worker], prompt)

    costs = []
    for i, (queued, blocks, _) in enumerate(decodes):
        share = queued + prompt - tokens(f"d{i}") + blocks
        if not prefills or prompt - tokens(f"d{i}") <= 64:
            costs.append(share)
        else:
            costs += [share + q + prompt - tokens(f"p{j}") for j, (q, _) in enumerate(prefills)]
    assert choice.decode.cost + (choice.prefill.cost if choice.prefill else 0) == min(costs)
