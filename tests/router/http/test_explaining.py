"""Why a request went where it went, asked over HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from router.config import GrpcConfig, HttpConfig, RouterConfig, TenantConfig
from router.server import RouterServer
from tests.router.fake_cluster import FakeCluster
from tests.valkey_server import EmbeddedValkey

BODY = {"prompt": list(range(100, 300)), "max_tokens": 5, "seed": 3}
ASKING = {"x-headrace-explain": "1"}


@pytest.fixture
async def cluster(valkey: EmbeddedValkey) -> AsyncIterator[FakeCluster]:
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=1, prefills=1)
        yield cluster


@pytest.fixture
async def http(cluster: FakeCluster, model_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    config = RouterConfig(http=HttpConfig(port=0), grpc=GrpcConfig(enabled=False))
    server = RouterServer(cluster.dispatcher, model_path, config)
    await server.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}", timeout=20) as client:
        yield client
    await server.stop(drain_s=0.0)


async def test_by_the_id_of_the_answer(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/v1/completions", json=BODY)).json()
    found = (await http.get(f"/cluster/requests/{answer['id']}")).json()
    (request,) = found["requests"]
    assert request["request_id"] == answer["id"]
    assert (request["prompt_tokens"], request["output_tokens"]) == (200, 5)
    assert request["placements"][0]["decode"] == "d0"
    two = (await http.post("/v1/completions", json={**BODY, "n": 2})).json()
    found = (await http.get(f"/cluster/requests/{two['id']}")).json()
    assert [request["request_id"] for request in found["requests"]] == [f"{two['id']}-0", f"{two['id']}-1"]
    assert (await http.get("/cluster/requests/last")).json()["requests"]


async def test_unknown_requests_are_404(http: httpx.AsyncClient) -> None:
    answer = await http.get("/cluster/requests/cmpl-of-yesterday")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("request_id", "request_not_found")
    assert "'cmpl-of-yesterday'" in error["message"]


async def test_only_operators_are_told(cluster: FakeCluster, model_path: Path) -> None:
    tenants = [
        TenantConfig(name="ops", api_keys=["of-ops"], operator=True),
        TenantConfig(name="guest", api_keys=["of-guest"]),
    ]
    config = RouterConfig(http=HttpConfig(port=0), grpc=GrpcConfig(enabled=False), tenants=tenants)
    server = RouterServer(cluster.dispatcher, model_path, config)
    await server.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}", timeout=20) as client:

        async def ask(key: str) -> tuple[int, bool]:
            headers = {**ASKING, "Authorization": f"Bearer {key}"}
            answer = await client.post("/v1/completions", json=BODY, headers=headers)
            told = "x-headrace-decode" in answer.headers
            found = await client.get(f"/cluster/requests/{answer.json()['id']}", headers=headers)
            return found.status_code, told

        assert await ask("of-ops") == (200, True)
        assert await ask("of-guest") == (403, False)
        assert (await client.get("/cluster/requests/last")).status_code == 401
    await server.stop(drain_s=0.0)


@pytest.mark.parametrize("stream", [False, True])
async def test_headers_for_whoever_asks(http: httpx.AsyncClient, stream: bool) -> None:
    plain = await http.post("/v1/completions", json={**BODY, "stream": stream})
    assert not [name for name in plain.headers if name.startswith("x-headrace")]
    asked = await http.post("/v1/completions", json={**BODY, "stream": stream}, headers=ASKING)
    headers = {name: value for name, value in asked.headers.items() if name.startswith("x-headrace")}
    assert headers["x-headrace-decode"] == "d0"
    assert headers["x-headrace-prefill"] in {
        "p0",
        "d0",
    }  # d0 has most of it by now, if the index has heard of it
    assert headers["x-headrace-placements"] == "1"
    assert float(headers["x-headrace-cost"]) > 0
    assert int(headers["x-headrace-cached-tokens"]) in range(0, 201)
    assert "queue=" in headers["x-headrace-stages"]
    assert "first_token=" in headers["x-headrace-stages"], "a stream begins with its first token"
    answer_id = json.loads(asked.text.split("data: ")[1])["id"] if stream else asked.json()["id"]
    assert headers["x-headrace-request"] == answer_id
