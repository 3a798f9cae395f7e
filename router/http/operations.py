"""What operators and probes ask: /health, /ready, /metrics, /cluster and what lies below it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec
from fastapi import Request
from prometheus_client import REGISTRY
from starlette.responses import Response

from router.generation import Unavailable
from router.http.exposition import CONTENT_TYPE, merge
from router.http.front import Front
from router.refusal import Refusal, shown
from router.sessions import restarting

logger = logging.getLogger(__name__)

# Less than Prometheus' own time-out of 10 s: the router's metrics come even if a worker hangs.
WORKER_METRICS_TIMEOUT_S = 5.0

_EXPERTS_PAGE = (Path(__file__).parent / "experts_page.html").read_bytes()
# It holds nothing but itself, and asks nobody but this router.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}


class Operations:
    def __init__(self, front: Front) -> None:
        self._front = front

    async def health(self) -> Response:
        """The process is alive; nothing is said of workers."""
        return Response(b'{"status":"alive"}', media_type="application/json")

    async def ready(self) -> Response:
        """200 when a request could be served now, else 503: what a load balancer should ask."""
        if self._front.sessions.draining:
            raise restarting()
        if not self._front.dispatcher.ready():
            raise Unavailable("no decode worker is connected", retry_after_s=1.0)
        return Response(b'{"status":"ready"}', media_type="application/json")

    async def metrics(self) -> Response:
        metrics = self._front.metrics
        try:
            async with asyncio.timeout(WORKER_METRICS_TIMEOUT_S):
                expositions = await self._front.dispatcher.worker_metrics()
        except TimeoutError:
            logger.warning("workers did not send their metrics within %g s", WORKER_METRICS_TIMEOUT_S)
            metrics.scrape_error()
            expositions = []
        # Parsing takes a while in a large cluster: streams must not wait for it.
        registries = [
            metrics.registry,
            REGISTRY,
        ]  # REGISTRY: dispatch, and what prometheus_client says of the process
        text = await asyncio.to_thread(merge, registries, expositions, metrics.scrape_error)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def cluster(self) -> Response:
        """What `headrace status` prints."""
        status = await self._front.dispatcher.status()
        return Response(msgspec.json.encode(status), media_type="application/json")

    async def experts(self) -> Response:
        """What `headrace experts` prints: how busy experts are and where they live."""
        view = await self._front.dispatcher.experts_view()
        return Response(msgspec.json.encode(view), media_type="application/json")

    async def experts_page(self) -> Response:
        """The same as a picture that moves, for a browser. It asks for /cluster/experts with the key that it is given."""
        return Response(_EXPERTS_PAGE, media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)

    async def explain(self, request: Request) -> Response:
        """What `headrace explain` prints: why a request went where it went."""
        request_id = request.path_params["request_id"]
        found = self._front.dispatcher.explain(request_id)
        if found is None:
            raise Refusal(
                f"this router does not know request {shown(request_id)}: it keeps the last ones only "
                "(router.policy.keep_decisions), and every replica its own",
                "request_id",
                code="request_not_found",
                status=404,
            )
        return Response(msgspec.json.encode(found), media_type="application/json")
