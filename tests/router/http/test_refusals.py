"""Every mistake of a client has its status and names its field, in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.router.fake_dispatcher import FakeDispatcher

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


CHAT_REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 2.1}, "temperature", "between 0 and 2, got 2.1"),
    ({"temperature": "hot"}, "temperature", "got str"),
    ({"temperature": True}, "temperature", "got bool"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_p": 1.01}, "top_p", "at most 1"),
    ({"min_p": -0.1}, "min_p", "between 0 and 1"),
    ({"top_k": -2}, "top_k", "between -1"),
    ({"repetition_penalty": 0}, "repetition_penalty", "between 0.01"),
    ({"presence_penalty": 2.5}, "presence_penalty", "between -2 and 2"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "between -2 and 2"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
    ({"logit_bias": {"401": 1}}, "logit_bias", "from 0 to 400"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1'"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "between -100 and 100"),
    ({"logit_bias": {"²": 1}}, "logit_bias", "keys are token ids"),
    ({"logit_bias": [1]}, "logit_bias", "expected object, got array"),
    ({"max_tokens": 0}, "max_tokens", "at least 1, got 0"),
    ({"max_tokens": 1.5}, "max_tokens", "got float"),
    ({"max_tokens": 10**30}, "max_tokens", "context of 512 tokens"),
    ({"max_completion_tokens": 511}, "max_completion_tokens", "may be at most"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens", "contradict"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "between 0 and 4"),
    ({"n": 0}, "n", "between 1 and 128"),
    ({"n": 129}, "n", "between 1 and 128"),
    ({"seed": 2**63}, "seed", "64-bit"),
    ({"seed": 1.5}, "seed", "got float"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": ""}, "stop", "1 to 512 characters"),
    ({"stop": ["a", 1]}, "stop[1]", "got int"),
    ({"stop_token_ids": [401]}, "stop_token_ids", "vocabulary has 401"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "-1"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"logprobs": 3}, "logprobs", "got int"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", "unknown field 'usage'"),
    ({"cache_salt": ""}, "cache_salt", "1 to 256"),
    ({"priority": 2**31}, "priority", "between"),
    ({"max_token": 5}, "max_token", "did you mean 'max_tokens'?"),
    ({"zzzzzz": 5}, "zzzzzz", "unknown field 'zzzzzz'"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported yet"),
    ({"tool_choice": "required"}, "tool_choice", "not supported yet"),
    ({"functions": [{}]}, "functions", "not supported yet"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported yet"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "not supported yet"),
    ({"modalities": ["text", "audio"]}, "modalities", "not supported yet"),
    ({"audio": {"voice": "x"}}, "audio", "not supported yet"),
    ({"prediction": {"type": "content"}}, "prediction", "not supported yet"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "not supported yet"),
    ({"prompt_logprobs": 0}, "prompt_logprobs", "not supported yet"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "the model's own"),
    ({"messages": []}, "messages", "at least one"),
    ({"messages": "hi"}, "messages", "expected array, got str"),
    ({"messages": [{"content": "hi"}]}, "messages[0]", "role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "got int"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "'king'"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "cannot start with the assistant"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
        "not supported yet",
    ),
    ({"messages": [{"role": "user", "content": "a " * 600}]}, "messages", "context is 512 tokens"),
]


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Without a socket: these answers are made before one matters."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(base_url="http://router", transport=transport) as client:
        yield client


@pytest.mark.parametrize(("change", "param", "words"), CHAT_REFUSALS)
async def test_chat(
    http: httpx.AsyncClient, dispatcher: FakeDispatcher, change: dict[str, Any], param: str, words: str
) -> None:
    for stream in (False, True):
        response = await http.post(CHAT, json={**HELLO, "stream": stream, **change})
        error = error_of(response)
        assert response.status_code == 400
        assert error["param"] == param
        assert words in error["message"]
        assert error["type"] == "invalid_request_error"
        if "stream" not in change and "stream_options" in change:
            break
    assert not dispatcher.asked


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": []}, "prompt", "must not be empty"),
        ({"prompt": [[]]}, "prompt", "at least one token"),
        ({"prompt": ["a", ""]}, "prompt", "must not be empty"),
        ({"prompt": ["a", 1]}, "prompt", "must be a string"),
        ({"prompt": [True]}, "prompt", "must be a string"),
        ({"prompt": [[1], "a"]}, "prompt", "must be a string"),
        ({"prompt": 5}, "prompt", "got int"),
        ({"prompt": None}, "prompt", "got null"),
        ({"prompt": [401]}, "prompt", "token id 401"),
        ({"prompt": [-1]}, "prompt", "token id -1"),
        ({"prompt": [10**30]}, "prompt", "token id 1000"),
        ({"prompt": [1] * 512}, "prompt", "512 tokens"),
        ({"prompt": ["a"] * 1025}, "prompt", "at most 1024"),
        ({"prompt": ["a"] * 513, "n": 2}, "n", "more than 1024"),
        ({"logprobs": 21}, "logprobs", "between 0 and 20"),
        ({"logprobs": True}, "logprobs", "got bool"),
        ({"logprobs": 1, "echo": True}, "echo", "not supported yet"),
        ({"best_of": 3}, "best_of", "equal to n"),
        ({"suffix": "x"}, "suffix", "not supported yet"),
        ({"messages": []}, "messages", "unknown field"),
    ],
)
async def test_completions(
    http: httpx.AsyncClient, dispatcher: FakeDispatcher, change: dict[str, Any], param: str, words: str
) -> None:
    response = await http.post(COMPLETIONS, json={"prompt": "x", **change})
    error = error_of(response)
    assert response.status_code == 400
    assert (error["param"], words in error["message"]) == (param, True), error
    assert not dispatcher.asked


@pytest.mark.parametrize(
    "change",
    [
        {"response_format": {"type": "text"}},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"tools": None, "modalities": ["text"], "reasoning_effort": "none"},
        {"temperature": 0, "top_p": 1, "n": 1, "seed": -(2**63)},
        {"user": "x", "metadata": {}, "store": True, "service_tier": "auto", "logit_bias": {"0": -100}},
        {"stop": None, "max_tokens": None, "stream": None, "stream_options": None, "seed": None},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "x": 1}]},
        {"messages": [{"role": "developer", "content": "a", "tool_calls": None, "name": "b"}]},
        {"top_k": -1},
        {"top_k": 2**31 - 1},
    ],
)
async def test_what_is_harmless_is_accepted(http: httpx.AsyncClient, change: dict[str, Any]) -> None:
    response = await http.post(CHAT, json={**HELLO, **change})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "expected object, got array"),
        (b'"x"', "expected object"),
        (b"null", "expected object"),
        (b"{}", "missing required field messages"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate pair"),
        (b'{"\\ud800": 1}', "not valid JSON"),
        (b'{"messages": NaN}', "not valid JSON"),
        (b'{"messages": [], "temperature": NaN}', "not valid JSON"),
        (b'{"messages": [], "temperature": 1e999}', "out of range"),
        (b'{"messages": [], "temperature": Infinity}', "not valid JSON"),
        (b'{"messages": [], "seed": ' + b"9" * 5000 + b"}", "out of range"),
        (b'{"messages": [], "user": ' + b"[" * 100_000, "nested too deeply"),
        (
            b'{"messages": [], "metadata": ' + b'{"a":' * 30_000 + b"1" + b"}" * 30_000 + b"}",
            "nested too deeply",
        ),
    ],
)
async def test_bodies_that_are_no_request(http: httpx.AsyncClient, body: bytes, words: str) -> None:
    response = await http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert words in error_of(response)["message"]


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "x" * 300])
async def test_content_type(http: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = await http.post(CHAT, content=json.dumps(HELLO).encode(), headers=headers)
    assert response.status_code == 400
    assert "application/json" in error_of(response)["message"]
    response = await http.post(
        CHAT, content=json.dumps(HELLO).encode(), headers={"content-type": "Application/JSON; charset=utf-8"}
    )
    assert response.status_code == 200


async def test_unknown_model(http: httpx.AsyncClient) -> None:
    for path, body in ((CHAT, HELLO), (COMPLETIONS, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        response = await http.post(path, json={**body, "model": "gpt-9"})
        assert response.status_code == 404
        error = error_of(response)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "'gpt-9'" in error["message"]
        assert "'tiny'" in error["message"]


async def test_unknown_paths_and_methods(http: httpx.AsyncClient) -> None:
    response = await http.get("/v2/chat")
    assert (response.status_code, "'/v2/chat'" in error_of(response)["message"]) == (404, True)
    response = await http.get(CHAT)
    assert (response.status_code, "GET" in error_of(response)["message"]) == (405, True)
    assert response.headers["allow"] == "POST"
    assert (await http.post("/health")).status_code == 405
    assert (await http.post(CHAT + "/", json=HELLO)).status_code == 404
    assert (await http.get("/docs")).status_code == 404


async def test_the_context_is_stated_in_numbers(http: httpx.AsyncClient) -> None:
    response = await http.post(COMPLETIONS, json={"prompt": [1] * 500, "max_tokens": 13})
    error = error_of(response)
    assert error["message"] == (
        "the prompt has 500 tokens and max_tokens is 13, together more than the model's context of 512 tokens; "
        "max_tokens may be at most 12"
    )
    assert error["code"] == "context_length_exceeded"
    assert (await http.post(COMPLETIONS, json={"prompt": [1] * 500, "max_tokens": 12})).status_code == 200
