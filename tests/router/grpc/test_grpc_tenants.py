"""Tenants over gRPC: the same limits, told as gRPC's clients understand them."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from router.config import AdmissionConfig, TenantConfig
from router.generation import Overloaded, Unavailable
from router.grpc import headrace_pb2 as pb
from router.grpc.headrace_pb2_grpc import InferenceStub
from router.metrics import RouterMetrics
from tests.router.fake_dispatcher import FakeDispatcher


@pytest.fixture
def api_keys() -> list[str]:
    return ["default-key"]


@pytest.fixture
def tenants() -> list[TenantConfig]:
    return [TenantConfig(name="a", api_keys=["a-key"], max_requests_per_minute=2, priority=4)]


@pytest.fixture
def admission() -> AdmissionConfig:
    return AdmissionConfig(request_timeout_s=0.3)


async def ask(
    stub: InferenceStub, name: str, timeout: float | None = None, **fields
) -> list[pb.GenerateResponse]:
    metadata = (("authorization", f"Bearer {name}-key"),)
    return [
        m
        async for m in stub.Generate(
            pb.GenerateRequest(text="x", **fields), metadata=metadata, timeout=timeout
        )
    ]


async def test_the_tenant_reaches_the_dispatcher(stub: InferenceStub, dispatcher: FakeDispatcher) -> None:
    await ask(stub, "a")
    await ask(stub, "a", priority=9, timeout=50)
    await ask(stub, "default")
    a, b, default = dispatcher.asked
    assert (a.tenant, a.priority, default.tenant) == ("a", 4, "default")
    assert a.cache_salt == b.cache_salt != ""
    assert default.cache_salt == ""
    assert b.priority == 9
    assert a.deadline is not None
    assert b.deadline is not None
    assert 45 < b.deadline - a.deadline < 51
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(stub, "a", priority=3)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_limit_says_when_to_come_back(stub: InferenceStub, metrics: RouterMetrics) -> None:
    await ask(stub, "a")
    await ask(stub, "a")
    with pytest.raises(grpc.aio.AioRpcError) as limited:
        await ask(stub, "a")
    error = limited.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "has used 2 of 2 requests per minute" in error.details()
    trailing = dict(error.trailing_metadata())
    assert trailing["x-ratelimit-limit-requests"] == "2"
    assert trailing["x-ratelimit-remaining-requests"] == "0"
    seconds = int(trailing["retry-after"])
    assert 28 <= seconds <= 30
    assert int(trailing["grpc-retry-pushback-ms"]) == 1000 * seconds
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    assert (status.code, status.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], error.details())
    info = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert info.retry_delay.seconds == seconds
    sample = metrics.registry.get_sample_value(
        "headrace_tenant_refusals_total", {"tenant": "a", "reason": "max_requests_per_minute"}
    )
    assert sample == 1.0
    await ask(stub, "default")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Overloaded("full", 3.2, reason="queue_full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("gone", 200.0), grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_every_error_that_may_pass_says_so(
    stub: InferenceStub, dispatcher: FakeDispatcher, error: Exception, code: grpc.StatusCode
) -> None:
    dispatcher.error = error
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ask(stub, "default")
    assert raised.value.code() is code
    trailing = dict(raised.value.trailing_metadata())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    info = error_details_pb2.RetryInfo()
    status.details[0].Unpack(info)
    assert str(info.retry_delay.seconds) == trailing["retry-after"] == ("4" if code.value[0] == 8 else "200")


async def test_the_default_timeout_ends_a_call(stub: InferenceStub, dispatcher: FakeDispatcher) -> None:
    dispatcher.delay_s = 0.05
    dispatcher.answer = dispatcher.answer * 10
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await ask(stub, "default")
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert late.value.details() == "the request's timeout has passed"
    await dispatcher.until_idle()
