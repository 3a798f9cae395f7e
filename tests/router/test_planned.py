"""What the planner has decided comes through Redis to every router's status and metrics."""

from __future__ import annotations

from cluster.planner_board import PlannerBoard
from tests.router.fake_cluster import FakeCluster, until
from workers.protocol import redis_keys
from workers.protocol.messages import Planned


async def test_a_decision_reaches_status_and_metrics_and_ends_with_the_planner(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=1)
        assert (await cluster.dispatcher.status())["planner"] is None
        board = PlannerBoard(valkey.url, "test")
        board.tell(Planned("decode 1 → 2: slow", True, {"decode": 2}, {"decode": 1}, {"decode": 0}))
        await until(lambda: cluster.dispatcher.discovery.planned is not None)
        status = await cluster.dispatcher.status()
        assert status["planner"]["text"] == "decode 1 → 2: slow"
        labels = {"pool": "decode", "kind": "wanted"}
        assert cluster.registry.get_sample_value("headrace_planner_replicas", labels) == 2
        assert cluster.registry.get_sample_value("headrace_planner_apply") == 1
        with valkey.client() as client:
            key = redis_keys.planner("test")
            assert 0 < client.pttl(key) <= 60_000
            client.set(key, b"no json")
            await until(lambda: cluster.dispatcher.discovery.planned is None)
            client.delete(key)
        assert cluster.registry.get_sample_value("headrace_planner_replicas", labels) is None
        assert cluster.dispatcher.discovery.redis == "ok"


def test_a_redis_that_is_away_stops_nobody(own_valkey):
    board = PlannerBoard(own_valkey.url, "x")
    own_valkey.close()
    board.tell(Planned("text", False, {}, {}, {}))
