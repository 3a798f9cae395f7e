"""Ports, start and stop of a router replica."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import httpx
import pytest
import uvloop

from router.chat.tokenizer import TokenizerError
from router.config import GrpcConfig, HttpConfig, RouterConfig
from router.grpc import headrace_pb2 as pb
from router.grpc import headrace_pb2_grpc
from router.server import PortInUse, RouterServer
from tests.router.fake_dispatcher import ANSWER, FakeDispatcher

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def both(http_port: int = 0, grpc_port: int = 0) -> RouterConfig:
    return RouterConfig(http=HttpConfig(port=http_port), grpc=GrpcConfig(port=grpc_port))


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("section", ["http", "grpc"])
async def test_a_port_of_somebody_else_is_said_before_anything_starts(
    dispatcher: FakeDispatcher, model_path: Path, section: str
) -> None:
    with socket.socket() as other, socket.socket() as free:
        other.bind(("127.0.0.1", 0))
        other.listen()
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        free.bind(("127.0.0.1", 0))
        taken, untaken = other.getsockname()[1], free.getsockname()[1]
        config = both(taken, untaken) if section == "http" else both(untaken, taken)
        server = RouterServer(dispatcher, model_path, config)
        with pytest.raises(PortInUse, match=f"{section}.port {taken} on 127.0.0.1 cannot be bound"):
            await server.start()
        assert not listening(untaken)
        await server.stop()


async def test_replicas_share_their_ports_and_ports_are_free_afterwards(
    dispatcher: FakeDispatcher, model_path: Path
) -> None:
    first = RouterServer(dispatcher, model_path, both())
    await first.start()
    second = RouterServer(dispatcher, model_path, both(first.http_port, first.grpc_port))
    await second.start()
    assert (second.http_port, second.grpc_port) == (first.http_port, first.grpc_port)
    await first.stop()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{second.http_port}") as http:
        for _ in range(10):  # every new connection goes to the one that is left
            assert (await http.get("/health", headers={"connection": "close"})).status_code == 200
    await second.stop()
    assert not listening(first.http_port)
    assert not listening(first.grpc_port)


async def test_an_address_that_is_none_is_said(dispatcher: FakeDispatcher, model_path: Path) -> None:
    config = RouterConfig(http=HttpConfig(host="no such host", port=0))
    with pytest.raises(PortInUse, match=r"http\.host 'no such host' is no address"):
        await RouterServer(dispatcher, model_path, config).start()


def test_a_model_directory_without_tokenizer_is_said(dispatcher: FakeDispatcher, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        RouterServer(dispatcher, tmp_path, both())


async def test_stop_lets_short_answers_end_and_ends_long_ones_with_retry(
    dispatcher: FakeDispatcher, model_path: Path
) -> None:
    server = RouterServer(dispatcher, model_path, both())
    await server.start()
    before = signal.getsignal(signal.SIGTERM)
    dispatcher.delay_s = 0.02
    short = 5
    dispatcher.answer = dispatcher.answer * 30
    long_s = dispatcher.delay_s * len(dispatcher.answer)
    url = f"http://127.0.0.1:{server.http_port}"
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}")
    calls = headrace_pb2_grpc.InferenceStub(channel)
    async with httpx.AsyncClient(base_url=url, timeout=20) as http:
        await http.get("/health")  # an idle connection in the pool

        async def grpc_call() -> grpc.aio.AioRpcError:
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                async for _ in calls.Generate(pb.GenerateRequest(text="x")):
                    pass
            return ended.value

        short_body, long_body = {**HELLO, "max_tokens": short, "stream": True}, {**HELLO, "stream": True}
        tasks = [asyncio.create_task(http.post(CHAT, json=body)) for body in (short_body, long_body, HELLO)]
        rpc = asyncio.create_task(grpc_call())
        await dispatcher.until_asked(4)
        began = time.monotonic()
        await server.stop(drain_s=1.0)
        took = time.monotonic() - began
        ended_short, ended_long, ended_whole = await asyncio.gather(*tasks)
        ended_rpc = await rpc
    await channel.close()
    assert 0.9 < took < long_s / 2
    assert ended_short.text.endswith("data: [DONE]\n\n")
    last = json.loads(ended_long.text.strip().rpartition("data: ")[2])
    assert "retry" in last["error"]["message"]
    assert last["error"]["type"] == "service_unavailable_error"
    assert ended_whole.status_code == 503
    assert ended_whole.headers["retry-after"] == "1"
    assert ended_rpc.code() is grpc.StatusCode.UNAVAILABLE
    assert "retry" in ended_rpc.details()
    assert dispatcher.open == 0
    assert not listening(server.http_port)
    assert signal.getsignal(signal.SIGTERM) is before


def test_runs_on_uvloop_off_the_main_thread(dispatcher: FakeDispatcher, model_path: Path) -> None:
    """As the router replica runs it."""
    seen: list[str] = []

    async def serve() -> None:
        server = RouterServer(dispatcher, model_path, both())
        await server.start()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}") as http:
            answer = await http.post(CHAT, json=HELLO)
            seen.append(answer.json()["choices"][0]["message"]["content"])
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            call = headrace_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="x"))
            seen.append("".join([message.text async for message in call]))
        await server.stop()

    thread = threading.Thread(target=lambda: uvloop.run(serve()))
    thread.start()
    thread.join(20)
    assert seen == [ANSWER, ANSWER]


def test_the_router_is_light() -> None:
    code = (
        "import sys, router.server; "
        "print([name for name in ('torch', 'transformers', 'ray', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
