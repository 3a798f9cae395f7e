from __future__ import annotations

import ctypes
import fcntl
import gc
import mmap
import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from workers.shared_memory import MappedPages, PagesError, SharedPages


def memfds() -> list[str]:
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found += [entry.name] if "memfd:headrace-kv" in os.readlink(entry) else []
        except FileNotFoundError:
            pass
    return found


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:headrace-kv")


def test_a_peer_reads_what_is_written_later_too() -> None:
    pages = SharedPages(10_000)
    peer = MappedPages(os.dup(pages.fd), 10_000)
    pages.array[:] = 3
    assert peer.array[9_999] == 3
    pages.array[1234] = 4
    assert peer.array[1234] == 4
    assert ctypes.c_uint8.from_address(peer.address + 1234).value == 4
    assert pages.address % mmap.PAGESIZE == 0


def test_what_a_peer_is_given_cannot_write() -> None:
    pages = SharedPages(8192)
    with pytest.raises(OSError):
        os.write(pages.fd, b"x")
    with pytest.raises(PermissionError):
        mmap.mmap(pages.fd, 8192)
    assert fcntl.fcntl(pages.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    peer = MappedPages(os.dup(pages.fd), 8192)
    with pytest.raises(ValueError, match="read-only"):
        peer.array[0] = 1


def test_nobody_can_change_its_size() -> None:
    pages = SharedPages(8192)
    writable = os.open(f"/proc/self/fd/{pages.fd}", os.O_RDWR)
    for size in (0, 4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(writable, size)
    os.close(writable)


def test_memory_that_could_shrink_is_refused() -> None:
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 8192)
    with pytest.raises(PagesError, match="shrunk under the reader"):
        MappedPages(unsealed, 8192)
    with pytest.raises(OSError):
        os.fstat(unsealed)  # closed, though it was refused


def test_what_is_no_memory_is_refused(tmp_path: Path) -> None:
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 8192)
    ours, theirs = socket.socketpair()
    for fd in (file, ours.detach()):
        with pytest.raises(PagesError):
            MappedPages(fd, 8192)
        with pytest.raises(OSError):
            os.fstat(fd)
    theirs.close()


@pytest.mark.parametrize("announced", [0, -1, 8193, 2**63])
def test_less_memory_than_announced_is_refused(announced: int) -> None:
    pages = SharedPages(8192)
    with pytest.raises(PagesError, match=f"the memory has 8192 bytes, {announced} were announced"):
        MappedPages(os.dup(pages.fd), announced)


def test_nothing_is_left_behind() -> None:
    gc.collect()
    fds, maps = len(memfds()), mapped()
    pages = SharedPages(1 << 20)
    given = os.dup(pages.fd)
    peer = MappedPages(given, 1 << 20)
    with pytest.raises(OSError):
        os.fstat(given)  # the peer's to close
    view = pages.array[:100]
    pages.close()
    pages.close()
    view[:] = 7
    assert peer.array[99] == 7, "a mapping lives as long as its views"
    del pages, peer, view
    assert len(memfds()) == fds
    assert mapped() == maps


def _child(fd: int, answer: int) -> None:
    peer = MappedPages(fd, 1 << 16)
    os.write(answer, b"%d" % int(peer.array.sum()))


def test_another_process_reads_it() -> None:
    pages = SharedPages(1 << 16)
    pages.array[:] = np.arange(1 << 16) % 251
    reader, writer = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(os.dup(pages.fd), writer))
    child.start()
    child.join(20)
    os.close(writer)
    assert int(os.read(reader, 100)) == int(pages.array.sum())
    os.close(reader)
