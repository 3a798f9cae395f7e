"""In every state of a request, everything that it hangs on fails: the client sees one unbroken stream.

With the tokens, the logprobs and the counts that it would have had, and nothing is left anywhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from router.config import AdmissionConfig
from router.generation import DeadlineExceeded, Generation, TokenChunk
from router.sessions import Sessions
from tests.router.fake_cluster import FakeCluster, generation, until
from tests.router.fake_worker import FakeWorker, expected_output, logprobs_of
from tests.router.test_dispatch import once

PROMPT = 200  # tokens: too many for a decode worker alone

STATES_OF_D = [
    ("reserve", 0),  # before it answers
    ("accepted", 0),  # it has said that it prefills by itself
    ("ticketed", 0),  # it waits for blocks
    ("commit", 0),  # they have arrived
    ("token", 0),
    ("token", 7),
    ("token", 19),  # before the last
]
STATES_OF_P = ["prefill", "prefilled", "done"]
DEATHS = ["die", "stall", "cut"]


async def read(cluster: FakeCluster, asked: Generation) -> list[TokenChunk]:
    return [chunk async for chunk in cluster.dispatcher.generate(asked)]


def check(chunks: list[TokenChunk], asked: Generation) -> None:
    """What http and grpc make an answer and its usage of."""
    tokens = [token for chunk in chunks for token in chunk.tokens]
    assert tokens == expected_output(asked.prompt, asked.sampling)
    logprobs = [entry for chunk in chunks for entry in chunk.logprobs]
    assert logprobs == [entry for token in tokens for entry in logprobs_of(token, asked.sampling)]
    if asked.sampling.logprobs is not None:
        assert all(len(chunk.logprobs) == len(chunk.tokens) for chunk in chunks)
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.cached_tokens for chunk in chunks}) == 1, (
        "what the request found, not what its own life left"
    )
    assert chunks[0].cached_tokens <= len(asked.prompt)


async def survive(valkey, arrange: Callable[[FakeCluster], object], **pools: int) -> FakeCluster:
    # A fake that is stopped still shakes hands: it may be tried again and again.
    admission = AdmissionConfig(max_attempts=50, queue_timeout_s=30, stall_timeout_s=5)
    async with FakeCluster(valkey.url, admission=admission, timeout_s=0.4, lease_s=0.5) as cluster:
        await cluster.start(**pools)
        arrange(cluster)
        asked = generation(prompt=PROMPT, logprobs=2)
        check(await read(cluster, asked), asked)
        await cluster.at_rest()
        return cluster


def every(cluster: FakeCluster, role: str) -> list[FakeWorker]:
    return [worker for worker in cluster.workers if worker.role == role]


def hook(cluster: FakeCluster, role: str, stage: str, order: str, after: int = 0) -> None:
    """One failure in all, whichever worker of the role comes to it."""
    fails = once(stage, order, after)
    for worker in every(cluster, role):
        worker.hook = fails


@pytest.mark.parametrize(("stage", "after"), STATES_OF_D)
@pytest.mark.parametrize("order", DEATHS)
async def test_d_fails(valkey, stage, after, order):
    pools = {"decodes": 2, "prefills": 0 if stage == "accepted" else 1}
    cluster = await survive(valkey, lambda c: hook(c, "decode", stage, order, after), **pools)
    (request,) = cluster.dispatcher.explain("r0")["requests"]
    assert len(request["placements"]) == 2, "it failed once, and went on once"
    went_on_after = request["placements"][1]["output_tokens_before"]
    assert went_on_after == (after if stage == "token" else 0)


@pytest.mark.parametrize("stage", STATES_OF_P)
@pytest.mark.parametrize("order", DEATHS)
async def test_p_fails(valkey, stage, order):
    cluster = await survive(valkey, lambda c: hook(c, "prefill", stage, order), decodes=1, prefills=2)
    (request,) = cluster.dispatcher.explain("r0")["requests"]
    # Once D has everything P is not needed any more. Cut off before, it has told D's time-out or the router.
    assert len(request["placements"]) == (1 if stage == "done" else 2)


@pytest.mark.parametrize("order", DEATHS)
async def test_both_fail_at_once(valkey, order):
    def arrange(cluster: FakeCluster) -> None:
        def fails(stage: str, work: object) -> str | None:
            if stage != "prefilled" or fails.done:
                return None
            fails.done = True
            for worker in every(cluster, "decode"):
                if worker.held:
                    worker._obey_order(order)
            return order

        fails.done = False
        for worker in every(cluster, "prefill"):
            worker.hook = fails

    await survive(valkey, arrange, decodes=2, prefills=2)


@pytest.mark.parametrize("order", DEATHS)
async def test_every_placement_fails_a_little_later(valkey, order, monkeypatch):
    """Four decode workers, each of which ends the stream three tokens on; then they behave."""
    monkeypatch.setattr("router.dispatch._EXCLUDED_S", 0.05)
    left = [4]

    def fails(stage: str, work) -> str | None:
        if stage == "token" and left[0] and fails.tokens % 4 == 3:
            fails.tokens += 1
            left[0] -= 1
            return order
        fails.tokens += stage == "token"
        return None

    fails.tokens = 0

    def arrange(cluster: FakeCluster) -> None:
        for worker in every(cluster, "decode"):
            worker.hook = fails

    cluster = await survive(valkey, arrange, decodes=5, prefills=1)
    (request,) = cluster.dispatcher.explain("r0")["requests"]
    befores = [placement["output_tokens_before"] for placement in request["placements"]]
    # One that is stopped may be tried again before it is known to be: nothing comes of that.
    assert sorted(set(befores)) == [0, 3, 6, 9, 12]
    assert befores == sorted(befores)


@pytest.mark.parametrize("stage", ["reserve", "ticketed", "prefill", "prefilled", "commit", "token"])
async def test_redis_goes_and_a_worker_after_it(own_valkey, stage):
    """Nobody tells the router any more who lives; it sees by itself."""
    async with FakeCluster(own_valkey.url, timeout_s=0.4, lease_s=0.5) as cluster:
        await cluster.start(decodes=2, prefills=2)
        role = "prefill" if stage.startswith("prefill") else "decode"
        fails = once(stage, "die", after=5 if stage == "token" else 0)

        def stop_redis_too(at: str, work: object) -> str | None:
            order = fails(at, work)
            if order is not None:
                own_valkey.pause()
            return order

        for worker in every(cluster, role):
            worker.hook = stop_redis_too
        try:
            asked = generation(prompt=PROMPT, logprobs=1)
            check(await read(cluster, asked), asked)
            await cluster.at_rest()
        finally:
            own_valkey.resume()


async def test_cached_tokens_are_those_that_the_request_found(valkey):
    """After a death its own blocks are in caches everywhere: they were no gift to it."""
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=2, prefills=0)
        first = generation(prompt=PROMPT, max_tokens=20)
        check(await read(cluster, first), first)
        await until(lambda: sum(cluster.dispatcher.index.num_blocks(f"d{n}") for n in range(2)) >= 13)
        hook(cluster, "decode", "token", "cut", after=6)
        again = generation(prompt=PROMPT, max_tokens=30)
        chunks = await read(cluster, again)
        check(chunks, again)
        assert chunks[-1].cached_tokens == 192
        await cluster.at_rest()


async def test_the_same_stream_whether_or_not_anything_failed(valkey):
    """Token for token and logprob for logprob, as chunks tell them."""

    def flat(chunks: list[TokenChunk]) -> list[tuple]:
        return [pair for c in chunks for pair in zip(c.tokens, c.logprobs, strict=True)]

    async with FakeCluster(valkey.url, timeout_s=0.4) as cluster:
        await cluster.start(decodes=2, prefills=2)
        calm = await read(cluster, generation(1, logprobs=3))
        hook(cluster, "decode", "token", "die", after=9)
        stormy = await read(cluster, generation(1, logprobs=3))
        assert flat(stormy) == flat(calm)
        await cluster.at_rest()


async def test_many_streams_share_a_worker_that_dies(valkey):
    async with FakeCluster(valkey.url, timeout_s=0.4) as cluster:
        await cluster.start(decodes=2, prefills=1, step_s=0.01)
        asked = [generation(n, max_tokens=30, logprobs=1) for n in range(30)]
        streams = [asyncio.create_task(read(cluster, one)) for one in asked]
        await until(lambda: sum(len(worker.held) for worker in every(cluster, "decode")) == 30)
        max(every(cluster, "decode"), key=lambda worker: len(worker.held)).die()
        for one, chunks in zip(asked, await asyncio.gather(*streams), strict=True):
            check(chunks, one)
        await cluster.at_rest()


@pytest.mark.parametrize(
    "state", ["waiting", "reserve", "ticketed", "prefill", "prefilled", "commit", "token"]
)
async def test_the_deadline_passes_in_any_state(valkey, state):
    async with FakeCluster(valkey.url) as cluster:
        reached = asyncio.Event()

        def hang(stage: str, work: object) -> str | None:
            if stage != ("reserve" if state == "waiting" else state):
                return None
            reached.set()
            return "busy" if state == "waiting" else None if stage == "token" else "drop"

        await cluster.start(hook=hang, step_s=0.01)
        asked = generation(prompt=PROMPT, max_tokens=5000)

        async def serve() -> None:
            async with Sessions().open() as session:
                session.end_at(time.monotonic() + 0.3)
                stream = cluster.dispatcher.generate(asked)
                try:
                    async for _ in stream:
                        pass
                finally:
                    await stream.aclose()

        with pytest.raises(DeadlineExceeded):
            await serve()
        assert reached.is_set()
        await cluster.at_rest()
        (request,) = cluster.dispatcher.explain("r0")["requests"]
        assert request["outcome"] == "cancelled"
