"""The last tier: blocks in files of a directory, which survives the worker.

One thread does all writing; first it looks through what an earlier life has left, so that a large directory delays
nobody's start. Its queue is as long as the host tier lends it slots. Reading happens on the threads of whoever reads.

Nothing here is ever needed: a file that is not what was written is removed and counted, and when the disk is full or
refuses to work the tier says so once, and is off until the worker starts again.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers.protocol.tiers import DISK
from workers.tiers.block_bytes import BlockBytes, Parts
from workers.tiers.block_file import (
    HEADER_BYTES,
    SUFFIX,
    TEMPORARY,
    Corrupt,
    Header,
    file_name,
    read_block,
    read_header,
    write_block,
)
from workers.tiers.chain_lru import ChainLru
from workers.tiers.changes import Changes
from workers.tiers.stats import TierStats

logger = logging.getLogger(__name__)

_LOCK_NAME = "lock"
_OURS = re.compile(rf"([0-9a-f]{{32}})({re.escape(SUFFIX)}|{re.escape(TEMPORARY)})")
_LOCK_WAIT_S = 3.0  # an earlier life of the worker may be about to end
_CLOSE_S = 5.0


class DirectoryInUse(ValueError):
    """Another living process has the directory."""


@dataclass(frozen=True, slots=True)
class _Write:
    block_hash: bytes
    parent: bytes
    row: NDArray[np.uint8]
    done: Callable[[], None]


class DiskTier:
    """A PrefixSource. Thread-safe; calls nobody while it holds its lock."""

    name = DISK

    def __init__(
        self, directory: Path, capacity_bytes: int, block_bytes: BlockBytes, root: bytes, max_queue: int = 256
    ) -> None:
        """Raises DirectoryInUse; ValueError when not a single block fits. Any other trouble switches it off."""
        size = HEADER_BYTES + block_bytes.block_bytes
        self._max_files = capacity_bytes // size
        if self._max_files == 0:
            raise ValueError(
                f"engine.disk_cache_memory is {capacity_bytes} bytes, one KV block of this model takes {size}"
            )
        self.directory = directory
        self._bytes = block_bytes
        self._root = root
        self._max_queue = max_queue
        self._changed = threading.Condition()
        self._lru = ChainLru()
        self._changes = Changes()
        self._queue: deque[_Write] = deque()
        self._queued: set[bytes] = set()
        self._stats = TierStats(capacity_blocks=self._max_files)
        self._closing = False
        self._looked_through = False
        self._lock_file: int | None = None
        self._thread = threading.Thread(target=self._run, name="kv-disk", daemon=True)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_file = _lock(directory)
        except OSError as error:
            self._switch_off(error)
        else:
            self._thread.start()

    @property
    def active(self) -> bool:
        return self._stats.active

    def close(self) -> None:
        """What waits to be written is dropped. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_S)
        self._drop_queue()
        if self._lock_file is not None and not self._thread.is_alive():
            os.close(self._lock_file)
            self._lock_file = None

    # --- what comes from the host -------------------------------------------------------------------------------------

    def touch(self, block_hash: bytes) -> bool:
        """Whether the block is here; it counts as used then."""
        with self._changed:
            self._lru.touch(block_hash)
            return block_hash in self._lru

    def offer(
        self, block_hash: bytes, parent: bytes, row: NDArray[np.uint8], done: Callable[[], None]
    ) -> bool:
        """Never blocks. False: not taken. True: `done` is called once, on another thread, when the row was read."""
        with self._changed:
            if self._closing or not self._stats.active or block_hash in self._queued:
                return False
            if len(self._queue) >= self._max_queue:
                return False
            self._queue.append(_Write(block_hash, parent, row, done))
            self._queued.add(block_hash)
            self._changed.notify_all()
            return True

    def finish_queue(self, deadline: float) -> None:
        """Wait until what was offered is written, or until then (monotonic seconds)."""
        with self._changed:
            self._changed.wait_for(
                lambda: (self._looked_through and not self._queued) or not self._stats.active,
                max(deadline - time.monotonic(), 0),
            )

    def write_now(self, block_hash: bytes, parent: bytes, parts: Parts) -> bool:
        """In this thread, while nobody offers anything. False: it is there already, or the tier is off."""
        if not self.active or self.touch(block_hash):
            return False
        try:
            self._write(block_hash, parent, parts)
        except OSError as error:
            self._switch_off(error)
        return self.active

    def dropped(self) -> None:
        """A block was not offered, because the writer is behind."""
        self._stats.dropped_blocks += 1

    # --- what goes back to the device ---------------------------------------------------------------------------------

    def count(self, hashes: Sequence[bytes]) -> int:
        with self._changed:
            found = 0
            while found < len(hashes) and hashes[found] in self._lru:
                found += 1
            for block_hash in reversed(hashes[:found]):
                self._lru.touch(block_hash)
            return found

    def read(self, hashes: Sequence[bytes], blocks: Sequence[int], go_on: Callable[[], bool]) -> int:
        good = 0
        with self._bytes.incoming(blocks) as rows:
            for block_hash, parts in zip(hashes, rows, strict=True):
                if not go_on() or not self._read_one(block_hash, parts):
                    break
                good += 1
        for block_hash in reversed(hashes[:good]):  # a later life sees by the times what was used last
            with contextlib.suppress(OSError):
                os.utime(self.directory / file_name(block_hash))
        return good

    def _read_one(self, block_hash: bytes, parts: Parts) -> bool:
        try:
            read_block(self.directory, self._header(block_hash, b""), parts)
        except FileNotFoundError:  # evicted just now, or removed by somebody; or even written again since
            with self._changed:
                if not (self.directory / file_name(block_hash)).exists():
                    self._forget(block_hash)
        except Corrupt as error:
            logger.warning("a cached block is spoilt, it will be computed anew: %s", error)
            with self._changed:
                self._stats.errors += 1
                self._forget(block_hash)
            with contextlib.suppress(OSError):
                self._unlink(block_hash)
        except OSError as error:
            self._switch_off(error)
        else:
            return True
        return False

    def _forget(self, block_hash: bytes) -> None:
        if block_hash in self._lru:
            self._lru.remove(block_hash)
            self._changes.removed(block_hash)

    # --- the writing thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._look_through()
        except OSError as error:
            self._switch_off(error)
        while (write := self._next()) is not None:
            try:
                if not self.touch(write.block_hash):
                    self._write(write.block_hash, write.parent, [write.row.data])
            except OSError as error:
                self._switch_off(error)
            finally:
                with self._changed:
                    self._queued.discard(write.block_hash)
                    self._changed.notify_all()
                write.done()

    def _next(self) -> _Write | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing or not self._stats.active)
            return None if self._closing or not self._stats.active else self._queue.popleft()

    def _write(self, block_hash: bytes, parent: bytes, parts: Parts) -> None:
        self._make_room(self._max_files - 1)
        write_block(self.directory, self._header(block_hash, parent), parts)
        with self._changed:
            if self._stats.active:
                self._lru.add(block_hash, parent)
                self._changes.stored(block_hash, parent)
                self._stats.stored_blocks += 1

    def _make_room(self, max_files: int) -> None:
        while True:
            with self._changed:
                victim = self._lru.next_out() if len(self._lru) > max_files else None
                if victim is None:
                    return
                self._lru.remove(victim)
                self._changes.removed(victim)
            self._unlink(victim)

    def _header(self, block_hash: bytes, parent: bytes) -> Header:
        return Header(self._root, block_hash, parent, self._bytes.num_pieces, self._bytes.block_bytes)

    def _unlink(self, block_hash: bytes) -> None:
        (self.directory / file_name(block_hash)).unlink(missing_ok=True)

    def _look_through(self) -> None:
        """Take in what an earlier life has left.

        Files that a crash has left unfinished or spoilt are removed. So are those of another model or KV format: this
        directory is one worker's, and what is not counted would not be bounded. Files with other names are not ours.
        """
        began = time.monotonic()
        found: list[tuple[int, bytes, bytes]] = []
        spoilt = foreign = 0
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if self._closing:
                    return
                ours = _OURS.fullmatch(entry.name)
                if ours is None:
                    continue
                path = Path(entry.path)
                if ours[2] == TEMPORARY:
                    path.unlink(missing_ok=True)
                    continue
                try:
                    header = read_header(path)
                except Corrupt:
                    spoilt += 1
                    path.unlink(missing_ok=True)
                    continue
                if replace(header, checksum=0) != self._header(bytes.fromhex(ours[1]), header.parent):
                    foreign += 1
                    path.unlink(missing_ok=True)
                    continue
                found.append((entry.stat().st_mtime_ns, header.block_hash, header.parent))
        found.sort()
        with self._changed:
            self._stats.errors += spoilt
            for _, block_hash, parent in found:
                self._lru.add(block_hash, parent)
                self._changes.stored(block_hash, parent)
        self._make_room(self._max_files)
        with self._changed:
            self._looked_through = True
            self._changed.notify_all()
        logger.info(
            "%s: %d blocks of an earlier life in %.1f s, %d spoilt and %d of another model or format removed",
            self.directory,
            len(found),
            time.monotonic() - began,
            spoilt,
            foreign,
        )

    # --- the end ------------------------------------------------------------------------------------------------------

    def _switch_off(self, error: OSError) -> None:
        with self._changed:
            if not self._stats.active:
                return
            self._stats.active = False
            self._stats.errors += 1
            for block_hash, _ in self._lru.items():
                self._changes.removed(block_hash)
            self._lru = ChainLru()
            self._changed.notify_all()
        logger.error("the disk cache in %s is off from here on: %s", self.directory, error)
        self._drop_queue()

    def _drop_queue(self) -> None:
        with self._changed:
            writes, self._queue = list(self._queue), deque()
            self._queued.difference_update(write.block_hash for write in writes)
        for write in writes:
            write.done()

    # --- what it tells ------------------------------------------------------------------------------------------------

    def held(self) -> list[tuple[bytes, bytes]]:
        """(hash, parent) of everything."""
        with self._changed:
            return self._lru.items()

    def drain(self) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
        with self._changed:
            return self._changes.drain()

    def stats(self) -> TierStats:
        with self._changed:
            return replace(self._stats, blocks=len(self._lru))


def _lock(directory: Path) -> int:
    """Held by the descriptor: the system gives it up when the process is gone, however it went."""
    descriptor = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.05)
                continue
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise DirectoryInUse(
                f"engine.disk_cache_dir: {directory} is in use by another worker (process {holder}). Workers of the "
                "same name on one host, in two clusters, need different directories"
            ) from None
    os.truncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
