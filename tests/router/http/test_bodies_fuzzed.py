"""Whatever a client sends, it never is the server's fault."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.http.asked import ChatBody, CompletionBody
from router.http.tokenize import DetokenizeBody, TokenizeBody

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = (
    *("/v1/chat/completions", "/v1/completions"),
    *("/tokenize", "/detokenize"),
)
FIELDS = {
    CHAT: ChatBody.__struct_fields__,
    COMPLETIONS: CompletionBody.__struct_fields__,
    TOKENIZE: TokenizeBody.__struct_fields__,
    DETOKENIZE: DetokenizeBody.__struct_fields__,
}

text = st.text(st.characters(codec="utf-8"), max_size=12)
surrogates = st.text(st.characters(categories=["Cs", "Lu"]), min_size=1, max_size=3)  # json writes \\ud800
token_ids = st.lists(st.integers(0, 400), min_size=1, max_size=5)
numbers = (
    st.integers(-3, 30)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**400, 1e308, 0.5, 400, 401])
)
leaves = st.none() | st.booleans() | numbers | text | surrogates
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=3)
)

parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": text}), min_size=1, max_size=2)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "developer"]), "content": text | parts},
    optional={"name": text, "tool_calls": st.none() | st.just([]), "refusal": st.none() | text},
)
required = {
    CHAT: {"messages": st.lists(message, min_size=1, max_size=3)},
    COMPLETIONS: {
        "prompt": text
        | token_ids
        | st.lists(text, min_size=1, max_size=3)
        | st.lists(token_ids, min_size=1, max_size=3)
    },
    TOKENIZE: {"prompt": text},
    DETOKENIZE: {"tokens": token_ids},
}
generation = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 1000),
    "stop": text | st.lists(text, max_size=16),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(1, 20),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "logit_bias": st.dictionaries(st.integers(0, 400).map(str), st.floats(-100, 100), max_size=3),
    "stop_token_ids": token_ids,
    **dict.fromkeys(
        ["ignore_eos", "return_token_ids", "include_stop_str_in_output", "skip_special_tokens"], st.booleans()
    ),
}
optional = {
    CHAT: {**generation, "logprobs": st.booleans(), "stream": st.booleans()},
    COMPLETIONS: {
        **generation,
        "logprobs": st.integers(0, 20),
        "echo": st.booleans(),
        "stream": st.booleans(),
    },
    TOKENIZE: {"return_token_strs": st.booleans()},
    DETOKENIZE: {},
}


@st.composite
def good_requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    path = draw(st.sampled_from([CHAT, CHAT, COMPLETIONS, COMPLETIONS, TOKENIZE, DETOKENIZE]))
    return path, draw(st.fixed_dictionaries(required[path], optional=optional[path]))


@st.composite
def spoilt_requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Good but for one or two fields, or for something deep inside a message."""
    path, body = draw(good_requests())
    for field in draw(st.lists(st.sampled_from(FIELDS[path]) | text, min_size=1, max_size=2, unique=True)):
        if field == "messages" and draw(st.booleans()):
            body["messages"] = [
                *body.get("messages", []),
                {"role": "user", "content": "x", draw(text): draw(values)},
            ]
            body["messages"][-1][draw(st.sampled_from(["role", "content", "name", "tool_calls"]))] = draw(
                values
            )
        else:
            body[field] = draw(values)
    return path, body


fuzzed = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture
def post(app: FastAPI) -> Any:
    loop = asyncio.new_event_loop()
    transport = httpx.ASGITransport(app)

    async def sent(path: str, content: bytes) -> httpx.Response:
        async with httpx.AsyncClient(base_url="http://router", transport=transport) as client:
            return await client.post(path, content=content, headers={"content-type": "application/json"})

    yield lambda path, content: loop.run_until_complete(sent(path, content))
    loop.close()


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404), response.text  # 404: another model
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        response.json()


@given(request=good_requests())
@settings(fuzzed, max_examples=250)
def test_good_requests(post: Any, request: tuple[str, dict]) -> None:
    path, body = request
    response = post(path, json.dumps(body).encode())
    check(response)
    if response.status_code != 200:  # these two the strategy does not avoid
        message = response.json()["error"]["message"]
        assert any(words in message for words in ("must not be empty", "stop strings have", "echo with")), (
            message
        )


@given(request=spoilt_requests())
@settings(fuzzed, max_examples=400)
def test_spoilt_requests(post: Any, request: tuple[str, dict]) -> None:
    path, body = request
    check(post(path, json.dumps(body).encode()))


@given(path=st.sampled_from(list(FIELDS)), body=values)
@settings(fuzzed, max_examples=100)
def test_any_json(post: Any, path: str, body: Any) -> None:
    check(post(path, json.dumps(body).encode()))


@given(path=st.sampled_from(list(FIELDS)), body=st.binary(max_size=64), cut=st.integers(0, 200))
@settings(fuzzed, max_examples=150)
def test_any_bytes(post: Any, path: str, body: bytes, cut: int) -> None:
    good = b'{"messages":[{"role":"user","content":"\xc3\xa9"}],"max_tokens":2}'
    check(post(path, body))
    check(post(path, good[:cut] + body + good[cut:]))
