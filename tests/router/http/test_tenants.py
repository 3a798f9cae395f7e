"""Tenants over HTTP: whose key, which limits, what is told, and what reaches the dispatcher."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from fastapi import FastAPI

from router.config import AdmissionConfig, HttpConfig, RouterConfig, TenantConfig
from router.generation import Overloaded
from router.http.app import create_app
from router.http.front import Front
from router.tenants import Tenants, control_key
from tests.router.fake_dispatcher import FakeDispatcher

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
SECRET = "the secret of the cluster"


def app_of(front: Front, *tenants: TenantConfig, secret: str | None = SECRET, **config: Any) -> FastAPI:
    http = HttpConfig(port=0, api_keys=["default-key"])
    return create_app(
        dataclasses.replace(
            front,
            config=http,
            tenants=Tenants(RouterConfig(http=http, tenants=list(tenants), **config), secret),
        )
    )


def tenant(name: str, **settings: Any) -> TenantConfig:
    return TenantConfig(name=name, api_keys=[f"{name}-key"], **settings)


def by(app: FastAPI, name: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url="http://router",
        transport=httpx.ASGITransport(app),
        headers={"authorization": f"Bearer {name}-key"},
    )


def sample(front: Front, name: str, **labels: str) -> float | None:
    return front.metrics.registry.get_sample_value(name, labels)


async def test_the_key_says_who_asks(front: Front, dispatcher: FakeDispatcher) -> None:
    app = app_of(front, tenant("a", priority=3), tenant("b"))
    for name in ("default", "a", "b"):
        async with by(app, name) as http:
            assert (await http.post(CHAT, json=HELLO)).status_code == 200
    assert [(g.tenant, g.priority) for g in dispatcher.asked] == [("default", 0), ("a", 3), ("b", 0)]
    async with by(app, "nobody") as http:
        assert (await http.post(CHAT, json=HELLO)).status_code == 401


async def test_salts_are_of_the_tenants_own(front: Front, dispatcher: FakeDispatcher) -> None:
    tenants = (tenant("a"), tenant("b"), tenant("c", share_cache=True), tenant("d", share_cache=True))
    app = app_of(front, *tenants)

    async def salt(app: FastAPI, name: str, asked: str | None = None) -> str:
        async with by(app, name) as http:
            body = HELLO | ({} if asked is None else {"cache_salt": asked})
            assert (await http.post(CHAT, json=body)).status_code == 200
        return dispatcher.asked[-1].cache_salt

    own = await salt(app, "a")
    assert len(own) == 64
    assert own == await salt(app_of(front, *tenants), "a")  # on every replica, and after a restart
    assert own != await salt(app_of(front, *tenants, secret="another secret"), "a")
    seen = {
        own,
        await salt(app, "b"),
        await salt(app, "a", "x"),
        await salt(app, "b", "x"),
        await salt(app, "b", own),
    }
    assert len(seen) == 5
    assert await salt(app, "c") == await salt(app, "d") == await salt(app, "default") == ""
    assert await salt(app, "c", "x") == await salt(app, "d", "x") == "x"


async def test_priorities_are_capped(front: Front, dispatcher: FakeDispatcher) -> None:
    app = app_of(front, tenant("a", priority=5, min_priority=2), tenant("b"))
    for name, asked, status in (
        ("a", 2, 200),
        ("a", 1, 400),
        ("a", 100, 200),
        ("b", 0, 200),
        ("b", -1, 400),
        ("default", -1, 400),
    ):
        async with by(app, name) as http:
            response = await http.post(CHAT, json=HELLO | {"priority": asked})
        assert response.status_code == status
        if status == 400:
            assert response.json()["error"]["param"] == "priority"
            assert f"for tenant {name!r}" in response.json()["error"]["message"]
    assert [g.priority for g in dispatcher.asked] == [2, 100, 0]
    alone = app_of(front)
    async with by(alone, "default") as http:  # where there is nobody else
        assert (await http.post(CHAT, json=HELLO | {"priority": -7})).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_limit_is_told_as_openai_does(front: Front, stream: bool) -> None:
    app = app_of(front, tenant("a", max_requests_per_minute=2, max_tokens_per_minute=100_000), tenant("b"))
    async with by(app, "a") as http:
        for left in ("1", "0"):
            response = await http.post(CHAT, json=HELLO | {"stream": stream})
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == "2"
            assert response.headers["x-ratelimit-remaining-requests"] == left
            assert response.headers["x-ratelimit-reset-requests"].endswith("s")
            assert 0 < int(response.headers["x-ratelimit-remaining-tokens"]) < 100_000
        response = await http.post(CHAT, json=HELLO | {"stream": stream})
        assert response.status_code == 429
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "tenant 'a' has used 2 of 2 requests per minute (max_requests_per_minute)" in error["message"]
        assert 28 <= int(response.headers["retry-after"]) <= 30
        assert f"retry in {response.headers['retry-after']} s" in error["message"]
        assert (await http.get("/v1/models")).status_code == 200
    async with by(app, "b") as http:
        response = await http.post(CHAT, json=HELLO)
        assert response.status_code == 200
        assert not [name for name in response.headers if name.startswith("x-ratelimit")]
    assert (
        sample(front, "headrace_tenant_refusals_total", tenant="a", reason="max_requests_per_minute") == 1.0
    )


async def test_openais_client_knows_the_error(front: Front) -> None:
    app = app_of(front, tenant("a", max_requests_per_minute=1))
    async with openai.AsyncOpenAI(
        base_url="http://router/v1",
        api_key="a-key",
        max_retries=0,
        http_client=httpx.AsyncClient(transport=httpx.ASGITransport(app)),
    ) as client:
        raw = await client.chat.completions.with_raw_response.create(model="tiny", **HELLO)
        assert raw.headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.RateLimitError) as limited:
            await client.chat.completions.create(model="tiny", **HELLO)
    assert limited.value.code == "rate_limit_exceeded"


async def test_tokens_are_settled_with_what_was_used(front: Front, dispatcher: FakeDispatcher) -> None:
    app = app_of(front, tenant("a", max_tokens_per_minute=100_000))
    async with by(app, "a") as http:
        used = (await http.post(CHAT, json=HELLO)).json()["usage"]
        left = int((await http.get("/v1/models")).headers["x-ratelimit-remaining-tokens"])
        assert (
            100_000 - used["total_tokens"] <= left <= 100_000 - used["total_tokens"] + 2000
        )  # refilled meanwhile
        assert (
            sample(front, "headrace_tenant_tokens_total", tenant="a", kind="prompt") == used["prompt_tokens"]
        )
        assert (
            sample(front, "headrace_tenant_tokens_total", tenant="a", kind="answer")
            == used["completion_tokens"]
        )
        dispatcher.error = Overloaded("full", retry_after_s=1.0, reason="queue_full")
        assert (await http.post(CHAT, json=HELLO)).status_code == 429
        assert (
            sample(front, "headrace_tenant_tokens_total", tenant="a", kind="prompt") == used["prompt_tokens"]
        )
        assert sample(front, "headrace_tenant_refusals_total", tenant="a", reason="queue_full") == 1.0
    assert dispatcher.asked[-1].expected_output == used["completion_tokens"]


async def test_concurrency_ends_with_the_answer_and_with_the_client(
    front: Front, dispatcher: FakeDispatcher
) -> None:
    app = app_of(front, tenant("a", max_concurrent=2))
    dispatcher.delay_s = 0.05
    async with by(app, "a") as http:
        slow = asyncio.create_task(http.post(CHAT, json=HELLO | {"n": 2}))
        await dispatcher.until_asked(2)
        response = await http.post(CHAT, json=HELLO)
        assert response.status_code == 429
        assert "has 2 answers under way, 1 more is above its limit of 2 (max_concurrent)" in response.text
        assert int(response.headers["retry-after"]) >= 1
        assert (await http.post(CHAT, json=HELLO | {"n": 3})).status_code == 400
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        await dispatcher.until_idle()
        dispatcher.delay_s = 0.0
        assert (await http.post(CHAT, json=HELLO | {"n": 2})).status_code == 200
        dispatcher.error = RuntimeError("a fault of ours")
        assert (await http.post(CHAT, json=HELLO)).status_code == 500
        dispatcher.error = None
        assert (await http.post(CHAT, json=HELLO | {"n": 2})).status_code == 200


async def test_the_operators_pages(front: Front) -> None:
    app = app_of(front, tenant("a"), tenant("o", operator=True))
    for path in ("/metrics", "/cluster"):
        for name, status in (("a", 403), ("o", 200), ("default", 200)):
            async with by(app, name) as http:
                assert (await http.get(path)).status_code == status
    async with by(app, "a") as http:
        assert (await http.get("/ready")).status_code == 200
        http.headers["authorization"] = f"Bearer {control_key(SECRET)}"
        assert (await http.get("/ready")).status_code == 200  # as `headrace serve` asks
        http.headers["authorization"] = f"Bearer {control_key('another')}"
        assert (await http.get("/ready")).status_code == 401


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"x-request-timeout": "0.2"}, {}),
        ({}, {"timeout": 0.2}),
        ({"x-request-timeout": "9"}, {"timeout": 0.2}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_takes_too_long(
    front: Front, dispatcher: FakeDispatcher, headers: dict[str, str], body: dict[str, Any], stream: bool
) -> None:
    app = app_of(front)
    dispatcher.delay_s = 0.05
    dispatcher.answer = dispatcher.answer * 10
    async with by(app, "default") as http:
        response = await http.post(CHAT, json=HELLO | body | {"stream": stream}, headers=headers)
    if stream:
        assert response.status_code == 200
        assert '"type":"timeout_error"' in response.text
        assert "[DONE]" not in response.text
    else:
        assert response.status_code == 504
        assert response.json()["error"]["message"] == "the request's timeout has passed"
    await dispatcher.until_idle()
    assert len(dispatcher.closed_early) == 1
    assert sample(front, "headrace_tenant_refusals_total", tenant="default", reason="deadline") == 1.0


async def test_the_deadline_is_known_to_admission(front: Front, dispatcher: FakeDispatcher) -> None:
    app = app_of(front, admission=AdmissionConfig(request_timeout_s=50))
    loop = asyncio.get_running_loop()
    async with by(app, "default") as http:
        for asked, seconds in (({}, 50), ({"timeout": 20}, 20), ({"timeout": 80}, 80)):
            before = loop.time()
            assert (await http.post(CHAT, json=HELLO | asked)).status_code == 200
            deadline = dispatcher.asked[-1].deadline
            assert deadline is not None
            assert before + seconds <= deadline <= loop.time() + seconds
        for asked, headers in (
            *(({"timeout": value}, {}) for value in (0, -1, 1e9)),
            *(({}, {"x-request-timeout": value}) for value in ("", "0", "nan", "-3", "inf", "soon", "1e9")),
        ):
            response = await http.post(CHAT, json=HELLO | asked, headers=headers)
            assert response.status_code == 400
            assert response.json()["error"]["param"] in ("timeout", "x-request-timeout")


def test_the_documentations_example_is_a_configuration() -> None:
    text = (Path(__file__).parents[3] / "docs" / "tenants.md").read_text()
    config = RouterConfig.model_validate(yaml.safe_load(text.split("```yaml")[1].split("```")[0])["router"])
    assert [tenant.name for tenant in config.all_tenants()] == ["acme", "batch", "default"]
    assert config.wants_keys


async def test_keys_from_a_file(front: Front, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("a-key\n")
    app = app_of(front, TenantConfig(name="a", api_keys_file=path))
    async with by(app, "a") as http:
        assert (await http.get("/v1/models")).status_code == 200
