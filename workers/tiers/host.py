"""The first tier below the device: blocks in host memory, one slot each.

What the device evicts is copied here at once, under the engine's lock. What is evicted from here goes on to the disk:
its slot is lent to the writer, nothing is copied a second time. For that a share of the slots is kept free or on its
way to the disk (`_reserve`); when the writer does not keep up, blocks are dropped and nobody waits.

A block that goes back to the device stays here, too: when it is evicted again there is nothing to copy.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from workers.engine.block_pool import Evicted
from workers.huge_pages import huge_zeros
from workers.protocol.tiers import HOST
from workers.tiers.block_bytes import BlockBytes, Parts, copy_bytes, copy_parts
from workers.tiers.chain_lru import ChainLru
from workers.tiers.changes import Changes
from workers.tiers.disk import DiskTier
from workers.tiers.stats import TierStats

logger = logging.getLogger(__name__)

_MAX_RESERVE = 256  # slots


class HostTier:
    """A PrefixSource. Thread-safe: its own lock is taken after the engine's, and before the disk tier's."""

    name = HOST

    def __init__(
        self, capacity_bytes: int, block_bytes: BlockBytes, *, pinned: bool, lower: DiskTier | None
    ) -> None:
        size = block_bytes.block_bytes
        num_slots = capacity_bytes // size
        if num_slots == 0:
            raise ValueError(
                f"engine.host_cache_memory is {capacity_bytes} bytes, one KV block of this model has {size}"
            )
        self._bytes = block_bytes
        self._lower = lower
        self._rows = _memory(num_slots * size, pinned).reshape(num_slots, size)
        self._lock = threading.Lock()
        self._lru = ChainLru()
        self._changes = Changes()
        self._slot_of: dict[bytes, int] = {}
        self._parent_of: dict[bytes, bytes] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self._pins: dict[int, int] = {}  # slot -> readers
        self._leaving: set[int] = set()  # slots lent to the disk's writer
        self._reserve = min(max(num_slots // 4, 1), _MAX_RESERVE)
        self._stats = TierStats(capacity_blocks=num_slots)
        self._failed = False

    # --- what comes from the device -----------------------------------------------------------------------------------

    def take(self, evicted: Sequence[Evicted]) -> None:
        """The hook of the block pool: copy what is not here yet. Raises nothing: a cache may lose blocks."""
        with self._lock:
            fresh = []
            for item in evicted:
                if item[1] in self._slot_of:
                    self._lru.touch(item[1])
                else:
                    fresh.append(item)
            slots = self._take_slots(len(fresh))
            # Without room for all, those that were used last are kept: they come last.
            kept = fresh[len(fresh) - len(slots) :]
            self._stats.dropped_blocks += len(fresh) - len(kept)
        if not kept:
            return
        try:
            copies = self._bytes.outgoing([block for block, _, _ in kept])
            for slot, parts in zip(slots, copies, strict=True):
                copy_bytes(self._rows[slot], parts)
        except Exception:
            if not self._failed:
                logger.exception("blocks could not be copied to host memory, they are dropped")
            self._failed = True
            with self._lock:
                self._free.extend(slots)
                self._stats.errors += 1
            return
        with self._lock:
            for slot, (_, block_hash, parent) in zip(slots, kept, strict=True):
                self._slot_of[block_hash] = slot
                self._parent_of[block_hash] = parent
                self._lru.add(block_hash, parent)
                self._changes.stored(block_hash, parent)
            self._stats.stored_blocks += len(kept)
            self._evict_ahead()

    def _take_slots(self, count: int) -> list[int]:
        slots: list[int] = []
        while len(slots) < count:
            if self._free:
                slots.append(self._free.pop())
                continue
            victim = self._next_out()
            if victim is None:
                break
            if self._lower is not None and not self._lower.touch(victim):
                self._lower.dropped()
            self._free.append(self._forget(victim))
        return slots

    def _evict_ahead(self) -> None:
        """Let the writer have slots before they are needed."""
        lower = self._lower
        while lower is not None and lower.active and len(self._free) + len(self._leaving) < self._reserve:
            victim = self._next_out()
            if victim is None:
                return
            if lower.touch(victim):
                self._free.append(self._forget(victim))
                continue
            slot = self._slot_of[victim]
            done = functools.partial(self._written, slot)
            if not lower.offer(victim, self._parent_of[victim], self._rows[slot], done):
                return
            self._forget(victim)
            self._leaving.add(slot)

    def _written(self, slot: int) -> None:
        with self._lock:
            self._leaving.remove(slot)
            self._free.append(slot)

    def _next_out(self) -> bytes | None:
        return self._lru.next_out(lambda block_hash: self._slot_of[block_hash] not in self._pins)

    def _forget(self, block_hash: bytes) -> int:
        """Its slot, which is the caller's now."""
        self._lru.remove(block_hash)
        self._changes.removed(block_hash)
        del self._parent_of[block_hash]
        return self._slot_of.pop(block_hash)

    # --- what goes back to the device ---------------------------------------------------------------------------------

    def count(self, hashes: Sequence[bytes]) -> int:
        with self._lock:
            found = 0
            while found < len(hashes) and hashes[found] in self._slot_of:
                found += 1
            for block_hash in reversed(hashes[:found]):
                self._lru.touch(block_hash)
            return found

    def read(self, hashes: Sequence[bytes], blocks: Sequence[int], go_on: Callable[[], bool]) -> int:
        slots = self._pin(hashes)
        good = 0
        try:
            if slots:
                with self._bytes.incoming(blocks[: len(slots)]) as rows:
                    for slot, parts in zip(slots, rows, strict=True):
                        if not go_on():
                            break
                        copy_parts(parts, self._rows[slot])
                        good += 1
        finally:
            self._unpin(slots)
        return good

    def _pin(self, hashes: Sequence[bytes]) -> list[int]:
        """Slots of the leading hashes that are here; they keep their content until they are unpinned."""
        slots = []
        with self._lock:
            for block_hash in hashes:
                slot = self._slot_of.get(block_hash)
                if slot is None:
                    break
                self._pins[slot] = self._pins.get(slot, 0) + 1
                slots.append(slot)
        return slots

    def _unpin(self, slots: list[int]) -> None:
        with self._lock:
            for slot in slots:
                self._pins[slot] -= 1
                if not self._pins[slot]:
                    del self._pins[slot]

    def row(self, block_hash: bytes) -> Parts:
        """For whoever knows that nothing is evicted meanwhile. Raises KeyError."""
        with self._lock:
            return [self._rows[self._slot_of[block_hash]].data]

    # --- what it tells ------------------------------------------------------------------------------------------------

    def held(self) -> list[tuple[bytes, bytes]]:
        """(hash, parent) of everything."""
        with self._lock:
            return self._lru.items()

    def drain(self) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
        with self._lock:
            return self._changes.drain()

    def stats(self) -> TierStats:
        with self._lock:
            return replace(self._stats, blocks=len(self._slot_of))

    def check(self) -> None:
        """Raise AssertionError unless every slot is in one place."""
        with self._lock:
            used = list(self._slot_of.values())
            places = [*used, *self._free, *self._leaving]
            assert sorted(places) == list(range(self._stats.capacity_blocks)), "slots are lost or doubled"
            assert set(self._slot_of) == {block_hash for block_hash, _ in self._lru.items()}
            assert set(self._pins) <= set(used), "a slot that is read is not held"


def _memory(num_bytes: int, pinned: bool) -> NDArray[np.uint8]:
    if not pinned:
        return huge_zeros(num_bytes)
    array: NDArray[np.uint8] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
    return array
