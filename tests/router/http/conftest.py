from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
from fastapi import FastAPI

from router.chat.prompt import load_prompts
from router.chat.tokenizer import TextTokenizer
from router.config import GrpcConfig, HttpConfig, RouterConfig
from router.http.app import create_app
from router.http.front import Front
from router.metrics import RouterMetrics
from router.server import RouterServer
from router.sessions import Sessions
from tests.router.fake_dispatcher import ANSWER, FakeDispatcher
from tests.router.tiny_model import write_byte_level_model


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> TextTokenizer:
    return TextTokenizer(model_path)


@pytest.fixture
def dispatcher(tokenizer: TextTokenizer) -> FakeDispatcher:
    eos = tokenizer.token_id("eos_token")
    assert eos is not None
    return FakeDispatcher(tokenizer.vocab_size, tokenizer.encode(ANSWER, False), eos)


@pytest.fixture
def config() -> RouterConfig:
    return RouterConfig(http=HttpConfig(port=0, max_body=256 * 1024), grpc=GrpcConfig(enabled=False))


@pytest.fixture
def front(dispatcher: FakeDispatcher, model_path: Path, config: RouterConfig) -> Front:
    return Front(dispatcher, load_prompts(model_path), RouterMetrics(), Sessions(), config.http)


@pytest.fixture
def app(front: Front) -> FastAPI:
    return create_app(front)


@pytest.fixture
async def server(
    dispatcher: FakeDispatcher, model_path: Path, config: RouterConfig
) -> AsyncIterator[RouterServer]:
    server = RouterServer(dispatcher, model_path, config)
    await server.start()
    yield server
    await server.stop(drain_s=0.0)
    assert len(server.sessions) == 0


@pytest.fixture
async def http(server: RouterServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}", timeout=10) as client:
        yield client


@pytest.fixture
async def client(server: RouterServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{server.http_port}/v1", api_key="none", max_retries=0, timeout=10
    ) as client:
        yield client
