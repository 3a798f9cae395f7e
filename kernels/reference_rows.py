"""Rows of a paged KV cache in eager torch, whatever form it has: written by token, gathered by tile.

A tile is what one (block, layer, plane, KV head) holds, counted in the cache's order; token t of it is number
tile * block_size + t. `first` is the tile at which a layer of block 0 begins, so that indices serve all layers.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kernels.paged_kv import PagedKv
from kernels.reference_relayout import Wire, compress, restore


class Scratch:
    """One growing buffer for gathered keys and values: fresh pages for each layer cost more than the copy.

    It holds what one layer of one decode group or chunk reads: about 1 / num_layers of the cache in use, and padding.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def take(self, numel: int, like: Tensor) -> Tensor:
        """Uninitialized [numel], valid until the next `take`."""
        held = self._buffer
        if held is None or held.numel() < numel or held.dtype != like.dtype or held.device != like.device:
            self._buffer = held = torch.empty(numel, dtype=like.dtype, device=like.device)
        return held[:numel]


class CacheRows(Protocol):
    def write(self, first: int, tokens: Tensor, values: Tensor) -> None:
        """values [n, D] to distinct tokens int64 [n]."""

    def gather(self, first: int, tiles: Tensor, dtype: torch.dtype) -> Tensor:
        """[n, block_size * D] of tiles int64 [n], valid until the next call. A cache of floats gives its own dtype."""


def rows_of(cache: PagedKv, scratch: Scratch) -> CacheRows:
    if cache.wire is None:
        return _FloatRows(cache, scratch)
    return _QuantizedRows(cache, cache.wire)


class _FloatRows:
    def __init__(self, cache: PagedKv, scratch: Scratch) -> None:
        self._block_size, self._scratch = cache.block_size, scratch
        self._tokens = cache.data.view(-1, cache.head_dim)
        self._tiles = cache.data.view(-1, cache.block_size * cache.head_dim)

    def write(self, first: int, tokens: Tensor, values: Tensor) -> None:
        self._tokens[first * self._block_size :].index_copy_(0, tokens, values)

    def gather(self, first: int, tiles: Tensor, dtype: torch.dtype) -> Tensor:
        held = self._tiles
        gathered = self._scratch.take(len(tiles) * held.shape[1], held).view(len(tiles), -1)
        return torch.index_select(held[first:], 0, tiles, out=gathered)


class _QuantizedRows:
    """A token's values and its scale lie apart in its tile (kernels/relayout.py)."""

    def __init__(self, cache: PagedKv, wire: Wire) -> None:
        self._block_size, self._dim, self._wire = cache.block_size, cache.head_dim, wire
        self._tiles = cache.data.view(-1, cache.data.shape[-1])
        scales_at = cache.block_size * cache.head_dim
        self._values = self._tiles[:, :scales_at].view(-1, cache.block_size, cache.head_dim)
        self._scales = self._tiles[:, scales_at:].view(-1, cache.block_size, 4)

    def write(self, first: int, tokens: Tensor, values: Tensor) -> None:
        tile, token = first + tokens // self._block_size, tokens % self._block_size
        rows = compress(values[:, None], self._wire)  # tiles of one token
        self._values[tile, token] = rows[:, : self._dim]
        self._scales[tile, token] = rows[:, self._dim :]

    def gather(self, first: int, tiles: Tensor, dtype: torch.dtype) -> Tensor:
        return restore(self._tiles[first + tiles], self._block_size, dtype, self._wire).flatten(1)
