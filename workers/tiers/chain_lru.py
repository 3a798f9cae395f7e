"""Which cached block goes next: the least recently used one of those that no other block here continues.

Pure Python. Blocks form trees by their parent hashes, and a block is of use only together with all that precede it. So
of a chain the leaf goes before its parent, whatever was touched when; among leaves the one that was used longest ago.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Entry:
    parent: bytes
    stamp: int  # of the last use


class ChainLru:
    """hash -> parent. Each operation costs O(log n); not thread-safe."""

    def __init__(self) -> None:
        self._entries: dict[bytes, _Entry] = {}
        self._children: dict[
            bytes, int
        ] = {}  # hash -> entries whose parent it is, whether it is here itself or not
        self._leaves: list[
            tuple[int, bytes]
        ] = []  # a heap; what is outdated in it is dropped when it comes up
        self._now = 0

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def items(self) -> list[tuple[bytes, bytes]]:
        """(hash, parent) of everything."""
        return [(block_hash, entry.parent) for block_hash, entry in self._entries.items()]

    def add(self, block_hash: bytes, parent: bytes) -> None:
        """A block comes in, as the one most recently used. Raises ValueError when it is here."""
        if block_hash in self._entries:
            raise ValueError(f"block {block_hash.hex()} is here already")
        self._entries[block_hash] = _Entry(parent, self._tick())
        self._children[parent] = self._children.get(parent, 0) + 1
        self._push(block_hash)

    def touch(self, block_hash: bytes) -> None:
        """It was used; nothing happens when it is not here."""
        entry = self._entries.get(block_hash)
        if entry is not None:
            entry.stamp = self._tick()
            self._push(block_hash)

    def remove(self, block_hash: bytes) -> None:
        """Raises KeyError when it is not here."""
        parent = self._entries.pop(block_hash).parent
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
            return
        del self._children[parent]
        self._push(parent)

    def next_out(self, may_go: Callable[[bytes], bool] = lambda block_hash: True) -> bytes | None:
        """The one to remove next, of those that may go; None when there is none. It stays here."""
        passed_over = []
        found = None
        while self._leaves and found is None:
            stamp, block_hash = self._leaves[0]
            entry = self._entries.get(block_hash)
            if entry is None or entry.stamp != stamp or block_hash in self._children:
                heapq.heappop(self._leaves)
            elif may_go(block_hash):
                found = block_hash
            else:
                passed_over.append(heapq.heappop(self._leaves))
        for leaf in passed_over:
            heapq.heappush(self._leaves, leaf)
        return found

    def _tick(self) -> int:
        self._now += 1
        return self._now

    def _push(self, block_hash: bytes) -> None:
        entry = self._entries.get(block_hash)
        if entry is None or block_hash in self._children:
            return
        heapq.heappush(self._leaves, (entry.stamp, block_hash))
        if len(self._leaves) > 2 * len(self._entries) + 64:
            self._leaves = [(e.stamp, h) for h, e in self._entries.items() if h not in self._children]
            heapq.heapify(self._leaves)
