"""The gRPC server: the service, health that follows the dispatcher, reflection."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from router.chat.prompt import Prompts
from router.generation import Dispatcher
from router.grpc import headrace_pb2, headrace_pb2_grpc
from router.grpc.keys import KeyCheck
from router.grpc.service import InferenceService
from router.metrics import RouterMetrics
from router.sessions import Sessions
from router.tenants import Tenants

HEALTH_INTERVAL_S = 0.2
SERVICE = headrace_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_MAX_RESPONSE_BYTES = 16 * 1024**2  # far above any chunk of tokens with 20 logprobs each


class GrpcServer:
    """Bound when made, so that a port in use is known before anything starts."""

    def __init__(
        self,
        address: str,
        dispatcher: Dispatcher,
        prompts: Prompts,
        metrics: RouterMetrics,
        sessions: Sessions,
        tenants: Tenants,
        max_message_bytes: int,
    ) -> None:
        """Raises OSError when the address cannot be bound."""
        self._dispatcher = dispatcher
        self._sessions = sessions
        self._server = grpc.aio.server(
            interceptors=[KeyCheck(tenants)],
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", _MAX_RESPONSE_BYTES),
                ("grpc.so_reuseport", 1),  # router replicas on one node share the port
                ("grpc.keepalive_time_ms", 30_000),  # finds clients that vanished without closing
                ("grpc.keepalive_timeout_ms", 10_000),
            ],
        )
        service = InferenceService(dispatcher, prompts, metrics, sessions, tenants)
        headrace_pb2_grpc.add_InferenceServicer_to_server(service, self._server)
        self._health: Any = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        try:
            self.port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"gRPC cannot listen on {address}: {error}") from error
        self._follow: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._publish(self._status())
        await self._server.start()
        self._follow = asyncio.create_task(self._follow_readiness())

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls; those that are open after `grace_s` are cancelled."""
        if self._follow is not None:
            self._follow.cancel()
            with suppress(asyncio.CancelledError):
                await self._follow
            await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def _follow_readiness(self) -> None:
        published = None
        while True:
            status = self._status()
            if status != published:
                await self._publish(status)
                published = status
            await asyncio.sleep(HEALTH_INTERVAL_S)

    def _status(self) -> Any:
        ready = self._dispatcher.ready() and not self._sessions.draining
        statuses = health_pb2.HealthCheckResponse
        return statuses.SERVING if ready else statuses.NOT_SERVING

    async def _publish(self, status: Any) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)
