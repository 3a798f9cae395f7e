"""Hundreds of streams while workers are killed, one after the other, and while Redis is away."""

from __future__ import annotations

import asyncio
import random

import pytest

from router.config import AdmissionConfig
from router.generation import Generation
from tests.router.fake_cluster import FakeCluster, until
from tests.router.fake_worker import expected_output, logprobs_of
from workers.protocol.messages import Sampling

ADMISSION = AdmissionConfig(queue_timeout_s=120, max_attempts=100)


def request(number: int, rng: random.Random, tokens: int) -> Generation:
    """A third share a prefix, so that some are resumed where they are cached and some are not."""
    shared = [7] * 96 if number % 3 == 0 else []
    prompt = shared + [rng.randrange(50_000) for _ in range(rng.choice([10, 90, 250]))]
    sampling = Sampling(
        max_tokens=rng.randrange(tokens // 2, tokens), seed=number, logprobs=number % 2 or None
    )
    return Generation(f"s{number}", prompt, sampling, priority=rng.randrange(2))


async def check(cluster: FakeCluster, asked: Generation) -> None:
    chunks = [chunk async for chunk in cluster.dispatcher.generate(asked)]
    tokens = [token for chunk in chunks for token in chunk.tokens]
    assert tokens == expected_output(asked.prompt, asked.sampling)
    logprobs = [entry for chunk in chunks for entry in chunk.logprobs]
    assert logprobs == [entry for token in tokens for entry in logprobs_of(token, asked.sampling)]


@pytest.mark.parametrize(
    ("streams", "every_s", "kills", "step_s"),
    [
        pytest.param(80, 0.25, 8, 0.02, id="short"),
        pytest.param(500, 2.0, 20, 0.2, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
async def test_a_kill_every_moment(valkey, streams, every_s, kills, step_s, monkeypatch):
    """Each kill takes a random worker of either role, by kill -9, by SIGSTOP or by a cut of its connections."""
    monkeypatch.setattr("router.dispatch._EXCLUDED_S", 0.1)
    rng = random.Random(streams)
    async with FakeCluster(valkey.url, admission=ADMISSION, timeout_s=1.0) as cluster:
        cluster.restart_after_s = every_s / 2
        await cluster.start(decodes=4, prefills=3, step_s=step_s, prefill_s=0.02, num_blocks=4000)
        done = asyncio.Event()
        killed = 0

        async def kill() -> None:
            nonlocal killed
            while not done.is_set():
                await asyncio.sleep(every_s)
                alive = [worker for worker in cluster.peers.values() if not worker.stalled]
                if len({worker.role for worker in alive}) < 2:
                    continue  # one of each should be left
                victim, how = rng.choice(alive), rng.choice(["die", "die", "stall", "cut"])
                victim._obey_order(how)
                killed += 1
                if how == "stall":  # the supervisor replaces it after a while
                    asyncio.get_running_loop().call_later(2 * every_s + 1.0, victim.die)

        killer = asyncio.create_task(kill())
        tokens = int(kills * every_s / step_s)  # the longest run from the first kill to the last
        asked = [request(number, rng, tokens) for number in range(streams)]
        await asyncio.gather(*(check(cluster, one) for one in asked))
        done.set()
        await killer
        assert killed >= kills // 2
        assert cluster.metric("headrace_dispatch_placements_total", outcome="finished") == streams
        assert cluster.metric("headrace_dispatch_replacements_total") > 0
        for worker in cluster.workers:
            if worker.stalled:
                worker.die()
        await cluster.at_rest()


@pytest.mark.parametrize("how", ["crash", "freeze"])
@pytest.mark.parametrize(
    "away_s", [3.0, pytest.param(30.0, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
async def test_redis_is_away_under_load(own_valkey, how, away_s):
    """Not one request fails, before, meanwhile and after; then the index is exact again."""
    rng = random.Random(1)
    async with FakeCluster(own_valkey.url, admission=ADMISSION) as cluster:
        await cluster.start(decodes=3, prefills=2, step_s=0.005)
        over = asyncio.Event()
        served = [0, 0, 0]  # before, meanwhile, after
        phase = 0

        async def client(number: int) -> None:
            while not over.is_set():
                began_in = phase
                await check(cluster, request(number + 20 * sum(served), rng, 30))
                served[began_in] += 1

        clients = [asyncio.create_task(client(number)) for number in range(12)]
        await until(lambda: served[0] >= 20)
        phase = 1
        own_valkey.stop() if how == "crash" else own_valkey.pause()
        await asyncio.sleep(away_s)
        await until(lambda: served[1] > 20, timeout_s=60)
        assert cluster.dispatcher.discovery.approximate
        own_valkey.start() if how == "crash" else own_valkey.resume()  # after a crash it is empty
        await until(lambda: not cluster.dispatcher.discovery.approximate, timeout_s=60)
        phase = 2
        await until(lambda: served[2] >= 20)
        over.set()
        await asyncio.gather(*clients)  # raises if a single request failed
        await cluster.at_rest()
