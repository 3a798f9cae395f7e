"""Health, reflection, API keys, and the generated code."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from router.grpc import headrace_pb2 as pb
from router.grpc.headrace_pb2_grpc import InferenceStub
from tests.router.fake_dispatcher import ANSWER, FakeDispatcher

SERVICE = "headrace.v1.Inference"
STATUS = health_pb2.HealthCheckResponse


async def test_health_follows_the_dispatcher(channel: grpc.aio.Channel, dispatcher: FakeDispatcher) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == STATUS.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    assert (await watch.read()).status == STATUS.SERVING
    dispatcher.is_ready = False
    assert (await watch.read()).status == STATUS.NOT_SERVING
    dispatcher.is_ready = True
    assert (await watch.read()).status == STATUS.SERVING
    watch.cancel()


async def test_reflection_lists_and_describes_the_service(channel: grpc.aio.Channel) -> None:
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    answers = [answer async for answer in reflection.ServerReflectionInfo(iter(requests))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    (descriptor,) = answers[1].file_descriptor_response.file_descriptor_proto
    assert descriptor == pb.DESCRIPTOR.serialized_pb


class TestKeys:
    @pytest.fixture
    def api_keys(self) -> list[str]:
        return ["the-key"]

    @pytest.mark.parametrize("value", [None, "Bearer wrong", "the-key", "Bearer the-key2"])
    async def test_without_the_key_nothing_answers(
        self, channel: grpc.aio.Channel, dispatcher: FakeDispatcher, value: str | None
    ) -> None:
        metadata = () if value is None else (("authorization", value),)
        stub = InferenceStub(channel)
        unknown = channel.unary_unary("/headrace.v1.Inference/Nothing")
        listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=metadata
        )
        for call in (
            stub.Generate(pb.GenerateRequest(text="x"), metadata=metadata).read(),
            stub.GetModel(pb.GetModelRequest(), metadata=metadata),
            unknown(b"", metadata=metadata),
            listing.read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                async with asyncio.timeout(5):
                    await call
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert not dispatcher.asked
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == STATUS.SERVING

    async def test_with_the_key(self, channel: grpc.aio.Channel) -> None:
        call = InferenceStub(channel).Generate(
            pb.GenerateRequest(text="x"), metadata=(("authorization", "Bearer the-key"),)
        )
        assert "".join([message.text async for message in call]) == ANSWER


def test_generated_code_is_that_of_the_proto(tmp_path: Path) -> None:
    """`make proto` makes it; it is committed so that running needs no compiler."""
    root = Path(pb.__file__).parents[2]
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}"),
            *(f"--grpc_python_out={tmp_path}", "router/grpc/headrace.proto"),
        ],
        cwd=root,
        check=True,
    )
    for name in ("headrace_pb2.py", "headrace_pb2_grpc.py"):
        made = (tmp_path / "router/grpc" / name).read_text()
        assert made == (root / "router/grpc" / name).read_text(), f"{name} is stale: run `make proto`"
