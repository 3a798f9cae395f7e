"""API keys for gRPC: the same as for HTTP, in the `authorization` metadata."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from router.sampling import MAX_TIMEOUT_S
from router.tenants import Caller, Tenants

_OPEN_PREFIX = "/grpc.health.v1.Health/"  # probes have no key, as for HTTP's /health
_NO_KEY = "an API key is required: authorization: Bearer <key> in the metadata"


class KeyCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Deny by default: every method wants a key, reflection and unknown ones too."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        metadata = dict(handler_call_details.invocation_metadata)
        if (
            handler_call_details.method.startswith(_OPEN_PREFIX)
            or self._tenants.of(metadata.get("authorization")) is not None
        ):
            return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_deny)  # of the kind that waits for no message


async def caller_of(context: Any, tenants: Tenants) -> Caller:
    """Who makes a call that `KeyCheck` let pass, and until when it wants its answer."""
    arrived = time.monotonic()
    tenant = tenants.of(dict(context.invocation_metadata()).get("authorization"))
    if tenant is None:  # its key was taken out of a file a moment ago
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, _NO_KEY)
        raise AssertionError("abort raises")
    left_s = context.time_remaining()
    # Without a deadline some clients send one in centuries.
    return tenants.caller(tenant, arrived, left_s if left_s is not None and left_s <= MAX_TIMEOUT_S else None)


async def _deny(requests: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, _NO_KEY)
