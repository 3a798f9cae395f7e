"""The ways in and the real dispatch together, over workers that are fakes: what no fake dispatcher can show."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from router.config import GrpcConfig, HttpConfig, RouterConfig
from router.server import RouterServer
from tests.router.fake_cluster import FakeCluster, until
from tests.router.fake_worker import expected_output
from tests.valkey_server import EmbeddedValkey
from workers.protocol.messages import Sampling

PROMPT = list(range(100, 140))


@pytest.fixture
async def cluster(valkey: EmbeddedValkey) -> AsyncIterator[FakeCluster]:
    async with FakeCluster(valkey.url) as cluster:
        yield cluster


@pytest.fixture
async def http(cluster: FakeCluster, model_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    config = RouterConfig(http=HttpConfig(port=0), grpc=GrpcConfig(enabled=False))
    server = RouterServer(cluster.dispatcher, model_path, config)
    await server.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}", timeout=20) as client:
        yield client
    await server.stop(drain_s=0.0)


async def answer(http: httpx.AsyncClient, **asked: object) -> list[int]:
    body = {"prompt": PROMPT, "seed": 3, "stream": True, "return_token_ids": True, **asked}
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    *events, end = response.text.strip().split("\n\n")
    assert end == "data: [DONE]", end
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    return [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]


async def test_tokens_come_through_though_workers_die(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    assert (await http.get("/ready")).status_code == 503
    assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 503
    await cluster.start(decodes=2, prefills=1, step_s=0.002)
    assert (await http.get("/ready")).status_code == 200
    expected = expected_output(PROMPT, Sampling(max_tokens=200, seed=3))
    assert await answer(http, max_tokens=200) == expected
    streams = [asyncio.create_task(answer(http, max_tokens=200)) for _ in range(4)]
    writing: list[str] = []

    def one_writes() -> bool:
        held = {name: cluster[name].held.values() for name in ("d0", "d1")}
        writing[:] = [name for name in held if any(len(request.output) > 20 for request in held[name])]
        return bool(writing)

    await until(one_writes)
    cluster[writing[0]].die()
    assert await asyncio.gather(*streams) == [expected] * 4
    status = (await http.get("/cluster")).json()
    left = {"d0", "d1", "p0"} - {writing[0]}
    assert {"d0", "d1", "p0"} >= {worker["worker_id"] for worker in status["workers"]} >= left


async def test_a_client_that_leaves_is_cancelled_at_the_worker(
    cluster: FakeCluster, http: httpx.AsyncClient
) -> None:
    await cluster.start()
    body = {"prompt": PROMPT, "stream": True, "n": 2, "ignore_eos": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        async for _ in response.aiter_lines():
            break
    for _ in range(200):
        if cluster.dispatcher._in_flight == 0:
            break
        await asyncio.sleep(0.01)
    assert cluster.dispatcher._in_flight == 0
