"""Request bodies: read within bounds, decoded whole, wrong ones refused with the field's name."""

from __future__ import annotations

import asyncio
import difflib
import re
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from router.refusal import Refusal
from router.sessions import ClientGone

BODY_TIMEOUT_S = 30.0

T = TypeVar("T", bound=msgspec.Struct)

_UNKNOWN_FIELD = re.compile(
    r"^Object contains unknown field `(?P<field>.*?)`(?: - at `(?P<path>.*)`)?$", re.DOTALL
)
_WRONG_VALUE = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>.*)`)?$", re.DOTALL)


async def read_body(request: Request, max_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """Raises `Refusal`: 400 for another content type, 413 as soon as the body is known to be too large, 408."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise Refusal(f"the content type must be application/json, got {content_type[:64]!r}")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError as error:
        raise Refusal(f"the body did not arrive within {timeout_s:g} s", status=408) from error
    except ClientDisconnect as error:
        raise ClientGone from error
    return bytes(body)


def decode_body(body: bytes, kind: type[T], decoder: msgspec.json.Decoder[T]) -> T:
    """Raises `Refusal`."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _wrong_field(str(error), kind) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # msgspec has no word of its own for this one.
        hint = (
            "; half of a surrogate pair (\\ud800 to \\udfff) is no character"
            if b"\\ud" in body.lower()
            else ""
        )
        raise Refusal(f"the body is not valid JSON: {error}{hint}") from error
    except RecursionError as error:
        raise Refusal("the body is nested too deeply") from error


def _wrong_field(problem: str, kind: type[msgspec.Struct]) -> Refusal:
    """msgspec's words, with the path in the form that OpenAI's `param` has: messages[0].role."""
    unknown = _UNKNOWN_FIELD.match(problem)
    if unknown is not None:
        parent = _param(unknown["path"])
        field = unknown["field"]
        message = f"unknown field {field[:64]!r}" + (f" in {parent}" if parent else "")
        if parent is None:
            close = difflib.get_close_matches(field[:64], kind.__struct_fields__, n=1)
            message += f", did you mean {close[0]!r}?" if close else ""
        return Refusal(message, f"{parent}.{field[:64]}" if parent else field[:64], code="unknown_parameter")
    wrong = _WRONG_VALUE.match(problem)
    assert wrong is not None  # the pattern matches any string
    what, param = wrong["what"].replace("`", "").replace(" | null", ""), _param(wrong["path"])
    if param is None:
        return Refusal(f"the body is not as expected: {what[:1].lower()}{what[1:]}")
    return Refusal(f"{param}: {what[:1].lower()}{what[1:]}", param, code="invalid_type")


def _param(path: str | None) -> str | None:
    """`$.messages[0].role` -> messages[0].role; None for the body itself."""
    param = (path or "").removeprefix("$").removeprefix(".")
    return param or None


def _too_large(max_bytes: int) -> Refusal:
    return Refusal(f"the body is larger than {max_bytes} bytes", status=413, code="body_too_large")
