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
from kernels.reference_relayout import part
from workers.cuda import device_errors, stream_on, wait_for
from workers.device_memory import DevicePages, LentDevicePages
from workers.protocol.messages import Compression, KvLayout
from workers.shared_memory import SharedPages
from workers.transfer.device_relayout import relayout_for

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
    """A cache on a device. Towards the host blocks pass through pinned memory, which torch keeps for the next ones.

    What is asked of the device is queued on streams of its own, behind what the model has queued by then, and waited for.
    """

    shared = None

    def __init__(
        self,
        kv_cache: torch.Tensor,
        layout: KvLayout,
        exported: DevicePages | LentDevicePages | None = None,
    ) -> None:
        """[num_blocks, num_layers, planes, heads of this rank, block_size, head_dim], or a quantized one's tiles
        (kernels/paged_kv.py); `exported`: the memory it lies in, when other processes can open it."""
        if layout.quantized:
            # A tile is moved whole, as one row of words: scales lie behind the values, so that their size divides it.
            words = kv_cache.view(torch.int32)
            kv_cache = words.view(*kv_cache.shape[:2], 2, -1, 1, layout.tile_bytes // words.itemsize)
        elif layout.planes == 1:
            kv_cache = kv_cache.view(*kv_cache.shape[:2], 2, 1, layout.tile_tokens, kv_cache.shape[-1])
        self._kv_cache = kv_cache
        self._layout = layout
        self.exported = exported
        self._leaving, self._arriving = stream_on(kv_cache.device), stream_on(kv_cache.device)
        self._relayout = relayout_for(kv_cache)

    @property
    def device(self) -> torch.device:
        return self._kv_cache.device

    @property
    def view(self) -> CacheView:
        cache, item = self._kv_cache, self._kv_cache.element_size()
        block, layer, kv, head, token, _ = (stride * item for stride in cache.stride())
        num_blocks, num_layers, _, num_heads, num_tokens, head_dim = cache.shape
        return CacheView(
            address=cache.data_ptr(),
            num_blocks=num_blocks,
            num_layers=num_layers,
            num_heads=num_heads,
            num_tokens=num_tokens,
            row_bytes=head_dim * item,
            block_stride=block,
            layer_stride=layer,
            kv_stride=kv,
            head_stride=head,
            token_stride=token,
        )

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Beside the cache. Raises DeviceError."""
        with device_errors(f"{num_bytes} bytes of staging on {self.device}"):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    # --- on the device: queued on the caller's stream ---------------------------------------------------------------

    @torch.inference_mode()
    def gather(
        self,
        wire: torch.Tensor,
        blocks: Sequence[int],
        layers: range | None = None,
        heads: range | None = None,
        compression: Compression = "none",
    ) -> None:
        """Into `wire`, uint8 on the cache's device."""
        self._relayout.gather(wire, self._part(layers, heads), self._ids(blocks), compression)

    @torch.inference_mode()
    def scatter(
        self,
        wire: torch.Tensor,
        blocks: Sequence[int],
        layers: range | None = None,
        heads: range | None = None,
        compression: Compression = "none",
    ) -> None:
        self._relayout.scatter(self._part(layers, heads), self._ids(blocks), wire, compression)

    # --- by way of the host: done when the call returns -------------------------------------------------------------

    def outgoing(
        self,
        blocks: Sequence[int],
        layers: range | None = None,
        heads: range | None = None,
        compression: Compression = "none",
    ) -> list[View]:
        host = self._host(self._num_bytes(blocks, layers, heads, compression))
        with device_errors("blocks from the device"), self._leaving.use():
            wire = host if self.device.type == "cpu" else torch.empty_like(host, device=self.device)
            self.gather(wire, blocks, layers, heads, compression)
            if wire is not host:
                host.copy_(wire, non_blocking=True)
            wait_for(self._leaving.record(), "gathering")
        return [_bytes_of(host).data]

    @contextlib.contextmanager
    def incoming(
        self,
        blocks: Sequence[int],
        layers: range | None = None,
        heads: range | None = None,
        compression: Compression = "none",
    ) -> Iterator[list[View]]:
        host = self._host(self._num_bytes(blocks, layers, heads, compression))
        yield [_bytes_of(host).data]
        self._bring(host, blocks, layers, heads, compression)

    def pull(
        self,
        blocks: Sequence[int],
        source: CacheView,
        source_blocks: Sequence[int],
        layers: range | None = None,
        heads: range | None = None,
    ) -> None:
        host = self._host(self._num_bytes(blocks, layers, heads, "none"))
        num_layers, num_heads = self._part(layers, heads).shape[1:4:2]
        staged = canonical_view(self._layout, host.data_ptr(), len(blocks), num_heads, num_layers)
        copy_blocks(staged, range(len(blocks)), source, source_blocks)
        self._bring(host, blocks, layers, heads, "none")

    def _bring(
        self,
        host: torch.Tensor,
        blocks: Sequence[int],
        layers: range | None,
        heads: range | None,
        compression: Compression,
    ) -> None:
        with device_errors("blocks to the device"), self._arriving.use():
            try:
                wire = host.to(self.device, non_blocking=True)
                self.scatter(wire, blocks, layers, heads, compression)
            finally:
                # What was queued can't be called back: the blocks are the writer's until it is done.
                wait_for(self._arriving.record(), "scattering")

    def _part(self, layers: range | None, heads: range | None) -> torch.Tensor:
        return part(self._kv_cache, layers, heads)

    def _num_bytes(
        self, blocks: Sequence[int], layers: range | None, heads: range | None, compression: Compression
    ) -> int:
        num_layers, num_heads = self._part(layers, heads).shape[1:4:2]
        return self._layout.wire_bytes(len(blocks), num_layers, num_heads, compression)

    def _host(self, num_bytes: int) -> torch.Tensor:
        with device_errors(f"{num_bytes} bytes of pinned memory"), self._arriving.use():
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _ids(self, blocks: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor(list(blocks), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return ids.to(self.device, non_blocking=True)


def canonical_view(
    layout: KvLayout, address: int, num_blocks: int, num_heads: int, num_layers: int | None = None
) -> CacheView:
    """Blocks one after another in canonical order. A quantized tile, values and scales, counts as one row."""
    tokens = 1 if layout.quantized else layout.tile_tokens
    return CacheView.canonical(
        address, num_blocks, num_layers or layout.num_layers, num_heads, tokens, layout.tile_bytes // tokens
    )


def _row_dtype(layout: KvLayout) -> Dtype:
    if layout.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"blocks of {layout.dtype} cannot be compressed")
    return cast(Dtype, layout.dtype)


def block_memory(
    kv_cache: torch.Tensor,
    layout: KvLayout,
    shared: SharedPages | DevicePages | None = None,
    num_heads: int | None = None,
) -> BlockMemory:
    """Of a cache in canonical order; `shared`: the pages it lies in, when others can map or open them. `num_heads`: of
    this rank, None: all of the layout's."""
    if kv_cache.device.type != "cpu":
        return DeviceBlocks(kv_cache, layout, shared if isinstance(shared, DevicePages) else None)
    pages = shared if isinstance(shared, SharedPages) else None
    return HostBlocks(_bytes_of(kv_cache), layout, num_heads=num_heads, shared=pages)


def _bytes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    return tensor.view(-1).view(torch.uint8).numpy()
