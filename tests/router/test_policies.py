"""What every policy must hold, whatever it weighs."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from router.config import POLICY_NAMES, PolicyConfig
from router.policies import POLICIES, open_policy
from router.policy import PREFILL_EVERYTHING, Demand, WorkerView
from router.prefix_index import CachedPrefix
from tests.router.simulated_pool import SimulatedPool

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "routing.md"


def opened(name: str):
    return open_policy(PolicyConfig(name=name), random.Random(1))


def views(decodes: int = 3, prefills: int = 3) -> list[WorkerView]:
    return [WorkerView(f"d{n}", "decode", 0, n) for n in range(decodes)] + [
        WorkerView(f"p{n}", "prefill", n, 0) for n in range(prefills)
    ]


def test_the_configuration_knows_every_policy():
    assert tuple(POLICIES) == POLICY_NAMES
    with pytest.raises(ValidationError, match=r"must be one of cost, round_robin.* or module:Class"):
        PolicyConfig(name="best")
    with pytest.raises(ValueError, match=r"router.policy.name is 'no.such:Thing': No module named 'no'"):
        opened("no.such:Thing")
    with pytest.raises(ValueError, match=r"has no attribute 'Nothing'"):
        opened("router.policy:Nothing")


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_leaves_alone_whom_it_must(name):
    policy = opened(name)
    asked = Demand(1000, 16, {"d0": CachedPrefix(60), "p0": CachedPrefix(60)})
    for _ in range(30):
        choice = policy.choose(asked, views(), exclude={"d0", "p0", "p1"})
        assert choice.decode.worker_id in {"d1", "d2"}
        assert choice.prefill.worker_id == "p2"
        assert policy.choose_prefill(asked, views(), exclude={"p0", "p2"}).worker_id == "p1"
    assert policy.choose(asked, views(decodes=0)) is None
    assert policy.choose(asked, views(decodes=1), exclude=["d0"]) is None
    assert policy.choose_prefill(asked, views(prefills=1), exclude=["p0"]) is None
    assert policy.choose_prefill(asked, []) is None


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_says_who_prefills(name):
    policy = opened(name)
    short, long = Demand(60, 16, {}), Demand(1000, 16, {})
    assert policy.choose(short, views()).prefill is None
    assert policy.choose(long, views()).prefill is not None
    alone = policy.choose(long, views(prefills=0))
    assert (alone.prefill, alone.local_prefill_max) == (None, PREFILL_EVERYTHING)
    choice = policy.choose(Demand(1000, 16, {f"d{n}": CachedPrefix(60) for n in range(3)}), views())
    assert (choice.prefill, choice.decode.cached_tokens, choice.decode.uncached_tokens) == (None, 960, 40)
    assert choice.decode in choice.scores


@pytest.mark.parametrize("name", set(POLICIES) - {"prefix_only"})
def test_no_worker_starves_and_everything_is_released(name):
    policy = open_policy(PolicyConfig(name=name), random.Random(1))
    simulated = SimulatedPool(policy, {f"{role}{n}": 1e-4 for role in "pd" for n in range(6)})
    simulated.run(60, 20, lambda n: n % 7, prefix=1000, fresh=300)
    for role in "pd":
        counts = [simulated.picked[f"{role}{n}"] for n in range(6)]
        assert min(counts) > sum(counts) / 6 / 4
    assert simulated.book.num_open == 0


def test_what_the_baselines_look_at():
    asked = Demand(1000, 16, {"d2": CachedPrefix(5), "p1": CachedPrefix(9)})
    turns = opened("round_robin")
    picked = [turns.choose(asked, views()) for _ in range(6)]
    assert [c.decode.worker_id for c in picked] == ["d0", "d1", "d2"] * 2
    assert [c.prefill.worker_id for c in picked] == ["p0", "p1", "p2"] * 2
    least = opened("least_loaded").choose(asked, views())
    assert (least.decode.worker_id, least.prefill.worker_id) == ("d0", "p0")
    prefix = opened("prefix_only").choose(asked, views())
    assert (prefix.decode.worker_id, prefix.prefill.worker_id) == ("d2", "p1")
    two = opened("power_of_two")
    counts = Counter(two.choose(asked, views()).decode.worker_id for _ in range(300))
    assert counts["d2"] == 0, "never the worse of two"
    assert counts["d0"] > counts["d1"] > 50
    anybody = opened("random")
    assert min(Counter(anybody.choose(asked, views()).decode.worker_id for _ in range(300)).values()) > 60


def test_the_policy_of_the_documentation_works(tmp_path, monkeypatch):
    """docs/routing.md: how to write one's own."""
    (code,) = re.findall(r"```python\n(# mypolicy\.py.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 30
    (tmp_path / "mypolicy.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mypolicy", raising=False)
    names = re.findall(r"router\.policy\.name=(mypolicy:\w+)", DOCS.read_text(encoding="utf-8"))
    policy = opened(names[0])
    asked = Demand(1000, 16, {})
    assert policy.choose(asked, views(decodes=0)) is None
    by_salt = {policy.choose(asked, views()).decode.worker_id for _ in range(20)}
    assert by_salt == {"d0"}, "it is the worker with the fewest blocks in use"
    assert policy.choose(asked, views()).prefill.worker_id == "p0"
    assert policy.choose_prefill(asked, views(), {"p0"}).worker_id == "p1"
