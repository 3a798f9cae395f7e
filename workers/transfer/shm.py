"""shm: the receiver copies pieces out of memory of the sender that it maps. Within a host, and one copy in all.

A cache in shared memory is its own window: a piece is announced by its block ids, and the receiver copies just the heads
it wants, however the sender lays them out. The sender's references keep the blocks as they are until the piece is
acknowledged; when it gives the connection up earlier, it first takes back its word (alive.py).

A cache on a device is gathered into a ring instead, which is the window then.
"""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from kernels.cache_view import CacheView
from workers.protocol.frames import ProtocolError
from workers.protocol.messages import Compression, KvBlocks, KvEndpoint, KvOpen, KvWindow
from workers.protocol.messages import Road as RoadName
from workers.shared_memory import MappedPages, PagesError, SharedPages
from workers.transfer.alive import AliveWord, SeenWord
from workers.transfer.block_memory import BlockMemory, canonical_view
from workers.transfer.ring import Ring
from workers.transfer.road import End, Offer, RoadBlocked, announce
from workers.transfer.window import check_source, source_view, window_of


def host_id() -> str:
    """Names the running kernel and network namespace: an abstract unix socket reaches from peer to peer within one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    network = Path("/proc/self/ns/net")
    try:
        return f"{boot.read_text().strip()}:{os.readlink(network)}"
    except OSError:
        return str(uuid.getnode())


class Shm:
    name: RoadName = "shm"
    local = True

    def lacks(self, memory: BlockMemory) -> str | None:
        return None if hasattr(os, "memfd_create") else "this system has no memfd"

    def endpoint(self, memory: BlockMemory) -> dict[str, str]:
        return {"host_id": host_id()}

    def bars(self, memory: BlockMemory, endpoint: KvEndpoint) -> str | None:
        return (
            None
            if endpoint.host_id == host_id()
            else "it is on another host (or in another network namespace)"
        )

    def outlet(self, end: End, compression: Compression) -> CacheOutlet | RingOutlet:
        if end.memory.shared is not None:
            return CacheOutlet(*end.memory.shared)
        return RingOutlet(end)

    def inlet(
        self, end: End, opened: KvOpen, fds: Sequence[int], sock: socket.socket
    ) -> CacheInlet | RingInlet:
        window = opened.window
        given = list(fds)
        try:
            if window is None or not 0 < window.num_bytes <= 2**46:
                raise RoadBlocked("no window came with it")
            wanted = 2 if window.strides else 1
            if len(given) != wanted:
                raise RoadBlocked(f"{len(given)} descriptors came with it, {wanted} are needed")
            pages = MappedPages(given.pop(0), window.num_bytes)
            if not window.strides:
                return RingInlet(end, pages)
            return CacheInlet(end, opened, pages, SeenWord(given.pop(0)))
        except (PagesError, ValueError, OSError) as error:
            raise RoadBlocked(f"its memory can't be mapped: {error}") from error
        finally:
            for fd in given:
                os.close(fd)


# --- a cache that is shared memory -----------------------------------------------------------------------------------


class CacheOutlet:
    def __init__(self, pages: SharedPages, view: CacheView) -> None:
        self._pages, self._view = pages, view
        self._alive = AliveWord()

    def offer(self) -> Offer:
        window = window_of(self._view, self._pages.address, self._pages.num_bytes)
        return Offer({"window": window}, (self._pages.fd, self._alive.fd))

    def establish(self, sock: socket.socket) -> None:
        pass

    def send(self, message: KvBlocks, blocks: Sequence[int], layers: range, sock: socket.socket) -> None:
        announce(sock, msgspec.structs.replace(message, source=list(blocks)))

    def acknowledged(self) -> None:
        pass

    def close(self) -> None:
        self._alive.take_back()


class CacheInlet:
    def __init__(self, end: End, opened: KvOpen, pages: MappedPages, alive: SeenWord) -> None:
        """Raises ValueError when the window does not hold what it says."""
        self._end, self._pages, self._alive = end, pages, alive
        self._source = source_view(end, opened, pages.address, pages.num_bytes)

    def take(self, message: KvBlocks, blocks: Sequence[int], layers: range) -> None:
        check_source(message, self._source, len(blocks))
        self._end.memory.pull(
            blocks, self._source.cut(layers=layers), message.source, layers, self._end.heads
        )
        self._alive.check()

    def skip(self, message: KvBlocks) -> None:
        pass

    def close(self) -> None:
        pass


# --- a cache that is somewhere else ----------------------------------------------------------------------------------


class RingOutlet:
    def __init__(self, end: End) -> None:
        self._end = end
        # A single block must fit whatever was configured.
        least = 2 * end.num_bytes(1, range(end.layout.num_layers), "none")
        self._pages = SharedPages(max(int(end.config.ring_memory), least))
        self._ring = Ring(self._pages.num_bytes)
        self._room = threading.Condition()
        self._closed = False

    def offer(self) -> Offer:
        return Offer({"window": KvWindow(num_bytes=self._pages.num_bytes)}, (self._pages.fd,))

    def establish(self, sock: socket.socket) -> None:
        pass

    def send(self, message: KvBlocks, blocks: Sequence[int], layers: range, sock: socket.socket) -> None:
        views = self._end.memory.outgoing(blocks, layers, self._end.heads)
        timeout_s = self._end.config.io_timeout_s
        with self._room:
            offset = self._ring.take(message.num_bytes)
            while offset is None:
                if not self._room.wait(timeout_s):
                    raise TimeoutError(f"no acknowledgement for {timeout_s:g} s, the ring is full")
                if self._closed:
                    raise ConnectionError("the channel was closed")
                offset = self._ring.take(message.num_bytes)
        end = offset
        for view in views:
            np.copyto(self._pages.array[end : end + len(view)], np.frombuffer(view, np.uint8))
            end += len(view)
        announce(sock, msgspec.structs.replace(message, offset=offset))

    def acknowledged(self) -> None:
        with self._room:
            self._ring.give_back()
            self._room.notify()

    def close(self) -> None:
        with self._room:
            if self._closed:
                return
            self._closed = True
            self._room.notify()
        self._pages.close()


class RingInlet:
    def __init__(self, end: End, pages: MappedPages) -> None:
        self._end, self._pages = end, pages

    def take(self, message: KvBlocks, blocks: Sequence[int], layers: range) -> None:
        expected = self._end.num_bytes(len(blocks), layers, "none")
        if message.offset < 0 or message.offset + expected > self._pages.num_bytes:
            raise ProtocolError(
                f"bytes {message.offset}..{message.offset + expected} lie outside a ring of {self._pages.num_bytes}"
            )
        source = canonical_view(
            self._end.layout,
            self._pages.address + message.offset,
            len(blocks),
            len(self._end.heads),
            len(layers),
        )
        self._end.memory.pull(blocks, source, range(len(blocks)), layers, self._end.heads)

    def skip(self, message: KvBlocks) -> None:
        pass

    def close(self) -> None:
        pass
