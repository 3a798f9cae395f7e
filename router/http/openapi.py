"""The bodies in /openapi.json: FastAPI does not see them, since they are decoded by msgspec."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI

from router.http.asked import ChatBody, CompletionBody
from router.http.tokenize import DetokenizeBody, TokenizeBody

_ERROR_STATUSES = ("400", "401", "404", "413", "429", "500", "503")


class Error(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: Error


_BODIES: dict[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}


def describe_bodies(app: FastAPI) -> None:
    """Makes `app.openapi` tell of the bodies and of the errors' shape."""
    routes_only = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = routes_only()
            _add_bodies(schema)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way FastAPI documents


def _add_bodies(schema: dict[str, Any]) -> None:
    kinds = [*_BODIES.values(), ErrorBody]
    references, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema.setdefault("components", {}).setdefault("schemas", {}).update(components)
    bodies = dict(zip(_BODIES, references, strict=False))
    error = {"description": "error", "content": {"application/json": {"schema": references[-1]}}}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own; here it is 400
            operation["responses"].update(dict.fromkeys(_ERROR_STATUSES, error))
            if path in bodies:
                content = {"application/json": {"schema": bodies[path]}}
                operation["requestBody"] = {"required": True, "content": content}
