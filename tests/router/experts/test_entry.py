"""Experts in a real router: nothing of them is loaded without any, and they are noticed when they come."""

from __future__ import annotations

import subprocess
import sys

from router.experts.entry import Experts
from tests.router.experts.fake_ranks import FakeGroup
from tests.router.experts.test_service import CONFIG, EXPERTS, LAYERS, RANKS, SLOTS, skewed
from tests.router.fake_cluster import FakeCluster, until


async def test_a_router_notices_ranks_and_places_their_experts(valkey):
    cluster = FakeCluster(valkey.url)
    cluster.dispatcher.experts._config = CONFIG
    async with cluster:
        await cluster.start(decodes=1, prefills=0)
        view = await cluster.dispatcher.experts_view()
        assert view == {
            "router": cluster.dispatcher.router_id,
            "rebalance": True,
            "planner": "",
            "trouble": "",
            "groups": [],
        }
        for rank in range(RANKS):
            await cluster.add(f"w{rank}", "decode")
        await cluster.all_up()
        group = FakeGroup(valkey.url, "test", skewed(), RANKS, SLOTS)
        group._epochs = {rank: cluster[f"w{rank}"].epoch for rank in range(RANKS)}
        async with group:
            await until(lambda: group.balancedness() > 0.95, timeout_s=20.0)  # the real planning process
            view = await cluster.dispatcher.experts_view()
            (shown,) = view["groups"]
            assert (shown["layers"], shown["experts"]) == (LAYERS, EXPERTS)
            assert view["planner"] == cluster.dispatcher.router_id
            (told,) = (await cluster.dispatcher.status())["experts"]
            assert (told["group"], told["trouble"]) == ("g", False)
            assert [rank["worker_id"] for rank in shown["ranks"]] == ["w0", "w1", "w2", "w3"]
            cluster["w3"].die()
            await until(lambda: cluster.dispatcher.experts.service.groups["g"].group.ranks[3] is None)


async def test_it_stops_before_it_has_begun(own_valkey):
    experts = Experts(CONFIG, redis_url=own_valkey.url, cluster="x", router_id="r", alive=dict)
    await experts.start()
    own_valkey.close()
    await experts.stop()
    assert experts.service is None


def test_without_experts_numpy_is_not_loaded():
    """Most models have none, and a router should be small."""
    code = "import sys, router.server, router.dispatch; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
