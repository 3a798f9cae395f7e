"""A connection between two ranks, both of which have proved that they hold the cluster's secret."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterable
from typing import Any

from workers.experts.messages import between_ranks
from workers.protocol.frames import (
    MAX_GREETING_BYTES,
    ProtocolError,
    encode,
    greet,
    judge_hello,
    new_challenge,
    recv_frame,
    send_frame,
)
from workers.protocol.messages import Refused, WorkerInfo


class Link:
    """`send` from any thread, `receive` from one."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """Raises OSError, after which nothing more can be sent."""
        frame = encode(message)
        with self._sending:
            self.sock.sendall(frame)

    def receive(self) -> Any:
        """Raises OSError (TimeoutError when nothing came in the socket's time), ProtocolError."""
        return recv_frame(self.sock, between_ranks)

    def close(self) -> None:
        """Wakes who waits here. Idempotent."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def tell(links: Iterable[Link], message: Any) -> None:
    """Those that are still there; whoever reads a connection sees its end."""
    for link in links:
        with contextlib.suppress(OSError):
            link.send(message)


def call(address: str, secret: bytes, peer_id: str, timeout_s: float) -> Link:
    """Connect to another rank. Raises OSError, ProtocolError."""
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host, int(port)), timeout_s)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        greet(sock, secret, peer_id, between_ranks)
    except BaseException:
        sock.close()
        raise
    return Link(sock)


def answer(sock: socket.socket, secret: bytes, info: WorkerInfo, timeout_s: float) -> Link:
    """The called side. Raises OSError, ProtocolError; the socket is the caller's to close then."""
    sock.settimeout(timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    challenge = new_challenge()
    send_frame(sock, challenge)
    hello = recv_frame(sock, between_ranks, max_bytes=MAX_GREETING_BYTES)
    verdict = judge_hello(secret, challenge, hello, info)
    send_frame(sock, verdict)
    if isinstance(verdict, Refused):
        raise ProtocolError(verdict.reason)
    return Link(sock)
