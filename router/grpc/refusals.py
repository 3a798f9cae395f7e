"""Errors as gRPC tells them: a status code, and in the trailing metadata when to come back.

`retry-after` in seconds, `x-ratelimit-*` as over HTTP, `grpc-retry-pushback-ms`, which gRPC's own retries obey (proposal A6),
and `grpc-status-details-bin` with a google.rpc.RetryInfo, which client libraries unpack.
"""

from __future__ import annotations

import math
import time
from typing import Any

import grpc

from router.generation import GenerationError
from router.tenants import Tenant

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_RETRY_INFO = b"type.googleapis.com/google.rpc.RetryInfo"
_MAX_MESSAGE_CHARS = 1024  # headers of a call are bounded, and the details repeat it

Metadata = tuple[tuple[str, str | bytes], ...]


async def abort(context: Any, error: GenerationError, tenant: Tenant | None = None) -> None:
    code = CODES.get(error.status, grpc.StatusCode.INTERNAL)
    await context.abort(code, error.message, trailing(error, code, tenant))


def trailing(error: GenerationError, code: grpc.StatusCode, tenant: Tenant | None) -> Metadata:
    limits = [] if tenant is None else tenant.quota.headers(time.monotonic())
    told: list[tuple[str, str | bytes]] = [(name.decode(), value.decode()) for name, value in limits]
    if error.retry_after_s is not None:
        # One number in all of them: a client should not wait for less because it reads another one.
        seconds = max(1, math.ceil(error.retry_after_s))
        told.append(("retry-after", str(seconds)))
        told.append(("grpc-retry-pushback-ms", str(1000 * seconds)))
        told.append(("grpc-status-details-bin", _status(code, error.message[:_MAX_MESSAGE_CHARS], seconds)))
    return tuple(told)


def _status(code: grpc.StatusCode, message: str, retry_after_s: int) -> bytes:
    """google.rpc.Status{code, message, details: [RetryInfo{retry_delay: Duration{seconds}}]}, written out.

    Their generated code would be one more dependency, for five fields that cannot change.
    """
    delay = _number(1, retry_after_s)
    info = _bytes(1, _RETRY_INFO) + _bytes(2, _bytes(1, delay))
    return _number(1, code.value[0]) + _bytes(2, message.encode()) + _bytes(3, info)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
