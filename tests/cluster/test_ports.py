from __future__ import annotations

import socket
from typing import Any

import pytest

from cluster.ports import HeldPorts, PortError
from router.config import RouterConfig


def config(http: int = 0, grpc: int = 0, **grpc_settings: Any) -> RouterConfig:
    return RouterConfig.model_validate({"http": {"port": http}, "grpc": {"port": grpc, **grpc_settings}})


def listener(port: int, reuse_port: bool) -> socket.socket:
    made = socket.socket()
    if reuse_port:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(("127.0.0.1", port))
    made.listen()
    return made


def test_zero_is_any_free_port() -> None:
    held = HeldPorts(config())
    try:
        assert held.config.http.port > 0
        assert held.config.grpc.port > 0
        assert held.config.http.port != held.config.grpc.port
    finally:
        held.release()


def test_routers_can_listen_on_a_held_port_and_others_can_not() -> None:
    held = HeldPorts(config(grpc=0, enabled=False))
    port = held.config.http.port
    try:
        with pytest.raises(OSError, match="in use"):
            listener(port, reuse_port=False)
        with listener(port, reuse_port=True), listener(port, reuse_port=True):
            # The holder never listens, so every connection reaches a router.
            for _ in range(20):
                socket.create_connection(("127.0.0.1", port), timeout=2).close()
    finally:
        held.release()
    with listener(port, reuse_port=False) as again:
        assert again.getsockname()[1] == port


@pytest.mark.parametrize("reuse_port", [False, True])
def test_a_port_in_use_is_named_with_the_way_out(reuse_port: bool) -> None:
    with listener(0, reuse_port) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            PortError, match=rf"port {port} on 127.0.0.1 is in use; choose another with --port PORT"
        ):
            HeldPorts(config(http=port))
        with pytest.raises(PortError, match=r"--grpc-port PORT .* or router.grpc.port in the configuration"):
            HeldPorts(config(grpc=port))


def test_after_a_failure_nothing_is_held() -> None:
    with listener(0, False) as taken, listener(0, False) as closed:
        http = closed.getsockname()[1]
        closed.close()
        with pytest.raises(PortError):
            HeldPorts(config(http=http, grpc=taken.getsockname()[1]))
        with listener(http, False) as again:
            assert again.getsockname()[1] == http


def test_a_host_that_is_not_ours() -> None:
    strange = RouterConfig.model_validate({"http": {"host": "192.0.2.77"}})
    with pytest.raises(PortError, match=r"can't bind 192[.]0[.]2[.]77:8000"):
        HeldPorts(strange)
