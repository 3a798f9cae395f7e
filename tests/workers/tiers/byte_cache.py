"""A KV cache of plain bytes, and blocks whose content follows from their name."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from workers.tiers.block_bytes import BlockBytes

BLOCK_BYTES = 96
ROOT = b"r" * 16


def h(number: int) -> bytes:
    return number.to_bytes(16, "little")


def content(block_hash: bytes) -> bytes:
    return hashlib.shake_128(block_hash).digest(BLOCK_BYTES)


class ByteCache:
    """A BlockMemory of one rank. All views of a call are one, as some caches give them."""

    def __init__(self, num_blocks: int, piece_bytes: int = BLOCK_BYTES) -> None:
        self.rows = np.zeros((num_blocks, piece_bytes), np.uint8)

    def outgoing(self, blocks: Sequence[int]) -> list[memoryview]:
        return [memoryview(np.concatenate([self.rows[block] for block in blocks]))]

    @contextlib.contextmanager
    def incoming(self, blocks: Sequence[int]) -> Iterator[list[memoryview]]:
        yield [memoryview(self.rows[block]) for block in blocks]


class Cache:
    """Of `ranks` ranks, which share each block."""

    def __init__(self, num_blocks: int = 64, ranks: int = 1) -> None:
        self.ranks = [ByteCache(num_blocks, BLOCK_BYTES // ranks) for _ in range(ranks)]
        self.block_bytes = BlockBytes(self.ranks, BLOCK_BYTES)  # type: ignore[arg-type]

    def put(self, block: int, block_hash: bytes) -> None:
        parts = np.split(np.frombuffer(content(block_hash), np.uint8), len(self.ranks))
        for rank, part in zip(self.ranks, parts, strict=True):
            rank.rows[block] = part

    def get(self, block: int) -> bytes:
        return b"".join(rank.rows[block].tobytes() for rank in self.ranks)
