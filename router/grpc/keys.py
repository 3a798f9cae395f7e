"""API keys for gRPC: the same as for HTTP, in the `authorization` metadata."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from router.keys import ApiKeys

_OPEN_PREFIX = "/grpc.health.v1.Health/"  # probes have no key, as for HTTP's /health


class KeyCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Deny by default: every method wants a key, reflection and unknown ones too."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        metadata = dict(handler_call_details.invocation_metadata)
        if handler_call_details.method.startswith(_OPEN_PREFIX) or self._keys.admits(
            metadata.get("authorization")
        ):
            return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_deny)  # of the kind that waits for no message


async def _deny(requests: Any, context: Any) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED, "an API key is required: authorization: Bearer <key> in the metadata"
    )
