"""The road from a prefill worker to one decode worker: connects, frames, and carries block bytes.

One interface, `Channel`; `ShmChannel` puts the bytes into an arena both sides map, `TcpChannel` puts them on the
socket. Both are ordered, both are acknowledged frame by frame.
"""

from __future__ import annotations

import itertools
import select
import socket
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from workers.protocol.frames import (
    MAX_GREETING_BYTES,
    ProtocolError,
    answer_challenge,
    check_welcome,
    encode,
    kv_to_sender,
    recv_frame,
    send_frame,
)
from workers.protocol.messages import KvAck, KvBlocks, KvEndpoint, Ticket
from workers.transfer.arena import Arena, host_id, send_arena

_IOV_MAX = 512


class NoRoute(ConnectionError):
    """No channel that both sides allow could be opened. The message names each that was tried."""


class Channel(Protocol):
    kind: str

    def send_blocks(self, message: KvBlocks, views: Sequence[memoryview]) -> None:
        """Announce and deliver the bytes. May wait for room; raises ConnectionError or TimeoutError."""

    def send(self, message: Any) -> None:
        """A frame without bytes."""

    def poll(self, timeout_s: float) -> bool:
        """Whether something came in within the time: an acknowledgement or the end."""

    def recv_ack(self) -> KvAck:
        """The next acknowledgement. Raises ConnectionError when the peer is gone."""

    def close(self) -> None: ...


class TcpChannel:
    kind = "tcp"

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send_blocks(self, message: KvBlocks, views: Sequence[memoryview]) -> None:
        pending = deque([memoryview(encode(message)), *views])
        while pending:
            sent = self._sock.sendmsg(list(itertools.islice(pending, _IOV_MAX)))
            while sent:
                if sent < len(pending[0]):
                    pending[0] = pending[0][sent:]
                    break
                sent -= len(pending.popleft())

    def send(self, message: Any) -> None:
        send_frame(self._sock, message)

    def poll(self, timeout_s: float) -> bool:
        return _readable(self._sock, timeout_s)

    def recv_ack(self) -> KvAck:
        return _recv_ack(self._sock)

    def close(self) -> None:
        shut(self._sock)


class ShmChannel:
    kind = "shm"

    def __init__(self, sock: socket.socket, arena: Arena, timeout_s: float) -> None:
        self._sock = sock
        self._arena = arena
        self._timeout_s = timeout_s
        self._room = threading.Condition()
        self._holds_piece: deque[bool] = deque()  # for each frame that will be acknowledged
        self._closed = False

    def send_blocks(self, message: KvBlocks, views: Sequence[memoryview]) -> None:
        with self._room:
            offset = self._arena.take(message.num_bytes)
            while offset is None:
                if not self._room.wait(self._timeout_s):
                    raise TimeoutError(f"no acknowledgement for {self._timeout_s:g} s, the arena is full")
                if self._closed:
                    raise ConnectionError("the channel was closed")
                offset = self._arena.take(message.num_bytes)
            self._holds_piece.append(True)
        self._arena.fill(offset, list(views))
        send_frame(
            self._sock,
            KvBlocks(
                message.transfer_id, message.epoch, message.first, message.count, message.num_bytes, offset
            ),
        )

    def send(self, message: Any) -> None:
        if message.__struct_config__.tag == "kvt":
            with self._room:
                self._holds_piece.append(False)
        send_frame(self._sock, message)

    def poll(self, timeout_s: float) -> bool:
        return _readable(self._sock, timeout_s)

    def recv_ack(self) -> KvAck:
        ack = _recv_ack(self._sock)
        with self._room:
            if not self._holds_piece:
                raise ProtocolError("acknowledgement of nothing")
            if self._holds_piece.popleft():
                self._arena.give_back()
                self._room.notify()
        return ack

    def close(self) -> None:
        with self._room:
            if self._closed:
                return
            self._closed = True
            self._room.notify()
        shut(self._sock)
        self._arena.close()


def open_channel(
    ticket: Ticket, *, allowed: Sequence[str], secret: bytes, peer_id: str, timeout_s: float, arena_bytes: int
) -> Channel:
    """The first of `allowed` that the peer offers and that opens. Raises NoRoute, ProtocolError."""
    tried = []
    for kind in allowed:
        for endpoint in ticket.endpoints:
            if endpoint.kind != kind or (kind == "shm" and endpoint.host_id != host_id()):
                continue
            try:
                sock = _connect(endpoint, timeout_s)
            except OSError as error:
                tried.append(f"{kind} to {endpoint.address}: {error}")
                continue
            try:
                _handshake(sock, ticket, secret, peer_id)
                if kind == "tcp":
                    return TcpChannel(sock)
                arena = Arena(max(arena_bytes, 2 * ticket.layout.block_bytes))
                try:
                    send_arena(sock, arena)
                except BaseException:
                    arena.close()
                    raise
                return ShmChannel(sock, arena, timeout_s)
            except BaseException:
                sock.close()
                raise
    offered = ", ".join(e.kind for e in ticket.endpoints) or "nothing"
    raise NoRoute(
        f"no channel to {ticket.worker_id}: it offers {offered} (shm only on its own host), "
        f"transfer.channels here allows {', '.join(allowed)}"
        + (f"; tried {'; '.join(tried)}" if tried else "")
    )


def _connect(endpoint: KvEndpoint, timeout_s: float) -> socket.socket:
    if endpoint.kind == "shm":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        try:
            sock.connect("\0" + endpoint.address)
        except OSError:
            sock.close()
            raise
        return sock
    host, _, port = endpoint.address.rpartition(":")
    sock = socket.create_connection((host, int(port)), timeout=timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _handshake(sock: socket.socket, ticket: Ticket, secret: bytes, peer_id: str) -> None:
    challenge = recv_frame(sock, kv_to_sender, max_bytes=MAX_GREETING_BYTES)
    hello = answer_challenge(secret, challenge, peer_id)
    send_frame(sock, hello)
    info = check_welcome(secret, hello, recv_frame(sock, kv_to_sender, max_bytes=MAX_GREETING_BYTES))
    if (info.worker_id, info.epoch) != (ticket.worker_id, ticket.epoch):
        raise ProtocolError(
            f"{info.worker_id}:{info.epoch} answers where the ticket names {ticket.worker_id}:{ticket.epoch}"
        )


def _readable(sock: socket.socket, timeout_s: float) -> bool:
    if sock.fileno() < 0:
        raise ConnectionError("the channel was closed")
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def _recv_ack(sock: socket.socket) -> KvAck:
    message = recv_frame(sock, kv_to_sender)
    if not isinstance(message, KvAck):
        raise ProtocolError(f"{type(message).__name__} where an acknowledgement was due")
    return message


def shut(sock: socket.socket) -> None:
    """End a connection for both directions, whatever state it is in; wakes a thread that waits on it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # not connected, or the peer was first
    sock.close()
