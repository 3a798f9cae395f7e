"""A router replica: a Ray Serve deployment for its life cycle, its own listeners for everything else.

Serve starts, checks, restarts and replaces replicas. No request passes through Serve: each replica opens the HTTP and
gRPC ports itself, and replicas on one node share them (SO_REUSEPORT).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import logging
import os
import socket
import threading
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from cluster.logs import set_up_logging
from router.config import RouterConfig
from router.garbage import spare_requests

logger = logging.getLogger(__name__)

ROUTER_CLASS = "cluster.router_replica:Router"
_STOP_TIMEOUT_S = 8.0
_ALIVE_TIMEOUT_S = 5.0


class RouterSettings(BaseModel):
    """Everything one router replica needs."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    cluster: str
    secret: str = Field(repr=False)
    redis_url: str = Field(repr=False)
    model: str = Field(description="a prepared directory, or a name that is prepared on the replica's node")
    log_level: str
    lease_s: float
    router: RouterConfig


class RouterLike(Protocol):
    """What the replica asks of a router; tests put a fake in its place."""

    async def start(self) -> None:
        """Returns when the ports are open."""

    async def stop(self) -> None: ...


class Router:
    """The real one: the life of requests (dispatch) behind the HTTP and gRPC listeners."""

    def __init__(self, settings: RouterSettings) -> None:
        from router.dispatch import Dispatcher
        from router.server import RouterServer
        from workers.models.catalog import prepare_model

        self._dispatcher = Dispatcher(
            settings.router,
            cluster=settings.cluster,
            secret=settings.secret,
            redis_url=settings.redis_url,
            lease_s=settings.lease_s,
        )
        self._server = RouterServer(
            self._dispatcher, prepare_model(settings.model).path, settings.router, settings.secret
        )

    async def start(self) -> None:
        await self._dispatcher.start()
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop()
        await self._dispatcher.stop()


class RouterReplica:
    """The Serve deployment: a router on a thread with an event loop of its own, apart from Serve's."""

    def __init__(self, settings_json: str, router_class: str = ROUTER_CLASS) -> None:
        settings = RouterSettings.model_validate_json(settings_json)
        set_up_logging(settings.log_level, "router")
        _keep_serve_on_loopback(settings.router.http.host)
        module, _, name = router_class.partition(":")
        self._make_router = getattr(importlib.import_module(module), name)
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over: asyncio.Event | None = None
        self._up: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="router", daemon=True)
        self._thread.start()
        self._up.result()

    def _run(self) -> None:
        import uvloop

        try:
            uvloop.run(self._main())
        except Exception as error:
            if not self._up.done():
                self._up.set_exception(error)
            else:
                logger.exception("the router died")

    async def _main(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        router: RouterLike = self._make_router(self._settings)
        await router.start()
        spare_requests()
        http = self._settings.router.http
        logger.info("listening on %s:%d (pid %d)", http.host, http.port, os.getpid())
        self._up.set_result(None)
        try:
            await self._over.wait()
        finally:
            await asyncio.wait_for(router.stop(), _STOP_TIMEOUT_S)

    def check_health(self) -> None:
        """Asked by Serve every second; raising makes Serve replace this replica.

        The loop must turn and the port must take connections (another replica's would do: they share it).
        """
        if self._loop is None or not self._thread.is_alive():
            raise RuntimeError("the router's thread has ended")
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result(_ALIVE_TIMEOUT_S)
        http = self._settings.router.http
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(http.host, http.host)
        socket.create_connection((host, http.port), timeout=_ALIVE_TIMEOUT_S).close()

    def node_address(self) -> str:
        """Where this replica is, for a driver on another node."""
        ray: Any = importlib.import_module("ray")
        address: str = ray.util.get_node_ip_address()
        return address

    def __del__(self) -> None:
        """Serve's good-bye to a replica."""
        loop, over = getattr(self, "_loop", None), getattr(self, "_over", None)
        if loop is not None and over is not None and self._thread.is_alive():
            loop.call_soon_threadsafe(over.set)
            self._thread.join(_STOP_TIMEOUT_S + 1.0)


def _keep_serve_on_loopback(host: str) -> None:
    """Serve opens a port of its own in each replica, on every address, for calls between deployments. There are none.

    Bind it to loopback when the router itself is only there. (Ray's token guards it in any case.)
    """
    if not host.startswith("127."):
        return
    try:
        replica: Any = importlib.import_module("ray.serve._private.replica")
        bind = replica.add_port_to_grpc_server
    except (ImportError, AttributeError):
        return
    replica.add_port_to_grpc_server = lambda server, address: bind(
        server, address.replace("[::]", "127.0.0.1")
    )
