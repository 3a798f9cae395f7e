"""Response headers that say where a request went, for an operator who asks with `x-headrace-explain: 1`."""

from __future__ import annotations

from typing import Any

from starlette.types import Message, Scope, Send

from router.generation import Dispatcher
from router.http.gate import caller_of

_ASKS = (b"x-headrace-explain", b"1")


def explaining(scope: Scope, send: Send, dispatcher: Dispatcher, request_id: str) -> Send:
    """`send`, which adds the headers when they are asked for: what is known by then, at a stream's first token.

    Whoever may not read /cluster gets none: they tell of workers, and of what others have cached.
    """
    if _ASKS not in scope["headers"] or not caller_of(scope).tenant.operator:
        return send

    async def explained(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *_headers(dispatcher, request_id)]}
        await send(message)

    return explained


def _headers(dispatcher: Dispatcher, request_id: str) -> list[tuple[bytes, bytes]]:
    found = dispatcher.explain(request_id)
    if found is None or not found["requests"][0]["placements"]:
        return []
    request = found["requests"][0]  # of several choices the first speaks
    last = request["placements"][-1]
    said: dict[str, Any] = {
        "request": request["request_id"],
        "router": found["router_id"],
        "decode": last["decode"],
        "prefill": last["prefill"],
        "cached-tokens": last["cached_tokens"],
        "cost": last["cost"],
        "placements": len(request["placements"]),
        "stages": ", ".join(f"{stage}={seconds:.6f}" for stage, seconds in last["seconds"].items()),
    }
    return [(b"x-headrace-" + name.encode(), str(value).encode()) for name, value in said.items()]
