from __future__ import annotations

import dataclasses

import httpx
import openai
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from router.chat.tokenizer import TextTokenizer
from router.config import HttpConfig, RouterConfig
from router.http.app import create_app
from router.http.front import Front
from router.tenants import Tenants
from tests.router.fake_dispatcher import FakeDispatcher

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def over(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url="http://router", transport=httpx.ASGITransport(app))


async def test_health_is_the_process_and_ready_is_the_cluster(
    app: FastAPI, dispatcher: FakeDispatcher
) -> None:
    async with over(app) as http:
        assert (await http.get("/ready")).status_code == 200
        dispatcher.is_ready = False
        response = await http.get("/ready")
        assert response.status_code == 503
        assert response.json()["error"]["message"] == "no decode worker is connected"
        assert response.headers["retry-after"] == "1"
        assert (await http.get("/health")).status_code == 200
        assert (await http.head("/health")).status_code == 200


async def test_models(client: openai.AsyncOpenAI, dispatcher: FakeDispatcher) -> None:
    (model,) = [model async for model in client.models.list()]
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "headrace")
    assert (await client.models.retrieve("tiny")).model_extra == {"max_model_len": 512}
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("org/other")
    dispatcher.info = None
    assert [model async for model in client.models.list()] == []


async def test_model_names_with_slashes(app: FastAPI, dispatcher: FakeDispatcher) -> None:
    assert dispatcher.info is not None
    dispatcher.info = type(dispatcher.info)("org/tiny", 512, dispatcher.info.vocab_size)
    async with over(app) as http:
        assert (await http.get("/v1/models/org/tiny")).json()["id"] == "org/tiny"


async def test_cluster(app: FastAPI) -> None:
    async with over(app) as http:
        assert (await http.get("/cluster")).json() == {"workers": [{"worker_id": "d0", "epoch": 1}]}


async def test_tokenize_and_detokenize(
    app: FastAPI, dispatcher: FakeDispatcher, tokenizer: TextTokenizer
) -> None:
    async with over(app) as http:
        text = "Zürich <|im_end|> 🙂"
        given = (await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
        assert given["tokens"] == tokenizer.encode(text)
        assert given["count"] == len(given["tokens"])
        assert given["max_model_len"] == 512
        assert given["token_strs"] == [tokenizer.token_string(token) for token in given["tokens"]]
        assert (await http.post("/detokenize", json={"tokens": given["tokens"]})).json() == {"prompt": text}
        chat = (await http.post("/tokenize", json=HELLO)).json()["tokens"]
        await http.post(CHAT, json=HELLO)
        assert chat == dispatcher.asked[0].prompt
        assert (await http.post("/tokenize", json={"prompt": ""})).json()["tokens"] == []
        assert (await http.post("/tokenize", json={})).status_code == 400
        assert (await http.post("/tokenize", json={"prompt": "x", **HELLO})).status_code == 400
        assert (await http.post("/detokenize", json={"tokens": [10**30]})).status_code == 400
        assert (await http.post("/detokenize", json={"tokens": ["a"]})).json()["error"][
            "param"
        ] == "tokens[0]"


async def test_request_ids_are_echoed(app: FastAPI) -> None:
    async with over(app) as http:
        for path in ("/health", "/nowhere"):
            assert (await http.get(path, headers={"x-request-id": "r-1"})).headers["x-request-id"] == "r-1"
            made = (await http.get(path, headers={"x-request-id": "a b" * 100})).headers["x-request-id"]
            assert len(made) == 32


@pytest.fixture
def guarded(front: Front) -> FastAPI:
    http = HttpConfig(port=0, api_keys=["first-key", "zweiter-schlüssel"])
    return create_app(dataclasses.replace(front, config=http, tenants=Tenants(RouterConfig(http=http))))


@pytest.mark.parametrize(
    "path",
    [
        CHAT,
        "/v1/models",
        "/metrics",
        "/ready",
        "/cluster",
        "/openapi.json",
        "/nowhere",
        "/health/",
        "/tokenize",
    ],
)
async def test_every_path_but_health_wants_a_key(guarded: FastAPI, path: str) -> None:
    async with over(guarded) as http:
        assert (await http.get("/health")).status_code == 200
        for value in (
            None,
            "",
            "Bearer",
            "Bearer ",
            "Bearer wrong",
            "Basic first-key",
            "first-key",
            "Bearer first-key2",
        ):
            headers = {} if value is None else {"authorization": value}
            response = await http.get(path, headers=headers)
            assert response.status_code == 401, value
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for key in ("first-key", "zweiter-schlüssel"):
            response = await http.get(path, headers={"authorization": f"Bearer {key}".encode()})
            assert response.status_code != 401


async def test_draining_is_not_ready_and_takes_nothing(app: FastAPI, front: Front) -> None:
    await front.sessions.drain(0.0)
    async with over(app) as http:
        assert (await http.get("/ready")).status_code == 503
        for stream in (False, True):
            response = await http.post(CHAT, json={**HELLO, "stream": stream})
            assert response.status_code == 503
            assert "retry" in response.json()["error"]["message"]


WORKER = b"""# HELP headrace_requests_running requests in the batch
# TYPE headrace_requests_running gauge
headrace_requests_running{worker="%s"} 3.0
# HELP headrace_steps_total steps
# TYPE headrace_steps_total counter
headrace_steps_total{worker="%s"} 7.0
headrace_steps_total{pool="a"} 2.0
# HELP headrace_step_seconds one step
# TYPE headrace_step_seconds histogram
headrace_step_seconds_bucket{le="0.1"} 1.0
headrace_step_seconds_bucket{le="+Inf"} 2.0
headrace_step_seconds_sum 1.5
headrace_step_seconds_count 2.0
"""


async def test_metrics_are_those_of_the_router_and_of_each_worker(
    app: FastAPI, dispatcher: FakeDispatcher
) -> None:
    dispatcher.expositions = [WORKER % (b"d0", b"d0"), WORKER % (b"d1", b"d1"), b"{not metrics", b"\xff"]
    async with over(app) as http:
        await http.post(CHAT, json=HELLO)
        response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    for kind in ("# HELP ", "# TYPE "):
        names = [line.split()[2] for line in lines if line.startswith(kind)]
        assert len(names) == len(set(names))
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples["headrace_requests_running", "d0"] == samples["headrace_requests_running", "d1"] == 3.0
    assert (
        samples["vllm:num_requests_running", "", "d0"]
        == samples["vllm:num_requests_running", "", "d1"]
        == 3.0
    )
    assert samples["headrace_steps_total", "d0"] == 7.0
    assert samples["headrace_steps_total", "a"] == 4.0  # the same series twice is added up
    assert samples["headrace_step_seconds_count",] == 4.0
    assert samples["headrace_http_worker_metrics_errors_total",] == 2.0
    assert samples["headrace_http_responses_total", *sorted(["200", CHAT])] == 1.0
    prompt, answer = len(dispatcher.asked[0].prompt), len(dispatcher.answer) + 1
    for name, value in {
        "headrace_request_prompt_tokens_total": prompt,
        "vllm:prompt_tokens_total": prompt,
        "headrace_request_cached_tokens_total": prompt // 2,
        "headrace_request_generation_tokens_total": answer,
        "vllm:generation_tokens_total": answer,
        "headrace_request_ttft_seconds_count": 1,
        "vllm:time_to_first_token_seconds_count": 1,
        "headrace_request_inter_token_seconds_count": answer - 1,
        "vllm:inter_token_latency_seconds_count": answer - 1,
        "headrace_request_time_per_output_token_seconds_count": 1,
        "headrace_request_e2e_seconds_count": 1,
        "vllm:e2e_request_latency_seconds_count": 1,
        "headrace_request_prepare_seconds_count": 1,
    }.items():
        assert samples[name, "tiny"] == value, name
    assert samples["headrace_request_in_flight", "chat", "tiny"] == 0.0
    assert samples["headrace_request_outcomes_total", "chat", "stop", "tiny"] == 1.0
    assert samples["vllm:request_success_total", "stop", "tiny"] == 1.0


async def test_metrics_do_not_depend_on_workers(
    app: FastAPI, dispatcher: FakeDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never() -> list[bytes]:
        raise TimeoutError

    monkeypatch.setattr(dispatcher, "worker_metrics", never)
    async with over(app) as http:
        assert "headrace_http_worker_metrics_errors_total 1.0" in (await http.get("/metrics")).text


async def test_paths_of_clients_are_no_labels(app: FastAPI) -> None:
    async with over(app) as http:
        for path in ("/a", "/b", "/v1/models/x", "/v1/models/y"):
            await http.get(path)
        text = (await http.get("/metrics")).text
    assert 'headrace_http_responses_total{route="unmatched",status="404"} 2.0' in text
    assert 'headrace_http_responses_total{route="/v1/models/{model_id:path}",status="404"} 2.0' in text


async def test_websockets_are_closed(app: FastAPI) -> None:
    sent = []

    async def send(message) -> None:
        sent.append(message)

    async def receive():
        return {"type": "websocket.connect"}

    await app({"type": "websocket", "path": "/v1/models", "headers": [], "query_string": b""}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_openapi_tells_of_the_bodies(app: FastAPI) -> None:
    async with over(app) as http:
        schema = (await http.get("/openapi.json")).json()
    for path, name in (("/v1/chat/completions", "ChatBody"), ("/v1/completions", "CompletionBody")):
        operation = schema["paths"][path]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{name}"}
        assert "max_tokens" in schema["components"]["schemas"][name]["properties"]
        assert schema["components"]["schemas"][name]["additionalProperties"] is False
        assert {"400", "429", "503"} <= set(operation["responses"])
    assert "422" not in schema["paths"]["/v1/models/{model_id}"]["get"]["responses"]


async def test_experts_and_their_page(app: FastAPI, dispatcher: FakeDispatcher) -> None:
    dispatcher.experts = {"router": "r", "groups": [{"group": "g", "load": [[1.0, 0.5]]}]}
    async with over(app) as http:
        assert (await http.get("/cluster/experts")).json() == dispatcher.experts
        page = await http.get("/cluster/experts/page")
        assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "connect-src 'self'" in policy
        # All that it needs is in it: the policy above would keep anything else out.
        assert "src=" not in page.text
        assert "href=" not in page.text


async def test_only_operators_see_experts(front: Front) -> None:
    config = RouterConfig(http=HttpConfig(api_keys=["mine"]), tenants=[{"name": "a", "api_keys": ["theirs"]}])
    app = create_app(dataclasses.replace(front, tenants=Tenants(config)))
    async with over(app) as http:
        for path in ("/cluster/experts", "/cluster/experts/page"):
            assert (await http.get(path)).status_code == 401
            theirs = await http.get(path, headers={"authorization": "Bearer theirs"})
            assert (theirs.status_code, theirs.json()["error"]["code"]) == (403, "permission_denied")
