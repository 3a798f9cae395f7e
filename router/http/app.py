"""The HTTP application: which path leads where, and how errors are worded."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from router.generation import GenerationError
from router.http.chat import ChatEndpoint
from router.http.completions import CompletionsEndpoint
from router.http.errors import error_json, error_response
from router.http.front import Front
from router.http.gate import Gate
from router.http.hot_routes import Endpoint, HotRoutes
from router.http.models import ModelsEndpoint
from router.http.openapi import describe_bodies
from router.http.operations import Operations
from router.http.tokenize import TokenizeEndpoint


def create_app(front: Front) -> FastAPI:
    app = FastAPI(
        title="Headrace",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # What is measured is in router/metrics.py. Ray configures OpenTelemetry in its processes, and FastAPI joins in.
        telemetry={"tracing": False, "metrics": False, "logs": False, "operation_spans": False},
    )
    models, tokenize, operations = ModelsEndpoint(front), TokenizeEndpoint(front), Operations(front)

    hot: dict[str, Endpoint] = {
        "/v1/chat/completions": ChatEndpoint(front).__call__,
        "/v1/completions": CompletionsEndpoint(front).__call__,
    }
    for path, endpoint in hot.items():
        app.add_api_route(path, endpoint, methods=["POST"])
    app.add_api_route("/v1/models", models.list, methods=["GET"])
    app.add_api_route("/v1/models/{model_id:path}", models.get, methods=["GET"])
    app.add_api_route("/tokenize", tokenize.tokenize, methods=["POST"])
    app.add_api_route("/detokenize", tokenize.detokenize, methods=["POST"])
    for path, probe in (("/health", operations.health), ("/ready", operations.ready)):
        app.add_api_route(path, probe, methods=["GET"])
        app.add_api_route(path, probe, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/metrics", operations.metrics, methods=["GET"])
    app.add_api_route("/cluster", operations.cluster, methods=["GET"])
    app.add_api_route("/cluster/experts", operations.experts, methods=["GET"])
    app.add_api_route("/cluster/experts/page", operations.experts_page, methods=["GET"])
    app.add_api_route("/cluster/requests/{request_id}", operations.explain, methods=["GET"])

    app.add_exception_handler(GenerationError, _generation_error)
    app.add_exception_handler(HTTPException, _http_exception)
    describe_bodies(app)
    everything = HotRoutes(app.build_middleware_stack(), hot, app.routes)
    app.middleware_stack = Gate(everything, tenants=front.tenants, metrics=front.metrics)
    return app


async def _generation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GenerationError)
    return error_response(error)


async def _http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:128]
    message = {
        404: f"there is no path {path!r}",
        405: f"{request.method} is not allowed on {path!r}",
    }.get(error.status_code, error.detail)
    body = error_json(message, "invalid_request_error")
    return Response(body, error.status_code, error.headers, media_type="application/json")
