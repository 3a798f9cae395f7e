"""tcp: the bytes of a piece follow its announcement on the connection itself. Reaches anywhere."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from workers.protocol.frames import ProtocolError, block_in_kernel, encode, recv_views, send_views
from workers.protocol.messages import Compression, KvBlocks, KvEndpoint, KvOpen
from workers.protocol.messages import Road as RoadName
from workers.transfer.block_memory import BlockMemory
from workers.transfer.road import End, Offer

_SCRATCH_BYTES = 1 << 20


class Tcp:
    name: RoadName = "tcp"
    local = False

    def lacks(self, memory: BlockMemory) -> str | None:
        return None

    def endpoint(self, memory: BlockMemory) -> dict[str, str]:
        return {}

    def bars(self, memory: BlockMemory, endpoint: KvEndpoint) -> str | None:
        return None

    def outlet(self, end: End, compression: Compression) -> TcpOutlet:
        return TcpOutlet(end, compression)

    def inlet(self, end: End, opened: KvOpen, fds: Sequence[int], sock: socket.socket) -> TcpInlet:
        block_in_kernel(sock, end.config.io_timeout_s)
        return TcpInlet(end, opened.compression, sock)


class TcpOutlet:
    def __init__(self, end: End, compression: Compression) -> None:
        self._end, self._compression = end, compression

    def offer(self) -> Offer:
        return Offer({"compression": self._compression})

    def establish(self, sock: socket.socket) -> None:
        pass

    def send(self, message: KvBlocks, blocks: Sequence[int], layers: range, sock: socket.socket) -> None:
        if sock.gettimeout() is not None:
            block_in_kernel(sock, self._end.config.io_timeout_s)
        views = self._end.memory.outgoing(blocks, layers, self._end.heads, self._compression)
        send_views(sock, [memoryview(encode(message)), *views])

    def acknowledged(self) -> None:
        pass

    def close(self) -> None:
        pass


class TcpInlet:
    def __init__(self, end: End, compression: Compression, sock: socket.socket) -> None:
        self._end, self._compression, self._sock = end, compression, sock

    def take(self, message: KvBlocks, blocks: Sequence[int], layers: range) -> None:
        expected = self._end.num_bytes(len(blocks), layers, self._compression)
        if message.num_bytes != expected:
            raise ProtocolError(
                f"{len(blocks)} blocks of {len(layers)} layers have {expected} bytes, {message.num_bytes} were announced"
            )
        with self._end.memory.incoming(blocks, layers, self._end.heads, self._compression) as views:
            recv_views(self._sock, views)

    def skip(self, message: KvBlocks) -> None:
        """Read into scratch and dropped."""
        left = message.num_bytes
        if left < 0:
            raise ProtocolError(f"a piece of {left} bytes was announced")
        scratch = memoryview(bytearray(min(left, _SCRATCH_BYTES)))
        while left > 0:
            piece = scratch[: min(left, len(scratch))]
            recv_views(self._sock, [piece])
            left -= len(piece)

    def close(self) -> None:
        pass
