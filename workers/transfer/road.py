"""What every road is made of: an `Outlet` at the sender, an `Inlet` at the receiver.

Beside each of them runs one connection, on which the sender announces pieces and the receiver acknowledges them, in
order. A road decides how the bytes of a piece get across. One connection, with its outlet and inlet, serves one `Part`:
the KV heads that one rank of the sender has for one rank of the receiver.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from workers.config import TransferConfig
from workers.protocol.frames import encode
from workers.protocol.messages import Compression, KvBlocks, KvEndpoint, KvLayout, KvOpen
from workers.protocol.messages import Road as RoadName
from workers.transfer.block_memory import BlockMemory


class RoadBlocked(Exception):
    """This road can't be taken between these two, for the reason said; another one might."""


@dataclass(frozen=True, slots=True)
class End:
    """One side of a connection: a rank's cache, and the heads of it that the other side has too."""

    memory: BlockMemory
    layout: KvLayout  # of the whole model
    model_heads: range  # those heads, counted in the model
    heads: range  # and counted in `memory`
    config: TransferConfig

    def num_bytes(self, num_blocks: int, layers: range, compression: Compression) -> int:
        """On the wire."""
        return self.layout.wire_bytes(num_blocks, len(layers), len(self.heads), compression)


@dataclass(slots=True)
class Offer:
    """What an outlet puts into `KvOpen`, and the descriptors beside it."""

    fields: dict[str, Any] = field(default_factory=dict)
    fds: tuple[int, ...] = ()


class Outlet(Protocol):
    def offer(self) -> Offer:
        """Called once, before `KvOpen`. Raises RoadBlocked."""

    def establish(self, sock: socket.socket) -> None:
        """Called once, after `KvOpen` was sent and before its answer is read. Returns when an answer is there to be read,
        whatever it may be. Raises RoadBlocked."""

    def send(self, message: KvBlocks, blocks: Sequence[int], layers: range, sock: socket.socket) -> None:
        """Announce a piece and see its bytes on their way. May wait for room.

        `num_bytes` of the message is set, `source` and `offset` are the outlet's to set. Raises OSError, TimeoutError
        among them: the connection is of no use any more.
        """

    def acknowledged(self) -> None:
        """The oldest piece that was sent is no longer read."""

    def close(self) -> None:
        """No piece that was announced and not acknowledged may count on our side any more. Idempotent, never waits
        long; may be called while another thread is in `send`."""


class Inlet(Protocol):
    def take(self, message: KvBlocks, blocks: Sequence[int], layers: range) -> None:
        """Bring a piece into these blocks of the cache. Raises OSError, ProtocolError: the connection is of no use."""

    def skip(self, message: KvBlocks) -> None:
        """The piece is not wanted; stay in step."""

    def close(self) -> None: ...


class RoadKind(Protocol):
    name: RoadName
    local: bool  # within a host: its connections are abstract unix sockets, over which descriptors travel

    def lacks(self, memory: BlockMemory) -> str | None:
        """Why a worker with this cache can't use the road at all; None when it can."""

    def endpoint(self, memory: BlockMemory) -> dict[str, str]:
        """What the receiver says of itself: `host_id`, `device`."""

    def bars(self, memory: BlockMemory, endpoint: KvEndpoint) -> str | None:
        """Why a sender with this cache can't reach that endpoint; None when it may try."""

    def outlet(self, end: End, compression: Compression) -> Outlet: ...

    def inlet(self, end: End, opened: KvOpen, fds: Sequence[int], sock: socket.socket) -> Inlet:
        """Takes the descriptors over. Raises RoadBlocked."""


def announce(sock: socket.socket, message: KvBlocks) -> None:
    sock.sendall(encode(message))
