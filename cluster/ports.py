"""The public ports: found out to be free before anything starts, and held until the end.

A holder socket is bound with SO_REUSEPORT but never listens. Router replicas, which bind with SO_REUSEPORT too, can
listen beside it; another program can't slip in between our look and theirs, or while a replica restarts.
"""

from __future__ import annotations

import errno
import socket

from router.config import RouterConfig


class PortError(Exception):
    """A port can't be had."""


class HeldPorts:
    """`config` is the router's section with every port 0 replaced by the port that was found."""

    def __init__(self, config: RouterConfig) -> None:
        self._sockets: list[socket.socket] = []
        try:
            http = config.http.model_copy(
                update={"port": self._hold("http", config.http.host, config.http.port)}
            )
            grpc = config.grpc
            if grpc.enabled:
                grpc = grpc.model_copy(update={"port": self._hold("grpc", grpc.host, grpc.port)})
        except BaseException:
            self.release()
            raise
        self.config = config.model_copy(update={"http": http, "grpc": grpc})

    def _hold(self, kind: str, host: str, port: int) -> int:
        setting = f"router.{kind}.port"
        option = "--port" if kind == "http" else "--grpc-port"
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            if port:
                # Without SO_REUSEPORT this fails whoever listens there, another Headrace included.
                with socket.socket(family, socket.SOCK_STREAM) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((host, port))
            holder = socket.socket(family, socket.SOCK_STREAM)
            self._sockets.append(holder)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.bind((host, port))
            found: int = holder.getsockname()[1]
            return found
        except socket.gaierror as error:
            raise PortError(
                f"router.{kind}.host: {host!r} is no address of this machine: {error.strerror}"
            ) from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortError(
                    f"port {port} on {host} is in use; choose another with {option} PORT (0: any free port) "
                    f"or {setting} in the configuration"
                ) from error
            if error.errno == errno.EACCES:
                raise PortError(
                    f"port {port} needs more rights than this user has; choose one above 1023"
                ) from error
            raise PortError(f"can't bind {host}:{port} (router.{kind}): {error.strerror}") from error

    def release(self) -> None:
        while self._sockets:
            self._sockets.pop().close()
