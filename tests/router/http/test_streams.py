"""Clients that leave, errors before and after the first token, bodies that never end: over real sockets."""

from __future__ import annotations

import asyncio
import json
import socket

import httpx
import openai
import pytest
from fastapi import FastAPI

from router.generation import GenerationError, InvalidRequest, Overloaded, Unavailable
from router.http import connection
from router.server import RouterServer
from tests.router.fake_dispatcher import ANSWER, FakeDispatcher

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


async def outcomes(http: httpx.AsyncClient) -> dict[str, float]:
    text = (await http.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("headrace_request_outcomes_total")]
    return {line.split('outcome="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}


@pytest.mark.parametrize("body", [{"stream": True}, {"stream": False}, {"n": 3, "stream": True}, {"n": 3}])
async def test_a_client_that_leaves_ends_its_sequences(
    server: RouterServer, dispatcher: FakeDispatcher, http: httpx.AsyncClient, body: dict
) -> None:
    dispatcher.answer = dispatcher.answer * 100
    dispatcher.delay_s = 0.01  # half a minute in all
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    payload = json.dumps({**HELLO, **body}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    writer.write(head.encode() + payload)
    if body.get("stream"):
        await reader.readuntil(b'"content":"W')
    else:
        await dispatcher.until_asked(body.get("n", 1))
    assert dispatcher.open == body.get("n", 1)
    assert len(server.sessions) == 1
    writer.close()
    await dispatcher.until_idle()  # far sooner than the answer would end
    assert len(dispatcher.closed_early) == body.get("n", 1)
    assert len(server.sessions) == 0
    assert await outcomes(http) == {"cancelled": 1.0}


ERRORS = [
    (Overloaded("too many requests wait", retry_after_s=2.5), 429, "rate_limit_error", "3"),
    (Unavailable("no worker is left"), 503, "service_unavailable_error", None),
    (InvalidRequest("the prompt has more blocks than there are"), 400, "invalid_request_error", None),
    (GenerationError("a worker failed"), 500, "server_error", None),
]


@pytest.mark.parametrize(("error", "status", "kind", "retry_after"), ERRORS)
@pytest.mark.parametrize("body", [{}, {"stream": True}, {"n": 2, "stream": True}])
async def test_an_error_before_the_first_token_is_an_http_error(
    app: FastAPI,
    dispatcher: FakeDispatcher,
    error: GenerationError,
    status: int,
    kind: str,
    retry_after: str | None,
    body: dict,
) -> None:
    dispatcher.error = error
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(base_url="http://router", transport=transport) as http:
        response = await http.post(CHAT, json={**HELLO, **body})
        ended = await outcomes(http)
    assert response.status_code == status
    assert response.json()["error"]["message"] == error.message
    assert response.json()["error"]["type"] == kind
    assert response.headers.get("retry-after") == retry_after
    assert ended == {kind: 1.0}
    await dispatcher.until_idle()


@pytest.mark.parametrize("n", [1, 3])
async def test_an_error_after_the_first_token_is_an_event(
    http: httpx.AsyncClient, client: openai.AsyncOpenAI, dispatcher: FakeDispatcher, n: int
) -> None:
    dispatcher.error, dispatcher.error_after = Unavailable("it lost too many workers"), 3
    response = await http.post(CHAT, json={**HELLO, "stream": True, "n": n})
    assert response.status_code == 200
    *chunks, error, end = response.text.split("\n\n")
    assert end == ""
    assert len(chunks) >= 2
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "it lost too many workers"
    stream = await client.chat.completions.create(model="tiny", messages=HELLO["messages"], stream=True)
    with pytest.raises(openai.APIError, match="lost too many workers"):
        async for _ in stream:
            pass
    await dispatcher.until_idle()


async def test_openai_client_raises_its_own_errors(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher
) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature must be") as refused:
        await client.chat.completions.create(model="tiny", messages=HELLO["messages"], temperature=9)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="other", messages=HELLO["messages"])
    assert missing.value.code == "model_not_found"
    dispatcher.error = Overloaded("full")
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model="tiny", messages=HELLO["messages"])
    dispatcher.info = None
    with pytest.raises(openai.InternalServerError, match="no worker has registered"):
        await client.chat.completions.create(model="tiny", messages=HELLO["messages"])


async def test_a_bug_is_a_500_that_tells_nothing_but_the_request_id(
    http: httpx.AsyncClient, dispatcher: FakeDispatcher
) -> None:
    dispatcher.error = RuntimeError("secret")
    response = await http.post(CHAT, json=HELLO, headers={"x-request-id": "abc"})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "internal error, request abc"
    assert await outcomes(http) == {"internal_error": 1.0}
    dispatcher.error_after = 1
    with pytest.raises(httpx.RemoteProtocolError):
        await http.post(CHAT, json={**HELLO, "stream": True})


async def test_a_stream_without_an_end_is_an_error(
    http: httpx.AsyncClient, dispatcher: FakeDispatcher
) -> None:
    async def nothing(generation):
        return
        yield

    dispatcher.script = nothing
    response = await http.post(CHAT, json=HELLO)
    assert response.status_code == 500
    assert "without a finish reason" in response.json()["error"]["message"]


async def test_a_body_that_is_too_large_is_not_read(server: RouterServer, http: httpx.AsyncClient) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {10**9}\r\n\r\n".encode())
    assert b"413" in await reader.readline()  # before a byte of the body was sent
    writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    writer.write(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
    for _ in range(20):
        writer.write(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
    await writer.drain()
    assert b"413" in await reader.readline()  # while the client goes on sending
    writer.close()
    response = await http.post(CHAT, content=b" " * 300_000, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


async def test_chunked_bodies_are_read(http: httpx.AsyncClient) -> None:
    async def parts():
        for byte in json.dumps(HELLO).encode():
            yield bytes([byte])

    response = await http.post(CHAT, content=parts(), headers={"content-type": "application/json"})
    assert response.json()["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize(
    "start", [b"", b"POST / HTTP/1.1\r\nhost: x\r\nslow", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nG"]
)
async def test_headers_that_never_end_are_not_waited_for(
    server: RouterServer, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    writer.write(start)
    async with asyncio.timeout(20):
        await reader.read()  # the server's end
    writer.close()


async def test_headers_without_bound_are_refused(server: RouterServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    writer.write(b"GET /health HTTP/1.1\r\nx: ")
    answer = b""
    for _ in range(20):
        writer.write(b"a" * 8192)
        await asyncio.sleep(0.005)
        if writer.is_closing() or reader.at_eof():
            break
    async with asyncio.timeout(20):
        try:
            answer = await reader.read()
        except ConnectionError:  # reset, because more was on the way
            return
    assert answer.startswith(b"HTTP/1.1 431")
    writer.close()


async def test_what_is_not_http_is_answered_in_the_same_shape(server: RouterServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    writer.write(b"hello there\r\n\r\n")
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["type"] == "invalid_request_error"
    writer.close()


async def test_a_client_that_stops_reading_is_dropped(
    server: RouterServer, dispatcher: FakeDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALL_TIMEOUT_S", 0.3)
    dispatcher.answer = dispatcher.answer * 40_000
    assert dispatcher.info is not None
    dispatcher.info = type(dispatcher.info)("tiny", 10**7, dispatcher.info.vocab_size)
    raw = socket.create_connection(("127.0.0.1", server.http_port))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    payload = json.dumps({**HELLO, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    raw.sendall(
        b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
        % (CHAT.encode(), len(payload), payload)
    )
    await dispatcher.until_asked(1)
    await dispatcher.until_idle()
    assert len(dispatcher.closed_early) == 1
    raw.close()


async def test_a_refused_body_is_not_taken_for_ever(
    server: RouterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LINGER_S", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    writer.write(
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: text/html\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    )
    assert b"400" in await reader.readline()

    async def send_on() -> None:
        for _ in range(500):
            writer.write(b"1\r\n \r\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    with pytest.raises(ConnectionError):
        await send_on()
    writer.close()
