"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math

import msgspec
from starlette.responses import Response

from router.generation import GenerationError, Overloaded

_encode = msgspec.json.Encoder().encode


def error_json(message: str, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    return _encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def error_body(error: GenerationError) -> bytes:
    code = getattr(error, "code", None)
    if code is None and isinstance(error, Overloaded):
        code = "rate_limit_exceeded"
    return error_json(error.message, error.kind, getattr(error, "param", None), code)


def error_response(error: GenerationError) -> Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return Response(error_body(error), error.status, headers, media_type="application/json")


def error_event(error: GenerationError) -> bytes:
    """For a stream that has begun: its status can no longer be changed."""
    return b"data: " + error_body(error) + b"\n\n"
