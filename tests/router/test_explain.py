"""A router can say of each of its last requests why it went where it went."""

from __future__ import annotations

import asyncio

import pytest

from router.config import PolicyConfig
from router.explain import Decisions
from router.generation import InvalidRequest, Unavailable
from tests.router.fake_cluster import FakeCluster, generation, until
from tests.router.test_dispatch import once

STAGES = {"queue", "choose", "reserve", "prefill_queue", "prefill", "transfer", "first_token"}


async def test_a_request_is_explained_whole(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=2, prefills=2)
        await cluster.check(generation(7))
        found = cluster.dispatcher.explain("r7")
        assert found["router_id"] == cluster.dispatcher.router_id
        (request,) = found["requests"]
        assert (request["policy"], request["outcome"], request["prompt_tokens"]) == ("cost", "length", 200)
        assert request["output_tokens"] == 20
        (placement,) = request["placements"]
        assert placement["outcome"] == "finished"
        assert placement["decode"] in {"d0", "d1"}
        assert placement["prefill"] in {"p0", "p1"}
        assert set(placement["seconds"]) == STAGES
        spans = placement["seconds"]
        whole = sum(spans[stage] for stage in ("queue", "choose", "reserve", "first_token"))
        assert whole == pytest.approx(request["first_token_s"], abs=0.005), "the stages are the whole of it"
        assert (placement["transfer_bytes"], placement["channel"]) == (1000, "fake")
        candidates = placement["candidates"]
        assert {c["worker_id"] for c in candidates} == {"d0", "d1", "p0", "p1"}
        chosen = {c["worker_id"] for c in candidates if c["chosen"]}
        assert chosen == {placement["decode"], placement["prefill"]}
        for one in candidates:
            terms = one["queued"] + one["prompt"] - one["credit"] + one["decode"]
            assert one["cost"] == pytest.approx(terms, abs=0.01)
        total = sum(c["cost"] for c in candidates if c["chosen"]) + placement["distance"]
        assert placement["cost"] == pytest.approx(total, abs=0.1)
        for stage in STAGES:
            count = cluster.metric("headrace_dispatch_stage_seconds_count", stage=stage, where="remote")
            assert count == 1, stage
        await cluster.at_rest()


async def test_what_failed_on_the_way_is_told(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=2, prefills=0, hook=once("token", "die", after=4))
        await cluster.check(generation())
        (request,) = cluster.dispatcher.explain("r0")["requests"]
        first, second = request["placements"]
        assert (first["outcome"], second["outcome"]) == ("link_lost", "finished")
        assert first["decode"] in first["message"]
        assert (first["output_tokens_before"], second["output_tokens_before"]) == (0, 4)
        assert first["decode"] != second["decode"]
        assert second["prefill"] == second["decode"], "it prefills by itself"
        assert set(second["seconds"]) == {"queue", "choose", "reserve", "first_token"}
        await cluster.at_rest()


async def test_requests_that_run_wait_fail_or_leave(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(step_s=0.01)
        running = asyncio.create_task(cluster.generate(generation(1, max_tokens=1000)))
        await until(lambda: cluster["d0"].num_held == 1)
        (request,) = cluster.dispatcher.explain("r1")["requests"]
        assert (request["outcome"], request["placements"][0]["outcome"]) == ("running", "running")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert cluster.dispatcher.explain("r1")["requests"][0]["outcome"] == "cancelled"
        cluster["d0"].hook = once("reserve", "invalid")
        with pytest.raises(InvalidRequest):
            await cluster.generate(generation(2))
        (refused,) = cluster.dispatcher.explain("r2")["requests"]
        assert (refused["outcome"], refused["placements"][0]["outcome"]) == (
            "invalid_request_error",
            "invalid",
        )
        assert "told to be invalid" in refused["message"]
        cluster["d0"].hook = lambda stage, work: "busy" if stage == "reserve" else None
        waiting = asyncio.create_task(cluster.generate(generation(3)))
        await until(lambda: cluster.dispatcher.admission.waiting == 1)
        assert cluster.dispatcher.explain("r3")["requests"][0]["placements"][0]["outcome"] == "busy"
        await cluster.dispatcher.stop()
        with pytest.raises(Unavailable):
            await waiting
        assert cluster.dispatcher.explain("r3")["requests"][0]["outcome"] == "service_unavailable_error"


async def test_only_the_last_are_kept(valkey):
    async with FakeCluster(valkey.url, policy=PolicyConfig(keep_decisions=3)) as cluster:
        await cluster.start()
        for number in range(5):
            await cluster.check(generation(number, max_tokens=2))
        assert cluster.dispatcher.explain("r1") is None
        assert cluster.dispatcher.explain("r2") is not None
        assert cluster.dispatcher.explain("last")["requests"][0]["request_id"] == "r4"
        assert len(cluster.dispatcher.decisions) == 3


def test_sequences_of_one_request_go_together():
    decisions = Decisions(10, "cost")
    for number in range(3):
        decisions.open(f"a-{number}", 5)
    decisions.open("ab", 5)
    assert [trace.request_id for trace in decisions.of("a")] == ["a-0", "a-1", "a-2"]
    assert [trace.request_id for trace in decisions.of("a-1")] == ["a-1"]
    assert decisions.of("b") == []
    assert Decisions(0, "cost").of("last") == []
    nothing = Decisions(0, "cost")
    nothing.open("a", 1)
    assert len(nothing) == 0
