"""Ranks count, a router plans and posts, ranks switch: through a real Redis, with routers and ranks that die."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import msgspec
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from router.config import ExpertsConfig
from router.experts.board import Board
from router.experts.metrics import ExpertMetrics
from router.experts.planning import PlanAnswer, PlanAsk, PlanFailed, ProcessPlanner, answer
from router.experts.rebalancer import Phase
from router.experts.service import ExpertService
from tests.router.experts.fake_ranks import FakeGroup
from tests.router.fake_cluster import until
from workers.protocol import redis_keys
from workers.protocol.expert_messages import ExpertCounts
from workers.protocol.experts import contiguous

LAYERS, EXPERTS, RANKS, SLOTS = 3, 16, 4, 6
CONFIG = ExpertsConfig(
    interval_s=0.02, window_s=0.2, half_life_s=1.0, min_tokens=20_000, pause_s=0.3, stall_s=1.0, min_gain=0.03
)


class InThread:
    """Plans as the process does, without its start."""

    def __init__(self) -> None:
        self.asked = 0

    async def plan(self, ask: PlanAsk) -> PlanAnswer:
        self.asked += 1
        return await asyncio.to_thread(answer, ask)


class Router:
    """One replica's part."""

    def __init__(self, url: str, group: FakeGroup, name: str, planner=None, config=CONFIG) -> None:
        self.registry = CollectorRegistry()
        self.planner = planner or InThread()
        self.service = ExpertService(
            config,
            board=Board(url, "test", name),
            router_id=name,
            alive=group.alive,
            planner=self.planner,
            metrics=ExpertMetrics(self.registry),
        )

    async def __aenter__(self) -> Router:
        await self.service.start()
        return self

    async def __aexit__(self, *exc) -> None:
        await self.service.stop()

    async def crash(self) -> None:
        """As kill -9 does: nothing is given back."""
        running = {self.service._loop, *self.service._plans.values()}
        while running:  # once is not enough (bpo-42130)
            for task in running:
                task.cancel()
            _, running = await asyncio.wait(running, timeout=0.1)

    @property
    def phase(self) -> Phase | None:
        watched = self.service.groups.get("g")
        return None if watched is None else watched.verdict.phase

    def text(self) -> str:
        return self.service.groups["g"].verdict.text

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {"group": "g", **labels})


def skewed(seed: int = 0) -> np.ndarray:
    """The experts of one rank (as `contiguous` deals them) have most of the tokens."""
    loads = np.random.default_rng(seed).uniform(0.5, 1.5, (LAYERS, EXPERTS))
    loads[:, :4] *= 6
    return loads


@contextlib.asynccontextmanager
async def cluster(valkey, loads=None, routers=("r0",), slots=SLOTS, **more):
    async with FakeGroup(valkey.url, "test", skewed() if loads is None else loads, RANKS, slots) as group:
        async with contextlib.AsyncExitStack() as stack:
            yield (
                group,
                *[
                    await stack.enter_async_context(Router(valkey.url, group, name, **more))
                    for name in routers
                ],
            )


async def test_skewed_counts_lead_to_an_even_placement_that_the_ranks_switch_to(valkey):
    async with cluster(valkey) as (group, router):
        before = group.balancedness()
        await until(lambda: len(group.versions) > 1 and router.phase is Phase.BALANCED)
        assert before < 0.6
        assert group.balancedness() > 0.95
        assert group.versions == [0, 1]
        assert group.posts[0].why.startswith("balancedness 0.4")
        assert group.posts[0].router_id == "r0"
        assert router.metric("headrace_expert_placements_posted_total") == 1
        assert router.metric("headrace_expert_moves_total") > 0
        labels = {"pool": "decode"}
        assert router.metric("headrace_expert_placement_version", kind="in use", **labels) == 1
        assert router.metric("headrace_expert_balancedness", **labels) > 0.9
        assert router.metric("headrace_expert_tokens_total", rank="0", **labels) > 0


async def test_a_change_of_load_is_followed(valkey):
    async with cluster(valkey) as (group, router):
        await until(lambda: router.phase is Phase.BALANCED)
        for turn in (5, 9):
            group.loads = np.roll(skewed(turn), turn, axis=1)
            assert group.balancedness() < 0.9
            await until(lambda: group.balancedness() > 0.95 and router.phase is Phase.BALANCED)
        assert group.versions == sorted(set(group.versions))


async def test_an_even_load_is_left_alone_however_noisy(valkey):
    even = np.ones((LAYERS, EXPERTS))
    async with cluster(valkey, loads=even) as (group, router):
        await until(lambda: router.phase is Phase.BALANCED)
        await asyncio.sleep(0.5)
        assert group.posts == []
        assert router.planner.asked == 0


async def test_of_two_routers_one_plans_and_when_it_is_killed_the_other_goes_on(valkey):
    async with cluster(valkey, routers=("r0", "r1")) as (group, first, second):
        await until(lambda: group.balancedness() > 0.95)
        leader, other = (first, second) if first.service.leads else (second, first)
        assert not other.service.leads
        assert other.service.leader == leader.service.leader
        assert other.planner.asked == 0
        await leader.crash()
        group.loads = np.roll(skewed(3), 6, axis=1)
        await until(lambda: group.balancedness() > 0.95)
        assert other.service.leads
        versions = [post.placement.version for post in group.posts]
        assert versions == sorted(set(versions))
        assert {post.router_id for post in group.posts} == {"r0", "r1"}
        assert group.versions == [0, *versions]


async def test_a_router_that_stops_gives_the_lease_back_and_numbers_go_on(valkey):
    async with cluster(valkey) as (group, router):
        await until(lambda: group.balancedness() > 0.95)
        await router.service.stop()
        with valkey.client() as client:
            assert client.get(redis_keys.expert_planner("test")) is None
        group.loads = np.roll(skewed(3), 6, axis=1)
        async with Router(valkey.url, group, "r9") as fresh:
            await until(lambda: group.balancedness() > 0.95)
            assert fresh.metric("headrace_expert_placements_posted_total") == len(group.posts) - 1
        assert group.versions == list(range(len(group.versions)))


async def test_many_routers_never_post_a_version_twice(valkey):
    """Leases that end too soon: whoever thinks that it leads may be wrong, and Redis decides."""
    hasty = CONFIG.model_copy(update={"pause_s": 0.0, "min_gain": 0.001})
    async with cluster(valkey, routers=("r0", "r1", "r2"), config=hasty) as (group, *routers):
        with valkey.client() as client:
            for turn in range(30):
                group.loads = np.roll(skewed(turn), turn, axis=1)
                client.delete(redis_keys.expert_planner("test"))
                await asyncio.sleep(0.03)
        await until(lambda: len(group.posts) >= 3)
        versions = [post.placement.version for post in group.posts]
        assert versions == sorted(set(versions))
        assert sum(
            router.metric("headrace_expert_placements_posted_total") or 0 for router in routers
        ) >= len(versions)


async def test_a_redis_that_has_lost_everything_does_not_turn_numbers_back(own_valkey):
    async with cluster(own_valkey) as (group, _):
        await until(lambda: group.balancedness() > 0.95)
        used = group.versions[-1]
        with own_valkey.client() as client:
            client.flushall()
        group.loads = np.roll(skewed(3), 6, axis=1)
        await until(lambda: group.versions[-1] > used)
        assert group.versions == sorted(set(group.versions))


async def test_without_redis_nothing_is_posted_and_it_is_said(own_valkey, caplog):
    async with cluster(own_valkey) as (group, router):
        await until(lambda: group.balancedness() > 0.95)
        await group.stop()
        own_valkey.stop()
        await until(lambda: router.service.trouble.startswith("Redis is away"))
        assert not router.service.leads
        assert "Redis is away, placements stay as they are" in caplog.text
        own_valkey.start()
        await until(lambda: router.service.trouble == "")


async def test_if_it_ever_ends_that_is_said(valkey, caplog, monkeypatch):
    async with cluster(valkey) as (_, router):
        await until(lambda: router.registry.get_sample_value("headrace_expert_watching") == 1)

        def impossible(*args):
            raise RuntimeError("this can't be")

        monkeypatch.setattr("router.experts.service.groups_of", impossible)
        await until(lambda: router.service.trouble != "")
        assert router.service.trouble == 'rebalancing has ended: RuntimeError("this can\'t be")'
        assert "rebalancing has ended" in caplog.text
        assert router.registry.get_sample_value("headrace_expert_watching") == 0
        assert not router.service.leads


async def test_a_dead_rank_and_its_return(valkey):
    async with cluster(valkey) as (group, router):
        await until(lambda: router.phase is Phase.BALANCED)
        group.kill(2)
        await until(lambda: group.versions[-1] > 1 and router.phase is Phase.BALANCED)
        assert group.placement.layers[0][2] == ()
        assert "rank 2 left" in group.posts[-1].why
        assert group.balancedness() > 0.95
        group.revive(2)
        last = group.versions[-1]
        await until(lambda: group.versions[-1] > last)
        assert group.placement.layers[0][2]
        assert "rank 2 came" in group.posts[-1].why


async def test_a_refused_placement_is_said_aloud_and_tried_again(valkey, caplog):
    caplog.set_level(logging.INFO)
    async with cluster(valkey) as (group, router):
        group.refusing[1] = "no memory for 6 experts"
        await until(lambda: router.phase is Phase.REFUSED)
        assert "version 1 is refused by rank 1: no memory for 6 experts" in router.text()
        assert "version 1 is refused by rank 1: no memory for 6 experts" in caplog.text
        assert router.metric("headrace_expert_placements_refused_total") == 1
        labels = {"pool": "decode", "phase": "refused"}
        assert router.metric("headrace_expert_rebalancing_trouble", **labels) == 1
        assert group.versions == [0]
        group.refusing.clear()
        await until(lambda: group.balancedness() > 0.95)
        await until(lambda: router.metric("headrace_expert_rebalancing_trouble", **labels) == 0)


async def test_a_placement_that_is_not_carried_out_is_replaced(valkey):
    async with cluster(valkey) as (group, router):
        group.stuck.add(3)
        await until(lambda: router.service.groups and router.text() == "version 1 is being loaded by rank 3")
        await until(lambda: len(group.posts) > 1)
        assert group.versions == [0]
        group.stuck.clear()
        await until(lambda: group.balancedness() > 0.95)


async def test_a_stalled_placement_of_a_load_that_is_even_by_now_stays_said(valkey, caplog):
    async with cluster(valkey) as (group, router):
        group.stuck.add(3)
        await until(lambda: router.phase is Phase.LOADING)
        group.loads = np.ones((LAYERS, EXPERTS))
        await until(lambda: router.phase is Phase.STALLED)
        assert "is being loaded by rank 3, for 1 s already" in caplog.text
        labels = {"pool": "decode", "phase": "stalled"}
        assert router.metric("headrace_expert_rebalancing_trouble", **labels) == 1


async def test_a_plan_that_fails_is_said_and_made_again(valkey, caplog):
    class Failing(InThread):
        async def plan(self, ask: PlanAsk) -> PlanAnswer:
            if self.asked == 0:
                self.asked = 1
                raise PlanFailed("the planning process ended with -9")
            return await super().plan(ask)

    async with cluster(valkey, planner=Failing()) as (group, router):
        await until(lambda: router.phase is Phase.FAILED)
        assert "the planning process ended with -9" in caplog.text
        assert router.metric("headrace_expert_plans_total", outcome="failed") == 1
        await until(lambda: group.balancedness() > 0.95)


async def test_ranks_that_count_nothing_are_told(valkey):
    async with cluster(valkey) as (group, router):
        await until(lambda: router.phase is Phase.BALANCED)
        group.silent = True
        await until(lambda: "no counts for" in router.text())
        assert router.phase is Phase.WAITING


async def test_what_cannot_be_read_is_told_and_does_no_harm(valkey, caplog):
    async with cluster(valkey) as (group, _):
        with valkey.client() as client:
            client.hset(redis_keys.expert_ranks("test"), "w77", b"nonsense")
            client.hset(
                redis_keys.expert_ranks("test"), "w78", client.hget(redis_keys.expert_ranks("test"), "w0")
            )
            client.xadd(redis_keys.expert_counts("test", "g"), {"c": b"nonsense"})
            client.xadd(redis_keys.expert_counts("test", "g"), {"other": b"field"})
            strayed = ExpertCounts("h", 0, "w0", 1, 9, 1.0, 0, 1, b"", b"")
            client.xadd(redis_keys.expert_counts("test", "g"), {"c": msgspec.msgpack.encode(strayed)})
            short = ExpertCounts("g", 0, "w0", 1, 10**9, 1.0, 0, 1, b"123", b"")
            client.xadd(redis_keys.expert_counts("test", "g"), {"c": msgspec.msgpack.encode(short)})
        await until(lambda: group.balancedness() > 0.95)
        assert "what worker w77 says can't be read" in caplog.text
        assert "worker w0 reports under the name w78" in caplog.text
        assert "counts of group g can't be read" in caplog.text
        assert "counts of group h are in the log of g" in caplog.text
        assert "`routed` has 3 bytes" in caplog.text


async def test_switched_off_it_is_only_shown(valkey):
    off = CONFIG.model_copy(update={"rebalance": False})
    async with cluster(valkey, config=off) as (group, router):
        await until(lambda: router.phase is Phase.OFF)
        await until(lambda: router.metric("headrace_expert_balancedness", pool="decode") is not None)
        assert group.posts == []
        with valkey.client() as client:
            assert client.get(redis_keys.expert_planner("test")) is None


# --- the planning process --------------------------------------------------------------------------------------------


def ask(loads: np.ndarray, **more) -> PlanAsk:
    from router.experts.topology import uniform

    halves = np.stack([loads, loads]) * 1e4
    return PlanAsk(
        **{
            "halves": halves.tobytes(),
            "num_layers": LAYERS,
            "num_experts": EXPERTS,
            "previous": contiguous(LAYERS, EXPERTS, RANKS),
            "topology": uniform(RANKS, SLOTS),
            "version": 7,
            "max_moves": None,
            "move_cost": 0.0005,
            "rehearse": True,
        }
        | more
    )


async def test_the_planning_process_plans_what_the_function_does():
    asked = ask(skewed())
    planned = await ProcessPlanner(30.0).plan(asked)
    assert planned == answer(asked)
    assert planned.plan.version == 7
    planned.plan.validate(EXPERTS, [SLOTS] * RANKS, LAYERS)


async def test_what_can_not_be_planned_is_told_by_the_process():
    from router.experts.topology import uniform

    with pytest.raises(PlanFailed, match="16 experts do not fit"):
        await ProcessPlanner(30.0).plan(ask(skewed(), topology=uniform(RANKS, 3)))


async def test_a_planning_process_that_takes_too_long_is_ended():
    with pytest.raises(PlanFailed, match=r"more than 0.01 s \(router.experts.plan_timeout_s\)"):
        await ProcessPlanner(0.01).plan(ask(skewed()))


def test_fewer_moves_are_made_where_they_are_limited():
    from workers.protocol.experts import moves

    previous = contiguous(LAYERS, EXPERTS, RANKS)
    free, few = answer(ask(skewed())).plan, answer(ask(skewed(), max_moves=3)).plan
    assert len(list(moves(previous, few))) <= 3 < len(list(moves(previous, free)))


def test_a_layer_without_any_tokens_is_planned_as_if_its_experts_were_equal():
    loads = skewed()
    loads[1] = 0
    answer(ask(loads)).plan.validate(EXPERTS, [SLOTS] * RANKS, LAYERS)


async def test_counts_of_long_ago_are_not_taken_for_new_ones(valkey):
    key = redis_keys.expert_counts("test", "g")
    with valkey.client() as client:
        for at, seq in ((1_000_000, 1), (1_005_500, 2), (1_007_000, 3)):
            counts = ExpertCounts("g", 0, "w0", 1, seq, 1.0, 0, 1, b"", b"")
            client.xadd(key, {"c": msgspec.msgpack.encode(counts)}, id=f"{at}-1")
        board = Board(valkey.url, "test", "r0")
        assert [counts.seq for counts in await board.counts(["g", "h"])] == [2, 3]
        assert await board.counts(["g", "h"]) == []
        client.xadd(key, {"c": msgspec.msgpack.encode(ExpertCounts("g", 0, "w0", 1, 4, 1.0, 0, 1, b"", b""))})
        assert [counts.seq for counts in await board.counts(["g"])] == [4]
    await board.close()
