from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from router.chat.prompt import load_prompts
from router.chat.tokenizer import TextTokenizer
from router.config import AdmissionConfig, HttpConfig, RouterConfig, TenantConfig
from router.grpc import headrace_pb2_grpc
from router.grpc.server import GrpcServer
from router.metrics import RouterMetrics
from router.sessions import Sessions
from router.tenants import Tenants
from tests.router.fake_dispatcher import ANSWER, FakeDispatcher
from tests.router.tiny_model import write_byte_level_model


@pytest.fixture(scope="session")
def grpc_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(grpc_model_path: Path) -> TextTokenizer:
    return TextTokenizer(grpc_model_path)


@pytest.fixture
def dispatcher(tokenizer: TextTokenizer) -> FakeDispatcher:
    eos = tokenizer.token_id("eos_token")
    assert eos is not None
    return FakeDispatcher(tokenizer.vocab_size, tokenizer.encode(ANSWER, False), eos)


@pytest.fixture
def api_keys() -> list[str]:
    return []


@pytest.fixture
def tenants() -> list[TenantConfig]:
    return []


@pytest.fixture
def admission() -> AdmissionConfig:
    return AdmissionConfig()


@pytest.fixture
def sessions() -> Sessions:
    return Sessions()


@pytest.fixture
def metrics() -> RouterMetrics:
    return RouterMetrics()


@pytest.fixture
async def server(
    dispatcher: FakeDispatcher,
    grpc_model_path: Path,
    metrics: RouterMetrics,
    sessions: Sessions,
    api_keys: list[str],
    tenants: list[TenantConfig],
    admission: AdmissionConfig,
) -> AsyncIterator[GrpcServer]:
    server = GrpcServer(
        "127.0.0.1:0",
        dispatcher,
        load_prompts(grpc_model_path),
        metrics,
        sessions,
        Tenants(RouterConfig(http=HttpConfig(api_keys=api_keys), tenants=tenants, admission=admission)),
        max_message_bytes=64 * 1024,
    )
    await server.start()
    yield server
    await server.stop(0.0)


@pytest.fixture
async def channel(server: GrpcServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> headrace_pb2_grpc.InferenceStub:
    return headrace_pb2_grpc.InferenceStub(channel)
