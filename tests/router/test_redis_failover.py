"""A node of a Redis Cluster, or a master behind sentinels, is lost under load; its replica takes its place."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from router.config import AdmissionConfig
from router.generation import Generation
from tests.router.fake_cluster import FakeCluster, until
from tests.router.fake_worker import expected_output
from tests.valkey_groups import Cluster, Sentinels
from tests.valkey_server import Servers
from workers.protocol.messages import Sampling
from workers.protocol.tiers import DEVICE


def is_exact(cluster: FakeCluster) -> bool:
    """Nothing is guessed, and what the router believes of each worker is what that one holds."""
    index, discovery = cluster.dispatcher.index, cluster.dispatcher.discovery
    return not discovery.approximate and all(
        set(index.hashes(worker.worker_id, DEVICE)) == set(worker.cache)
        and not index.num_guesses(worker.worker_id)
        for worker in cluster.workers
    )


async def ask(cluster: FakeCluster, number: int, rng: random.Random) -> None:
    shared = [7] * 96 if number % 3 == 0 else []
    prompt = shared + [rng.randrange(50_000) for _ in range(rng.choice([10, 90, 250]))]
    asked = Generation(f"r{number}", prompt, Sampling(max_tokens=rng.randrange(5, 30), seed=number))
    assert await cluster.generate(asked) == expected_output(asked.prompt, asked.sampling)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("group_of", "how"),
    [
        pytest.param(Cluster, "kill", id="cluster-kill"),
        pytest.param(Cluster, "pause", id="cluster-pause", marks=pytest.mark.slow),
        pytest.param(Sentinels, "kill", id="sentinel-kill", marks=pytest.mark.slow),
        pytest.param(Sentinels, "pause", id="sentinel-pause", marks=pytest.mark.slow),
    ],
)
async def test_a_primary_is_lost_under_load(
    valkeys: Servers, group_of: Callable[[Servers], Cluster | Sentinels], how: str
) -> None:
    """Killed, or stopped for so long that another has taken its place when it is back."""
    rng = random.Random(1)
    group = await asyncio.to_thread(group_of, valkeys)
    admission = AdmissionConfig(queue_timeout_s=120, max_attempts=100)
    async with FakeCluster(group.url, admission=admission) as cluster:
        # More workers than primaries: with partitions each primary has some of them.
        await cluster.start(decodes=6, prefills=4, step_s=0.005)
        await until(lambda: is_exact(cluster), timeout_s=60)
        served, over = 0, False

        async def client(first: int) -> None:
            nonlocal served
            for number in range(first, 10**9, 12):
                if over:
                    return
                await ask(cluster, number, rng)  # raises if the request fails
                served += 1

        clients = [asyncio.create_task(client(first)) for first in range(12)]
        await until(lambda: served >= 40, timeout_s=60)
        before = await asyncio.to_thread(group.primaries)
        victim = before[0]
        valkeys.kill(victim) if how == "kill" else valkeys.pause(victim)
        await until(lambda: cluster.dispatcher.discovery.approximate, timeout_s=60)
        asked_meanwhile = served
        await until(lambda: served >= asked_meanwhile + 40, timeout_s=60)
        await until(lambda: not cluster.dispatcher.discovery.approximate, timeout_s=60)
        if how == "pause":
            valkeys.resume(victim)
            await asyncio.sleep(3.0)  # it learns that it is a replica now
        again = served
        await until(lambda: served >= again + 40, timeout_s=60)
        over = True
        await asyncio.gather(*clients)
        after = await asyncio.to_thread(group.primaries)
        assert len(after) == len(before)
        assert victim not in after
        await until(lambda: is_exact(cluster), timeout_s=60)
        await cluster.at_rest()
