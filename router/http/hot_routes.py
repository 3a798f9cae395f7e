"""The paths on which tokens are served, past the layers that all others go through.

FastAPI finds a route by trying them in turn, solves dependencies that these endpoints do not have, and stacks handlers
of exceptions and files, each of them a call for every event of a stream. It still lists the paths in /openapi.json, and
still answers other methods on them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from router.generation import GenerationError
from router.http.errors import error_response

Endpoint = Callable[[Request], Awaitable[Response]]


class HotRoutes:
    def __init__(self, app: ASGIApp, endpoints: dict[str, Endpoint], routes: list[Any]) -> None:
        """`endpoints`: by path, for POST. `app` answers everything else; `routes` are those it lists."""
        self._app = app
        listed = {route.path: route for route in routes}
        self._endpoints = {path: (endpoint, listed[path]) for path, endpoint in endpoints.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._endpoints.get(scope["path"]) if scope.get("method") == "POST" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        endpoint, scope["route"] = found
        try:
            response = await endpoint(Request(scope, receive))
        except GenerationError as error:
            response = error_response(error)
        await response(scope, receive, send)
