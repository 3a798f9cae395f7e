"""A channel: one connection to one rank of a receiver, and the road that the bytes take beside it.

Ordered, and acknowledged piece by piece. Opening one tries the roads that both sides have, best first.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from workers.config import TransferConfig
from workers.protocol.frames import (
    MAX_GREETING_BYTES,
    ProtocolError,
    greet,
    kv_to_sender,
    recv_frame,
    send_frame,
    send_frame_with_fds,
)
from workers.protocol.messages import (
    Compression,
    KvAck,
    KvBlocks,
    KvEndpoint,
    KvLayout,
    KvOpen,
    KvReady,
    PrefixHolder,
    Ticket,
)
from workers.protocol.messages import Road as RoadName
from workers.transfer.block_memory import BlockMemory
from workers.transfer.road import End, Outlet, RoadBlocked, RoadKind
from workers.transfer.roads import choices
from workers.transfer.shards import Part

Address = Ticket | PrefixHolder  # whoever blocks can be sent to


class NoRoute(ConnectionError):
    """No channel that both sides allow could be opened. The message names each that was tried."""


class Incompatible(ConnectionError):
    """The receiver wants nothing of this sender, whichever road it takes."""


class Channel:
    def __init__(
        self, sock: socket.socket, road: RoadName, outlet: Outlet, end: End, compression: Compression
    ) -> None:
        self.road = road
        self._sock, self._outlet, self._end, self._compression = sock, outlet, end, compression
        self._lock = threading.Lock()
        self._holds_piece: deque[bool] = deque()  # for each message that will be acknowledged

    def num_bytes(self, num_blocks: int, layers: range) -> int:
        return self._end.num_bytes(num_blocks, layers, self._compression)

    def send_blocks(
        self, transfer_id: str, epoch: int, first: int, blocks: Sequence[int], layers: range
    ) -> int:
        """Announce and deliver a piece; its bytes. May wait for room; raises OSError, TimeoutError."""
        message = KvBlocks(
            transfer_id,
            epoch,
            first,
            len(blocks),
            self.num_bytes(len(blocks), layers),
            first_layer=layers.start,
            num_layers=len(layers),
        )
        with self._lock:
            self._holds_piece.append(True)
        self._outlet.send(message, blocks, layers, self._sock)
        return message.num_bytes

    def send(self, message: Any, *, acknowledged: bool) -> None:
        """A frame without bytes. `acknowledged`: whether there will be an answer."""
        if acknowledged:
            with self._lock:
                self._holds_piece.append(False)
        send_frame(self._sock, message)

    def poll(self, timeout_s: float) -> bool:
        """Whether something came in within the time: an acknowledgement or the end."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def recv_ack(self) -> KvAck:
        """The next acknowledgement. Raises ConnectionError when the peer is gone."""
        message = recv_frame(self._sock, kv_to_sender)
        if not isinstance(message, KvAck):
            raise ProtocolError(f"{type(message).__name__} where an acknowledgement was due")
        with self._lock:
            if not self._holds_piece:
                raise ProtocolError("acknowledgement of nothing")
            held = self._holds_piece.popleft()
        if held:
            self._outlet.acknowledged()
        return message

    def close(self) -> None:
        """Nothing that is not acknowledged counts any more, on either side. Wakes who waits here. Idempotent."""
        self._outlet.close()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """After `close`, when nobody uses the channel any more: its descriptor may be somebody else's from here on."""
        self._sock.close()


def open_channel(
    address: Address,
    part: Part,
    ranks: int,
    memory: BlockMemory,
    layout: KvLayout,
    config: TransferConfig,
    allowed: Sequence[RoadName],
    *,
    secret: bytes,
    peer_id: str,
) -> tuple[Channel, list[str]]:
    """The best road for a part, and why better ones were passed over.

    `ranks`: of the sender; `memory`: of the rank that `part` names; `allowed`: roads, best first. Raises NoRoute, Incompatible, ProtocolError.
    """
    endpoints = [endpoint for endpoint in address.endpoints if endpoint.rank == part.destination]
    ways, passed_over = choices(allowed, memory, endpoints, address.worker_id)
    end = End(memory, layout, part.heads, part.source_heads(ranks, layout.num_kv_heads), config)
    compression = "none" if layout.quantized else config.compression
    for road, endpoint in ways:
        try:
            return _open(road, endpoint, address, part, ranks, end, compression, secret, peer_id), passed_over
        except (Incompatible, ProtocolError):
            raise
        except (RoadBlocked, OSError) as error:
            passed_over.append(f"{road.name} to {endpoint.address}: {error}")
    offered = ", ".join(sorted({e.kind for e in endpoints})) or "nothing"
    raise NoRoute(
        f"no channel to {address.worker_id}: it offers {offered}, transfer.channels here allows "
        f"{', '.join(allowed)}; {'; '.join(passed_over)}"
    )


def _open(
    road: RoadKind,
    endpoint: KvEndpoint,
    address: Address,
    part: Part,
    ranks: int,
    end: End,
    compression: Compression,
    secret: bytes,
    peer_id: str,
) -> Channel:
    timeout_s = end.config.io_timeout_s
    sock = _connect(road, endpoint, timeout_s)
    outlet = None
    try:
        _handshake(sock, address, secret, peer_id)
        outlet = road.outlet(end, compression)
        offer = outlet.offer()
        opened = KvOpen(road=road.name, layout=end.layout, rank=part.source, ranks=ranks, **offer.fields)
        send_frame_with_fds(sock, opened, offer.fds)
        outlet.establish(sock)
        ready = recv_frame(sock, kv_to_sender, max_bytes=MAX_GREETING_BYTES)
        if not isinstance(ready, KvReady):
            raise ProtocolError(f"{type(ready).__name__} where the answer to KvOpen was due")
        if not ready.ok:
            raise (Incompatible if ready.final else RoadBlocked)(ready.reason)
    except BaseException:
        if outlet is not None:
            outlet.close()
        sock.close()
        raise
    return Channel(sock, road.name, outlet, end, opened.compression)


def _connect(road: RoadKind, endpoint: KvEndpoint, timeout_s: float) -> socket.socket:
    if road.local:
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


def _handshake(sock: socket.socket, address: Address, secret: bytes, peer_id: str) -> None:
    info = greet(sock, secret, peer_id, kv_to_sender)
    if (info.worker_id, info.epoch) != (address.worker_id, address.epoch):
        raise ProtocolError(
            f"{info.worker_id}:{info.epoch} answers where the ticket names {address.worker_id}:{address.epoch}"
        )


def shut(sock: socket.socket) -> None:
    """End a connection for both directions, whatever state it is in; wakes a thread that waits on it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # not connected, or the peer was first
    sock.close()
