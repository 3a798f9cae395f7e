"""Registry and index through a real Valkey, real publishers, and Valkey's absence."""

from __future__ import annotations

import asyncio

import msgspec

from tests.router.fake_cluster import LEASE_S, FakeCluster, generation, until
from workers.protocol import redis_keys


def index_is_exact(cluster: FakeCluster) -> bool:
    index = cluster.dispatcher.index
    return not cluster.dispatcher.discovery.approximate and all(
        index.hashes(worker.worker_id) == set(worker.cache) and not index.num_guesses(worker.worker_id)
        for worker in cluster.peers.values()
    )


async def run(cluster: FakeCluster, numbers: range) -> None:
    await asyncio.gather(*(cluster.check(generation(n, max_tokens=8)) for n in numbers))


async def test_the_index_becomes_what_the_workers_hold(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=2, prefills=1, num_blocks=60)  # too few for all: some are evicted
        await run(cluster, range(20))
        await until(lambda: index_is_exact(cluster))
        assert len(cluster.dispatcher.index) > 0


async def test_a_new_router_reads_snapshots(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=2)
        await run(cluster, range(5))
        await until(lambda: index_is_exact(cluster))
        async with FakeCluster(valkey.url) as other:
            other.peers = cluster.peers
            await other.all_up()
            await until(lambda: index_is_exact(other))
            await other.check(generation(1, max_tokens=8))
            await other.at_rest()
        await cluster.at_rest()


async def test_a_worker_without_lease_goes_and_a_new_life_replaces_the_old(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=2)
        await run(cluster, range(4))
        await until(lambda: index_is_exact(cluster))
        cluster["d0"].die()
        await until(lambda: "d0" not in cluster.dispatcher.index.workers(), timeout_s=3 * LEASE_S)
        assert "d0" not in {m.info.worker_id for m in cluster.dispatcher.fleet.members()}
        old_epoch = cluster["d1"].epoch
        cluster["d1"].die()
        new = await cluster.add("d1", "decode")
        await cluster.all_up()
        assert cluster.dispatcher.fleet.link("d1").info.epoch == new.epoch > old_epoch
        await until(lambda: cluster.dispatcher.index.num_blocks("d1") == 0)
        await run(cluster, range(4))
        await until(lambda: index_is_exact(cluster))
        await cluster.at_rest()


async def test_an_old_life_does_not_come_back(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start()
        await asyncio.sleep(0.1)
        fleet = cluster.dispatcher.fleet
        infos = {m.info.worker_id: m.info for m in fleet.members()}
        link = fleet.link("d0")
        fleet.sync(infos | {"d0": msgspec.structs.replace(infos["d0"], epoch=0)})
        assert fleet.link("d0") is link
        cluster["d0"].die()
        await until(lambda: link.state == "down")
        fleet.sync({})
        fleet.sync({"d0": msgspec.structs.replace(infos["d0"], epoch=0)})
        assert "d0" not in {m.info.worker_id for m in fleet.members()}


async def test_a_clean_leave_lets_running_requests_end(valkey):
    async with FakeCluster(valkey.url) as cluster:
        cluster.dispatcher.fleet._grace_s = 0.1
        await cluster.start(decodes=1, step_s=0.005)
        running = asyncio.create_task(cluster.check(generation(max_tokens=150)))
        await until(lambda: cluster["d0"].num_held == 1)
        await asyncio.to_thread(cluster.publishers[cluster["d0"]].close)
        await until(lambda: not cluster.dispatcher.ready())
        assert {m.state for m in cluster.dispatcher.fleet.members() if m.info.role == "decode"} == {"leaving"}
        await running
        await until(lambda: cluster.dispatcher.model() is None)
        await cluster.at_rest()


async def test_redis_dies_and_comes_back_empty_and_nobody_notices(own_valkey):
    async with FakeCluster(own_valkey.url) as cluster:
        await cluster.start(decodes=2, prefills=1, step_s=0.002)
        await run(cluster, range(5))
        await until(lambda: index_is_exact(cluster))
        links = {m.info.worker_id: m.link for m in cluster.dispatcher.fleet.members()}
        running = [asyncio.create_task(cluster.check(generation(50 + n, max_tokens=400))) for n in range(3)]
        await asyncio.to_thread(own_valkey.stop)
        await until(lambda: cluster.dispatcher.discovery.redis == "away")
        await until(lambda: cluster.metric("headrace_index_approximate") == 1)

        request = generation(90, max_tokens=8)
        for _ in range(3):
            await cluster.check(request)
        assert any(cluster.dispatcher.index.num_guesses(w) for w in cluster.peers)
        await until(lambda: cluster.metric("headrace_index_guesses") > 0)
        assert (
            sum(len(w.reserves) > 0 and w.reserves[-1].work.prompt == request.prompt for w in cluster.workers)
            == 1
        )

        await asyncio.to_thread(own_valkey.start)
        await asyncio.gather(*running)
        await until(lambda: index_is_exact(cluster))
        await until(lambda: cluster.metric("headrace_index_approximate") == 0)
        assert cluster.metric("headrace_index_guesses") == 0
        assert {m.info.worker_id: m.link for m in cluster.dispatcher.fleet.members()} == links
        await run(cluster, range(5, 10))
        await until(lambda: index_is_exact(cluster))
        await cluster.at_rest()


async def test_redis_is_flushed_under_everybody(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=2)
        await run(cluster, range(5))
        await until(lambda: index_is_exact(cluster))
        links = {m.info.worker_id: m.link for m in cluster.dispatcher.fleet.members()}
        with valkey.client() as client:
            client.flushall()
        await run(cluster, range(5, 10))
        await until(lambda: index_is_exact(cluster))
        assert {m.info.worker_id: m.link for m in cluster.dispatcher.fleet.members()} == links
        await cluster.at_rest()


async def test_redis_is_paused(own_valkey):
    async with FakeCluster(own_valkey.url) as cluster:
        await cluster.start(decodes=2)
        await run(cluster, range(3))
        await until(lambda: index_is_exact(cluster))
        own_valkey.pause()
        await run(cluster, range(3, 6))  # not a request waits for Redis
        await until(lambda: cluster.dispatcher.discovery.redis == "away")
        await run(cluster, range(6, 9))
        own_valkey.resume()
        await until(lambda: index_is_exact(cluster), timeout_s=10)
        await cluster.at_rest()


async def test_lost_log_entries_are_noticed(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start()
        await run(cluster, range(2))
        await until(lambda: index_is_exact(cluster))
        log = redis_keys.index_stream("test")
        discovery = cluster.dispatcher.discovery.feed
        # In the middle: the next batch shows the gap.
        real = discovery._apply
        discovery._apply = drop(discovery, 1)
        await run(cluster, range(2, 5))
        await until(lambda: index_is_exact(cluster))
        # At the end: nothing follows, only the seq in Redis tells.
        discovery._apply = drop(discovery, 1000)
        await run(cluster, range(5, 7))
        await until(lambda: index_is_exact(cluster))
        discovery._apply = real
        with valkey.client() as client:
            client.xadd(log, {"b": b"nonsense"})
            client.xadd(log, {"x": b""})
        await run(cluster, range(7, 9))
        await until(lambda: index_is_exact(cluster))


def drop(discovery, count: int):
    """At least `count` entries of the log are never seen."""
    left, real = [count], discovery._apply

    async def apply(partition, entries):
        if left[0] > 0:
            left[0] -= len(entries)
            discovery._tail_ids[partition] = entries[-1][0]
        else:
            await real(partition, entries)

    return apply


async def test_entries_that_cannot_be_read_are_skipped(valkey):
    with valkey.client() as client:
        client.hset(redis_keys.workers("test"), "broken", b"\xc1")
        client.set(redis_keys.lease("test", "broken"), 1)
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start()
        with valkey.client() as client:  # somebody else's name
            entry = client.hget(redis_keys.workers("test"), "d0")
            client.hset(redis_keys.workers("test"), "d9", entry)
            client.set(redis_keys.lease("test", "d9"), cluster["d0"].epoch)
        await asyncio.sleep(0.1)
        assert {m.info.worker_id for m in cluster.dispatcher.fleet.members()} == {"d0", "p0"}
        await cluster.check(generation())
