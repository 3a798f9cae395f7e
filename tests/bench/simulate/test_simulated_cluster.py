"""Whole runs: what is conserved, what leaks, what theory says, and that the same seed gives the same bytes."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.simulate.capacity import capacity_per_s
from bench.simulate.cluster import Cluster, ClusterConfig, Fault
from bench.simulate.cost import StepCost
from bench.simulate.index_stream import StreamConfig
from bench.simulate.jobs import Asked
from bench.simulate.network import Wires
from bench.simulate.outcome import Slo, summary
from bench.simulate.policies import NAMES
from bench.simulate.worker import Limits
from tests.bench.simulate.clusters import BLOCK, config, simulate, trace, unbounded

SHAPES = [{"decode": 3}, {"prefill": 2, "decode": 2}, {"prefill": 1, "decode": 3, "routers": 2}]


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_request_ends_once_and_every_token_is_counted(policy: str, shape: dict[str, int]) -> None:
    asked = trace()
    cluster = simulate(config(policy=policy, **shape), asked)
    assert [job.outcome for job in cluster.jobs] == ["finished"] * len(asked)
    assert all(job.done == job.asked.output_tokens for job in cluster.jobs)
    assert sum(worker.output_tokens for worker in cluster.workers) == sum(a.output_tokens for a in asked)
    assert all(job.arrived_s <= job.placed_s <= job.first_token_s <= job.ended_s for job in cluster.jobs)
    # Nothing was preempted: a prompt token was computed once, or was cached.
    assert sum(worker.preemptions for worker in cluster.workers) == 0
    computed = sum(worker.prompt_tokens for worker in cluster.workers)
    wanted = sum(a.prompt_tokens for a in asked)
    assert computed == wanted - sum(job.cached_tokens for job in cluster.jobs)


def test_a_turn_comes_after_the_answer_before_it() -> None:
    cluster = simulate(config(), trace())
    for job in cluster.jobs:
        if job.asked.after is not None:
            before = cluster.jobs[job.asked.after]
            assert job.arrived_s == pytest.approx(before.ended_s + job.asked.at_s)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_caches_preempt_and_evict_and_still_nothing_is_lost(shape: dict[str, int]) -> None:
    asked = trace(answer_tokens=(40, 200))
    cluster = simulate(config(num_blocks=75, **shape), asked, speed=5.0)
    assert sum(worker.preemptions for worker in cluster.workers) > 0
    assert all(job.done == job.asked.output_tokens for job in cluster.jobs)
    assert sum(w.output_tokens for w in cluster.workers) == sum(a.output_tokens for a in asked)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_deaths_lost_batches_and_a_redis_that_is_away(shape: dict[str, int]) -> None:
    asked = trace()
    faults = (
        Fault("death", 0.5, 0.4, 0),
        Fault("away", 0.8, 0.7),
        Fault("death", 1.2, 0.3, 2),
        Fault("death", 2.0, 0.5, 1),
    )
    cluster = simulate(config(faults=faults, stream=StreamConfig(0.01, 0.1), **shape), asked)
    assert [job.outcome for job in cluster.jobs] == ["finished"] * len(asked)
    assert sum(job.failures > 0 for job in cluster.jobs) > 0
    assert len(cluster.past) == 3
    assert [worker.epoch for worker in cluster.workers[:3]] == [2, 2, 2]
    assert all(router.num_snapshots > len(cluster.workers) for router in cluster.routers)


def test_a_worker_that_dies_again_before_it_has_registered() -> None:
    """Found by the test of any small cluster: its link was made after its end, and nobody told of that."""
    faults = tuple(Fault("death", at, 0.05, 0) for at in (0.3, 0.36, 0.42, 0.5, 0.58, 0.7, 0.9))
    for seed in range(10):
        cluster = simulate(config(decode=1, faults=faults, seed=seed), trace())
        assert all(job.outcome in ("finished", "failed") for job in cluster.jobs)


def test_who_finds_no_place_in_the_line_is_refused() -> None:
    router = unbounded().model_copy(
        update={
            "admission": unbounded().admission.model_copy(update={"max_queue": 2, "queue_timeout_s": 0.5})
        }
    )
    asked = [Asked(0.0, 500, 50, ()) for _ in range(60)]
    cluster = simulate(config(decode=1, num_blocks=40, router=router), asked)
    outcomes = {job.outcome for job in cluster.jobs}
    assert outcomes == {"finished", "refused"}


@pytest.mark.parametrize("prefill", [0, 2])
def test_the_same_seed_gives_the_same_bytes(prefill: int) -> None:
    def once(seed: int) -> str:
        cluster = simulate(
            config(policy="random", prefill=prefill, stream=StreamConfig(0.01, 0.05), seed=seed), trace()
        )
        return json.dumps(summary(cluster, Slo()))

    assert once(1) == once(1)
    assert once(1) != once(2)


@pytest.mark.parametrize("load", [pytest.param(0.5, marks=pytest.mark.slow), 0.7])
def test_one_worker_with_one_kind_of_request_is_m_d_1(load: float) -> None:
    """Pollaczek and Khinchine: the mean wait is load · service / (2 · (1 − load))."""
    service_s, tokens, count = 0.1, 64, 25_000
    cost = StepCost(((1.0, service_s),), 0.0, 0.0, 0.0, 0.0, 0.0)
    rng = random.Random(7)
    asked, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(load / service_s)
        asked.append(Asked(now, tokens, 1, ()))
    cluster = simulate(
        ClusterConfig(
            cost=cost,
            limits=Limits(num_blocks=1000, block_size=BLOCK, max_num_seqs=8, max_num_batched_tokens=tokens),
            decode=1,
            router=unbounded(),
            wires=Wires(message_s=0.0),
        ),
        asked,
    )
    wait_s = sum(job.ttft_s for job in cluster.jobs) / count - service_s
    assert wait_s == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.04)
    assert cluster.workers[0].busy_s == pytest.approx(count * service_s)


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_any_small_cluster_comes_to_rest(seed: int) -> None:
    rng = random.Random(seed)
    asked = trace(sessions=rng.randint(1, 15), seed=seed, answer_tokens=(1, 150))
    shape = {"decode": rng.randint(1, 3), "prefill": rng.randint(0, 2), "routers": rng.randint(1, 2)}
    faults = tuple(
        Fault("death", rng.random() * 2, rng.random(), rng.randrange(shape["decode"] + shape["prefill"]))
        for _ in range(rng.randint(0, 3))
    )
    policy = rng.choice(list(NAMES))
    chosen = config(
        num_blocks=rng.randint(75, 200),
        faults=faults,
        policy=policy,
        seed=seed,
        stream=StreamConfig(rng.random() * 0.1, rng.choice([0.0, 0.2])),
        fetching=rng.random() < 0.5,
        **shape,
    )
    cluster = simulate(chosen, asked, speed=rng.choice([0.5, 3.0, 20.0]))
    assert all(job.outcome in ("finished", "failed") for job in cluster.jobs)


def test_capacity_is_what_a_saturated_cluster_does() -> None:
    """Requests that need exactly one step each: as many a second as workers have steps."""
    service_s = 0.1
    cost = StepCost(((1.0, service_s),), 0.0, 0.0, 0.0, 0.0, 0.0)
    limits = Limits(num_blocks=1000, block_size=BLOCK, max_num_seqs=8, max_num_batched_tokens=64)
    chosen = ClusterConfig(cost=cost, limits=limits, decode=4, router=unbounded())
    asked = [Asked(float(n), 64, 1, ()) for n in range(2000)]
    assert capacity_per_s(chosen, asked) == pytest.approx(4 / service_s, rel=0.02)


def test_a_wrong_cluster_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="decode is 0"):
        config(decode=0)
    with pytest.raises(ValueError, match="there is no worker 7"):
        config(faults=(Fault("death", 1.0, 1.0, 7),))
    with pytest.raises(ValueError, match="kind is 'flood'"):
        Fault("flood", 1.0, 1.0)
    with pytest.raises(ValueError, match="policy 'best' is not known"):
        Cluster(config(policy="best"), trace())
    with pytest.raises(ValueError, match="request 0 has 7000 tokens"):
        Cluster(config(), [Asked(0.0, 6000, 1000, ())])
    with pytest.raises(ValueError, match="max_num_seqs"):
        Limits(10, 16, 0, 16)
