"""The KV cache of one rank, as bytes that leave and arrive.

Whoever uses it outside an engine step holds a reference on the blocks for as long, so that no block is handed to
another request while its bytes travel. On the wire a piece is in canonical order, [block, layer, k|v, kv_head, token,
head_dim] of the layers and heads that were asked for; in the cache it may lie in any order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.cache_view import CacheView
from kernels.cpu.relayout import Dtype, compress_blocks, copy_blocks, restore_blocks
from kernels.reference import gather_blocks, scatter_blocks
from workers.protocol.messages import Compression, KvLayout
from workers.shared_memory import SharedPages

View = memoryview


class BlockMemory(Protocol):
    """`layers` and `heads` are of this cache; None: all of them."""

    @property
    def device(self) -> torch.device: ...

    @property
    def shared(self) -> tuple[SharedPages, CacheView] | None:
        """The cache itself, when it is memory that processes of this host can map."""

    def outgoing(
        self,
        blocks: Sequence[int],
        layers: range | None = None,
        heads: range | None = None,
        compression: Compression = "none",
    ) -> list[View]:
        """The bytes of a piece, in order."""

    def incoming(
        self,
        blocks: Sequence[int],
        layers: range | None = None,
        heads: range | None = None,
        compression: Compression = "none",
    ) -> contextlib.AbstractContextManager[list[View]]:
        """Writable views of as many bytes; what was written is in the cache when the context ends without error."""

    def pull(
        self,
        blocks: Sequence[int],
        source: CacheView,
        source_blocks: Sequence[int],
        layers: range | None = None,
        heads: range | None = None,
    ) -> None:
        """Copy blocks of another cache in this host's memory, which has just these layers and heads, into this one."""


class HostBlocks:
    """A cache in CPU memory. Whole blocks in canonical order are sent and received in place."""

    device = torch.device("cpu")

    def __init__(
        self,
        pages: NDArray[np.uint8],
        layout: KvLayout,
        *,
        num_heads: int | None = None,
        view: CacheView | None = None,
        shared: SharedPages | None = None,
    ) -> None:
        """`pages` holds the blocks. `num_heads`: of this rank, None: all. `view`: where they lie; None: canonical."""
        self._pages = pages  # keeps them alive
        self._layout = layout
        self._num_heads = num_heads or layout.num_kv_heads
        num_blocks = pages.size // self._piece_bytes(1, layout.num_layers, self._num_heads, "none")
        self.view = view or canonical_view(layout, pages.ctypes.data, num_blocks, self._num_heads)
        self.shared = None if shared is None else (shared, self.view)
        self._rows: list[View] = []
        if view is None:
            self._rows = [row.data for row in pages.reshape(num_blocks, -1)]

    def outgoing(
        self,
        blocks: Sequence[int],
        layers: range | None = None,
        heads: range | None = None,
        compression: Compression = "none",
    ) -> list[View]:
        layers, heads = self._cut(layers, heads)
        if compression == "none" and self._in_place(layers, heads):
            return [self._rows[block] for block in blocks]
        staging = np.empty(self._piece_bytes(len(blocks), len(layers), len(heads), compression), np.uint8)
        source = self.view.cut(layers=layers, heads=heads)
        if compression == "none":
            staged = self._staged(staging, len(blocks), layers, heads)
            copy_blocks(staged, range(len(blocks)), source, blocks)
        else:
            compress_blocks(staging, source, blocks, dtype=_row_dtype(self._layout), wire=compression)
        return [staging.data]

    @contextlib.contextmanager
    def incoming(
        self,
        blocks: Sequence[int],
        layers: range | None = None,
        heads: range | None = None,
        compression: Compression = "none",
    ) -> Iterator[list[View]]:
        layers, heads = self._cut(layers, heads)
        if compression == "none" and self._in_place(layers, heads):
            yield [self._rows[block] for block in blocks]
            return
        staging = np.empty(self._piece_bytes(len(blocks), len(layers), len(heads), compression), np.uint8)
        yield [staging.data]
        destination = self.view.cut(layers=layers, heads=heads)
        if compression == "none":
            staged = self._staged(staging, len(blocks), layers, heads)
            copy_blocks(destination, blocks, staged, range(len(blocks)))
        else:
            restore_blocks(destination, blocks, staging, dtype=_row_dtype(self._layout), wire=compression)

    def pull(
        self,
        blocks: Sequence[int],
        source: CacheView,
        source_blocks: Sequence[int],
        layers: range | None = None,
        heads: range | None = None,
    ) -> None:
        layers, heads = self._cut(layers, heads)
        copy_blocks(self.view.cut(layers=layers, heads=heads), blocks, source, source_blocks)

    def _cut(self, layers: range | None, heads: range | None) -> tuple[range, range]:
        return layers or range(self._layout.num_layers), heads or range(self._num_heads)

    def _in_place(self, layers: range, heads: range) -> bool:
        whole = len(layers) == self._layout.num_layers and len(heads) == self._num_heads
        return whole and bool(self._rows)

    def _piece_bytes(self, blocks: int, layers: int, heads: int, compression: Compression) -> int:
        return self._layout.wire_bytes(blocks, layers, heads, compression)

    def _staged(self, staging: NDArray[np.uint8], num_blocks: int, layers: range, heads: range) -> CacheView:
        return canonical_view(self._layout, staging.ctypes.data, num_blocks, len(heads), len(layers))


class DeviceBlocks:
    """A cache on a device: blocks are gathered into host memory and scattered from it."""

    shared = None

    def __init__(self, kv_cache: torch.Tensor, layout: KvLayout) -> None:
        """[num_blocks, num_layers, 2, heads of this rank, block_size, head_dim]"""
        self._kv_cache = kv_cache
        self._layout = layout

    @property
    def device(self) -> torch.device:
        return self._kv_cache.device

    def outgoing(
        self,
        blocks: Sequence[int],
        layers: range | None = None,
        heads: range | None = None,
        compression: Compression = "none",
    ) -> list[View]:
        gathered = gather_blocks(self._part(layers, heads), self._ids(blocks)).cpu().contiguous()
        staged = _bytes_of(gathered)
        if compression == "none":
            return [staged.data]
        return self._staging(staged, gathered).outgoing(range(len(blocks)), compression=compression)

    @contextlib.contextmanager
    def incoming(
        self,
        blocks: Sequence[int],
        layers: range | None = None,
        heads: range | None = None,
        compression: Compression = "none",
    ) -> Iterator[list[View]]:
        part = self._part(layers, heads)
        arrived = torch.empty((len(blocks), *part.shape[1:]), dtype=part.dtype)
        with self._staging(_bytes_of(arrived), arrived).incoming(
            range(len(blocks)), compression=compression
        ) as views:
            yield views
        scatter_blocks(part, self._ids(blocks), arrived.to(self.device))

    def pull(
        self,
        blocks: Sequence[int],
        source: CacheView,
        source_blocks: Sequence[int],
        layers: range | None = None,
        heads: range | None = None,
    ) -> None:
        part = self._part(layers, heads)
        arrived = torch.empty((len(blocks), *part.shape[1:]), dtype=part.dtype)
        self._staging(_bytes_of(arrived), arrived).pull(range(len(blocks)), source, source_blocks)
        scatter_blocks(part, self._ids(blocks), arrived.to(self.device))

    def _part(self, layers: range | None, heads: range | None) -> torch.Tensor:
        part = self._kv_cache
        if layers is not None:
            part = part[:, layers.start : layers.stop]
        if heads is not None:
            part = part[:, :, :, heads.start : heads.stop]
        return part

    def _staging(self, pages: NDArray[np.uint8], blocks: torch.Tensor) -> HostBlocks:
        _, num_layers, _, num_heads, _, _ = blocks.shape
        whole = KvLayout(
            num_layers=num_layers,
            num_kv_heads=num_heads,
            head_dim=self._layout.head_dim,
            block_size=self._layout.block_size,
            dtype=self._layout.dtype,
            model_fingerprint=self._layout.model_fingerprint,
        )
        return HostBlocks(pages, whole)

    def _ids(self, blocks: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(blocks), dtype=torch.int64, device=self._kv_cache.device)


def canonical_view(
    layout: KvLayout, address: int, num_blocks: int, num_heads: int, num_layers: int | None = None
) -> CacheView:
    """Blocks one after another in canonical order. An int8 tile, values and scales, counts as one row."""
    tokens = 1 if layout.dtype == "int8" else layout.block_size
    return CacheView.canonical(
        address, num_blocks, num_layers or layout.num_layers, num_heads, tokens, layout.tile_bytes // tokens
    )


def _row_dtype(layout: KvLayout) -> Dtype:
    if layout.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"blocks of {layout.dtype} cannot be compressed")
    return cast(Dtype, layout.dtype)


def block_memory(kv_cache: torch.Tensor, layout: KvLayout, shared: SharedPages | None = None) -> BlockMemory:
    """Of a whole cache in canonical order; `shared`: the pages it lies in, when others can map them."""
    if kv_cache.device.type != "cpu":
        return DeviceBlocks(kv_cache, layout)
    return HostBlocks(_bytes_of(kv_cache), layout, shared=shared)


def _bytes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    return tensor.view(-1).view(torch.uint8).numpy()
