"""What every HTTP request passes before it meets an endpoint: its id, its key, its count, and the last safety net."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Awaitable

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.generation import GenerationError
from router.http.errors import error_json, error_response
from router.metrics import RouterMetrics
from router.refusal import Refusal, shown
from router.sampling import MAX_TIMEOUT_S
from router.tenants import OPERATOR_PATHS, Caller, Tenants

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health",)
MAX_REQUEST_ID_CHARS = 128
_CALLER = "headrace.caller"


class Gate:
    """ASGI middleware around the whole application. Deny by default: only `OPEN_PATHS` need no key."""

    def __init__(self, app: ASGIApp, tenants: Tenants, metrics: RouterMetrics) -> None:
        self._app = app
        self._tenants = tenants
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.monotonic()
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id"))
        started = False
        caller: Caller | None = None

        # Hands on what `send` gives, no coroutine of its own: it is called for every event of a stream.
        def marked(message: Message) -> Awaitable[None]:
            nonlocal started
            if not started:  # the first message is http.response.start
                started = True
                limits = [] if caller is None else caller.tenant.quota.headers(time.monotonic())
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-request-id", request_id), *limits],
                }
                route = getattr(scope.get("route"), "path", "unmatched")
                self._metrics.response(route, message["status"])
            return send(message)

        if scope["path"] not in OPEN_PATHS:
            try:
                caller = self._admit(scope["path"], headers, arrived)
            except GenerationError as error:
                await _refused(error)(scope, receive, marked)
                return
            scope[_CALLER] = caller
        try:
            await self._app(scope, receive, marked)
        except Exception:
            logger.exception("%s %s failed, request %s", scope["method"], scope["path"], request_id.decode())
            if started:
                raise
            body = error_json(f"internal error, request {request_id.decode()}", "server_error")
            await Response(body, 500, media_type="application/json")(scope, receive, marked)

    def _admit(self, path: str, headers: dict[bytes, bytes], arrived: float) -> Caller:
        """Raises `Refusal`."""
        tenant = self._tenants.of(headers.get(b"authorization"))
        if tenant is None:
            raise Refusal(
                "an API key is required: Authorization: Bearer <key>", code="invalid_api_key", status=401
            )
        if path.startswith(OPERATOR_PATHS) and not tenant.operator:
            raise Refusal(
                f"tenant {tenant.name!r} may not read {path} (its setting `operator` is false)",
                code="permission_denied",
                status=403,
            )
        return self._tenants.caller(tenant, arrived, _timeout_s(headers.get(b"x-request-timeout")))


def caller_of(scope: Scope) -> Caller:
    """Who sent the request, and what it asked for beside its body."""
    caller: Caller = scope[_CALLER]
    return caller


def _request_id(given: bytes | None) -> bytes:
    """The client's own, if it can be echoed safely."""
    if given and len(given) <= MAX_REQUEST_ID_CHARS and all(33 <= byte <= 126 for byte in given):
        return given
    return secrets.token_hex(16).encode()


def _timeout_s(given: bytes | None) -> float | None:
    if given is None:
        return None
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise Refusal(
            f"the header x-request-timeout must be seconds above 0 and at most {MAX_TIMEOUT_S:g}, "
            f"got {shown(given.decode('latin-1'))}",
            "x-request-timeout",
        )
    return timeout_s


def _refused(error: GenerationError) -> Response:
    response = error_response(error)
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response
