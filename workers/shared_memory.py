"""Memory that other processes of the host can map, given its descriptor.

An anonymous file (memfd) has no name, so nothing is left behind however a process dies. It is sealed, so that no peer
can shrink it and make the others fault, and peers are given a descriptor that only reads.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np
import torch
from numpy.typing import NDArray


class SharedPages:
    """Zeros; pages take memory when they are first touched."""

    def __init__(self, num_bytes: int) -> None:
        writable = os.memfd_create("headrace-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(writable, num_bytes)
            fcntl.fcntl(writable, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._hold(writable, num_bytes)
        finally:
            os.close(writable)

    @classmethod
    def lent(cls, writable: int, num_bytes: int) -> SharedPages:
        """Those of another process of this worker, by its `writable_fd`, which is taken over. Raises PagesError, OSError."""
        try:
            check_pages(writable, num_bytes)
            pages = cls.__new__(cls)
            pages._hold(writable, num_bytes)
        finally:
            os.close(writable)
        return pages

    def _hold(self, writable: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._map = mmap.mmap(writable, num_bytes)
        self.fd = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)  # for peers
        self.array: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    def writable_fd(self) -> int:
        """For another process of this worker; the caller's to close. Raises OSError."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)

    @property
    def address(self) -> int:
        return int(self.array.ctypes.data)

    @property
    def tensor(self) -> torch.Tensor:
        """uint8 [num_bytes]"""
        return torch.from_numpy(self.array)

    def close(self) -> None:
        """No more peers. The mapping itself goes when the last view of it does; unmapping under a copy would fault."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            self.close()


class PagesError(Exception):
    """What a peer has given is not memory that can be relied on."""


def check_pages(fd: int, num_bytes: int) -> None:
    """Raises PagesError unless `num_bytes` of the memory behind a descriptor can be mapped, and stay."""
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:
        sealed = 0
    if not sealed:
        raise PagesError("the memory could be shrunk under the reader")
    size = os.fstat(fd).st_size
    if not 0 < num_bytes <= size:
        raise PagesError(f"the memory has {size} bytes, {num_bytes} were announced")


class MappedPages:
    """A peer's pages, read-only. Takes the descriptor over, and closes it."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        try:
            check_pages(fd, num_bytes)
            self._map = mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self.num_bytes = num_bytes
        self.array: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    @property
    def address(self) -> int:
        return int(self.array.ctypes.data)
