"""Blocks of the device's KV cache as rows of bytes, whole: the parts of all ranks one after another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from workers.transfer.block_memory import BlockMemory

Parts = list[memoryview]  # of one block, a part for each rank


class BlockBytes:
    """`memories`: the cache of each rank. `block_bytes`: of a whole block. Callers hold references on the blocks."""

    def __init__(self, memories: Sequence[BlockMemory], block_bytes: int) -> None:
        self._memories = list(memories)
        self.block_bytes = block_bytes
        self.num_pieces = len(self._memories)
        self._piece_bytes = block_bytes // self.num_pieces

    def outgoing(self, blocks: Sequence[int]) -> list[Parts]:
        return self._by_block(len(blocks), [memory.outgoing(blocks) for memory in self._memories])

    @contextlib.contextmanager
    def incoming(self, blocks: Sequence[int]) -> Iterator[list[Parts]]:
        """What was written is in the cache when the context ends; blocks that were not are spoilt."""
        with contextlib.ExitStack() as stack:
            views = [stack.enter_context(memory.incoming(blocks)) for memory in self._memories]
            yield self._by_block(len(blocks), views)

    def _by_block(self, count: int, views: list[list[memoryview]]) -> list[Parts]:
        return list(map(list, zip(*(self._rows(count, of_rank) for of_rank in views), strict=True)))

    def _rows(self, count: int, views: list[memoryview]) -> Iterator[memoryview]:
        """One for each block; a view may span several."""
        size = self._piece_bytes
        rows = 0
        for view in views:
            flat = view if view.ndim == 1 and view.itemsize == 1 else view.cast("B")
            for start in range(0, len(flat), size):
                rows += 1
                yield flat[start : start + size]
        if rows != count:
            raise RuntimeError(f"{count} blocks of {size} bytes were asked for, {rows} came")


def copy_bytes(to: NDArray[np.uint8], parts: Parts) -> None:
    """numpy, because it lets other threads run meanwhile; a memoryview does not."""
    start = 0
    for part in parts:
        np.copyto(to[start : start + len(part)], np.frombuffer(part, np.uint8))
        start += len(part)


def copy_parts(parts: Parts, source: NDArray[np.uint8]) -> None:
    start = 0
    for part in parts:
        np.copyto(np.frombuffer(part, np.uint8), source[start : start + len(part)])
        start += len(part)
