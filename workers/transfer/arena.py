"""Shared memory between a prefill and a decode worker on one host.

The arena is an anonymous file (memfd) whose descriptor goes to the peer over a unix socket: it has no name, so
nothing can be left behind, however a process dies. It is sealed against shrinking, so that a peer can't make the
other side fault, and the reader maps it read-only.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import uuid
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from workers.protocol.frames import Codec, ProtocolError, encode
from workers.protocol.messages import KvArena


def host_id() -> str:
    """Names the running kernel and network namespace: an abstract unix socket reaches from peer to peer within one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    network = Path("/proc/self/ns/net")
    try:
        return f"{boot.read_text().strip()}:{os.readlink(network)}"
    except OSError:
        return str(uuid.getnode())


class Arena:
    """The sender's side: a ring from which pieces are taken and given back in the same order."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.fd = os.memfd_create("headrace-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, num_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._map = mmap.mmap(self.fd, num_bytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._taken: deque[tuple[int, int]] = deque()  # (start, end), oldest first

    def take(self, num_bytes: int) -> int | None:
        """Offset of a free piece, None while there is no room. A piece never wraps."""
        if num_bytes > self.num_bytes:
            raise ValueError(f"{num_bytes} bytes do not fit an arena of {self.num_bytes}")
        if not self._taken:
            start = 0
        else:
            head, tail = self._taken[0][0], self._taken[-1][1]
            if tail > head:
                start = tail if tail + num_bytes <= self.num_bytes else 0
                if start == 0 and num_bytes > head:
                    return None
            else:
                start = tail
                if tail + num_bytes > head:
                    return None
        self._taken.append((start, start + num_bytes))
        return start

    def give_back(self) -> None:
        """The oldest piece is free."""
        self._taken.popleft()

    def fill(self, offset: int, views: list[memoryview]) -> None:
        for view in views:
            copy_bytes(self._address + offset, address_of(view), len(view))
            offset += len(view)

    def close(self) -> None:
        os.close(self.fd)
        # The mapping itself goes when the last view of it does; unmapping under a copy would fault.


class ArenaView:
    """The receiver's side: read-only."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        try:
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise ProtocolError("the arena could be shrunk under the reader")
            if os.fstat(fd).st_size < num_bytes:
                raise ProtocolError(f"the arena has {os.fstat(fd).st_size} bytes, {num_bytes} were announced")
            self._map = mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._view = memoryview(self._map)
        self.num_bytes = num_bytes

    def pour(self, offset: int, views: list[memoryview]) -> None:
        """Copy bytes from `offset` on into the writable `views`."""
        total = sum(len(view) for view in views)
        if offset < 0 or offset + total > self.num_bytes:
            raise ProtocolError(f"bytes {offset}..{offset + total} lie outside an arena of {self.num_bytes}")
        for view in views:
            copy_bytes(address_of(view), address_of(self._view) + offset, len(view))
            offset += len(view)


def copy_bytes(destination: int, source: int, num_bytes: int) -> None:
    """memmove between addresses; the interpreter runs other threads meanwhile."""
    ctypes.memmove(destination, source, num_bytes)


def address_of(view: memoryview) -> int:
    """Address of the first byte, of read-only buffers too."""
    return np.frombuffer(view, dtype=np.uint8).ctypes.data


def send_arena(sock: socket.socket, arena: Arena) -> None:
    frame = encode(KvArena(num_bytes=arena.num_bytes))
    sent = socket.send_fds(sock, [frame], [arena.fd])
    sock.sendall(frame[sent:])


def recv_arena(sock: socket.socket, codec: Codec[Any]) -> ArenaView:
    """The frame after the handshake of an shm channel. Reads exactly one frame and one descriptor."""
    length_bytes, fds, _, _ = socket.recv_fds(sock, 4, 1)
    if len(fds) != 1 or len(length_bytes) != 4:
        for fd in fds:
            os.close(fd)
        raise ProtocolError("expected an arena and its descriptor")
    try:
        length = int.from_bytes(length_bytes, "little")
        if length > 256:
            raise ProtocolError(f"arena frame of {length} bytes")
        body = sock.recv(length, socket.MSG_WAITALL)
        message = codec.decode(body)
        if not isinstance(message, KvArena) or not 0 < message.num_bytes <= 2**40:
            raise ProtocolError("expected an arena")
    except BaseException:
        os.close(fds[0])
        raise
    return ArenaView(fds[0], message.num_bytes)
