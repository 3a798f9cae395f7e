"""A router replica's listeners: HTTP by uvicorn and gRPC by grpc.aio, on the loop that is running."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from router.chat.prompt import load_prompts
from router.config import RouterConfig
from router.generation import Dispatcher
from router.grpc.server import GrpcServer
from router.http.app import create_app
from router.http.connection import BoundedHttpConnection
from router.http.front import Front
from router.metrics import RouterMetrics
from router.sessions import Sessions
from router.tenants import Tenants

DRAIN_S = 2.0
KEEP_ALIVE_S = 75  # longer than load balancers keep idle connections, so that they close them and not we
_BACKLOG = 2048
_LAST_WORDS_S = 1.0  # for the errors that end open streams to be written


class PortInUse(OSError):
    """An address of the configuration cannot be bound. Raised by `start` before anything has started."""


class RouterServer:
    """Serves one model with `dispatcher` behind it. Start and stop it on the same event loop."""

    def __init__(
        self, dispatcher: Dispatcher, model_path: Path, config: RouterConfig, secret: str | None = None
    ) -> None:
        """`model_path`: the directory with tokenizer.json. `secret`: the cluster's, for what replicas derive from it.

        Raises `TokenizerError` when the model cannot be used, OSError when a file of API keys cannot.
        """
        self.metrics = RouterMetrics()
        self.sessions = Sessions()
        self._dispatcher = dispatcher
        self._config = config
        self._prompts = load_prompts(model_path)
        self._tenants = Tenants(config, secret)
        self._uvicorn: _EmbeddedUvicorn | None = None
        self._http_task: asyncio.Task[None] | None = None
        self._grpc: GrpcServer | None = None
        self.http_port = 0
        self.grpc_port = 0  # 0 when gRPC is off

    async def start(self) -> None:
        """Returns when both ports are open; they are in `http_port` and `grpc_port`. Raises `PortInUse`."""
        http_socket = _bind("http", self._config.http.host, self._config.http.port)
        try:
            self._grpc = self._bound_grpc() if self._config.grpc.enabled else None
        except OSError:
            http_socket.close()
            raise
        self.http_port = http_socket.getsockname()[1]
        front = Front(
            self._dispatcher, self._prompts, self.metrics, self.sessions, self._config.http, self._tenants
        )
        self._uvicorn = _EmbeddedUvicorn(
            uvicorn.Config(
                create_app(front),
                http=BoundedHttpConnection,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self._http_task = asyncio.create_task(self._uvicorn.serve(sockets=[http_socket]))
        if self._grpc is not None:
            self.grpc_port = self._grpc.port
            await self._grpc.start()
        listening = asyncio.create_task(self._uvicorn.listening.wait())
        await asyncio.wait({listening, self._http_task}, return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if self._http_task.done():
            self._http_task.result()  # raises what went wrong

    async def stop(self, drain_s: float = DRAIN_S) -> None:
        """Closes the ports, lets open requests end for `drain_s`, then ends them with an error that says retry."""
        grpc_stopped = None
        if self._uvicorn is not None:
            self._uvicorn.config.timeout_graceful_shutdown = int(drain_s + _LAST_WORDS_S) + 1
            self._uvicorn.should_exit = True
        self.sessions.draining = True
        if self._grpc is not None:
            grpc_stopped = asyncio.create_task(self._grpc.stop(drain_s + _LAST_WORDS_S))
        await self.sessions.drain(drain_s)
        if grpc_stopped is not None:
            await grpc_stopped
        if self._http_task is not None:
            await self._http_task

    def _bound_grpc(self) -> GrpcServer:
        host, port = self._config.grpc.host, self._config.grpc.port
        # gRPC's own message on a port in use is a C++ stack of reasons: ask first, and hold the port meanwhile.
        with _bind("grpc", host, port) as probe:
            return GrpcServer(
                f"{_bracketed(host)}:{probe.getsockname()[1]}",
                self._dispatcher,
                self._prompts,
                self.metrics,
                self.sessions,
                self._tenants,
                int(self._config.http.max_body),
            )


class _EmbeddedUvicorn(uvicorn.Server):
    """Leaves the process's signals to whoever started the router."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bind(section: str, host: str, port: int) -> socket.socket:
    """A bound socket that other replicas of this router may share. Raises `PortInUse`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise PortInUse(f"{section}.host {host!r} is no address: {error.strerror}") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise PortInUse(
            error.errno,
            f"{section}.port {port} on {host} cannot be bound: {error.strerror}; "
            f"choose another {section}.port, or 0 for any that is free",
        ) from error
    return listener


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
