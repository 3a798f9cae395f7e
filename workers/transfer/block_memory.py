"""The KV cache as bytes that sockets and shared memory can be filled from and poured into.

Whoever uses these views outside an engine step holds a reference on the blocks for as long, so that no block is
handed to another request while its bytes travel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from kernels.reference import gather_blocks, scatter_blocks

View = memoryview


class BlockMemory(Protocol):
    def outgoing(self, blocks: Sequence[int]) -> list[View]:
        """Bytes of the blocks in canonical layout, in order."""

    def incoming(self, blocks: Sequence[int]) -> contextlib.AbstractContextManager[list[View]]:
        """Writable views of as many bytes; what was written is in the cache when the context ends without error."""


class HostBlocks:
    """A cache in CPU memory: the views are the cache itself, nothing is copied."""

    def __init__(self, kv_cache: torch.Tensor) -> None:
        rows = kv_cache.view(kv_cache.shape[0], -1).view(torch.uint8).numpy()
        self._rows = [View(row) for row in rows]

    def outgoing(self, blocks: Sequence[int]) -> list[View]:
        return [self._rows[block] for block in blocks]

    @contextlib.contextmanager
    def incoming(self, blocks: Sequence[int]) -> Iterator[list[View]]:
        yield [self._rows[block] for block in blocks]


class DeviceBlocks:
    """A cache on a device: blocks are gathered into host memory and scattered from it."""

    def __init__(self, kv_cache: torch.Tensor) -> None:
        self._kv_cache = kv_cache

    def outgoing(self, blocks: Sequence[int]) -> list[View]:
        gathered = gather_blocks(self._kv_cache, self._ids(blocks)).cpu()
        return [View(row) for row in gathered.view(len(blocks), -1).view(torch.uint8).numpy()]

    @contextlib.contextmanager
    def incoming(self, blocks: Sequence[int]) -> Iterator[list[View]]:
        cache = self._kv_cache
        staging = torch.empty((len(blocks), *cache.shape[1:]), dtype=cache.dtype)
        yield [View(row) for row in staging.view(len(blocks), -1).view(torch.uint8).numpy()]
        scatter_blocks(cache, self._ids(blocks), staging.to(cache.device))

    def _ids(self, blocks: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(blocks), dtype=torch.int64, device=self._kv_cache.device)


def block_memory(kv_cache: torch.Tensor) -> BlockMemory:
    return HostBlocks(kv_cache) if kv_cache.device.type == "cpu" else DeviceBlocks(kv_cache)
