"""What every HTTP request passes before it meets an endpoint: its id, its key, its count, and the last safety net."""

from __future__ import annotations

import logging
import secrets

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.http.errors import error_json
from router.keys import ApiKeys
from router.metrics import RouterMetrics

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health",)
MAX_REQUEST_ID_CHARS = 128


class Gate:
    """ASGI middleware around the whole application. Deny by default: only `OPEN_PATHS` need no key."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, metrics: RouterMetrics) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id"))
        started = False

        async def marked(message: Message) -> None:
            nonlocal started
            if not started:  # the first message is http.response.start
                started = True
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id)]}
                route = getattr(scope.get("route"), "path", "unmatched")
                self._metrics.response(route, message["status"])
            await send(message)

        if scope["path"] not in OPEN_PATHS and not self._keys.admits(headers.get(b"authorization")):
            await _unauthorized()(scope, receive, marked)
            return
        try:
            await self._app(scope, receive, marked)
        except Exception:
            logger.exception("%s %s failed, request %s", scope["method"], scope["path"], request_id.decode())
            if started:
                raise
            body = error_json(f"internal error, request {request_id.decode()}", "server_error")
            await Response(body, 500, media_type="application/json")(scope, receive, marked)


def _request_id(given: bytes | None) -> bytes:
    """The client's own, if it can be echoed safely."""
    if given and len(given) <= MAX_REQUEST_ID_CHARS and all(33 <= byte <= 126 for byte in given):
        return given
    return secrets.token_hex(16).encode()


def _unauthorized() -> Response:
    body = error_json(
        "an API key is required: Authorization: Bearer <key>", "invalid_request_error", code="invalid_api_key"
    )
    return Response(body, 401, {"www-authenticate": "Bearer"}, media_type="application/json")
