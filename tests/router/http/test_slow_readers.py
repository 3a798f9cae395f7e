"""A client that reads slowly: what is kept for it is bounded, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import httpx

from router.generation import Generation, TokenChunk
from router.http.connection import BoundedHttpConnection
from router.inbox import MERGED_BEYOND
from router.server import RouterServer
from tests.router.fake_cluster import FakeCluster, generation, until
from tests.router.fake_dispatcher import ANSWER, FakeDispatcher
from tests.router.fake_worker import expected_output
from tests.valkey_server import EmbeddedValkey

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


async def test_no_more_is_made_for_a_client_than_it_takes(
    server: RouterServer, dispatcher: FakeDispatcher, http: httpx.AsyncClient
) -> None:
    made = 0

    async def endless(generation: Generation) -> AsyncIterator[TokenChunk]:
        nonlocal made
        while True:
            made += 1
            yield TokenChunk([dispatcher.answer[0]] * 64)
            await asyncio.sleep(0)

    dispatcher.script = endless
    raw = socket.create_connection(("127.0.0.1", server.http_port))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    payload = json.dumps({**HELLO, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    raw.sendall(head.encode() + payload)
    stuck_at = -1
    async with asyncio.timeout(20):
        while made != stuck_at or made < 10:  # the kernel's buffers, then the connection's own are full
            stuck_at = made
            await asyncio.sleep(0.1)
    assert server._uvicorn is not None
    (slow,) = (c for c in server._uvicorn.server_state.connections if c.flow.write_paused)
    assert isinstance(slow, BoundedHttpConnection)
    event_bytes = 2048
    _, high = slow.transport.get_write_buffer_limits()
    assert slow.transport.get_write_buffer_size() <= high + event_bytes

    dispatcher.script = None
    response = await http.post(CHAT, json=HELLO)  # somebody else, meanwhile
    assert response.json()["choices"][0]["message"]["content"] == ANSWER
    assert made == stuck_at
    raw.close()
    await dispatcher.until_idle()


async def test_tokens_that_wait_for_a_reader_are_kept_as_few_events(valkey: EmbeddedValkey) -> None:
    tokens = 3000
    slow, quick = generation(1, max_tokens=tokens), generation(2, max_tokens=tokens)
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(step_s=0.0)
        chunks = cluster.dispatcher.generate(slow)
        output = list((await anext(chunks)).tokens)
        sizes: list[int] = []
        other: list[int] = []
        async for chunk in cluster.dispatcher.generate(quick):
            other += chunk.tokens
            link = cluster.dispatcher.fleet.link("d0")
            assert link is not None
            sizes += [len(inbox._events) for inbox in link._inboxes.values()]
        assert other == expected_output(quick.prompt, quick.sampling)
        await until(lambda: cluster["d0"].num_held == 0)
        assert max(sizes) <= MERGED_BEYOND
        last = None
        pieces = 0
        async for chunk in chunks:
            output += chunk.tokens
            last = chunk.finish_reason
            pieces += 1
        assert output == expected_output(slow.prompt, slow.sampling)
        assert last == "length"
        assert pieces <= MERGED_BEYOND + 1
        await cluster.at_rest()
