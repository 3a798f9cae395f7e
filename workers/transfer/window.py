"""A sender's cache as its window: how it is described in `KvOpen`, and how a receiver finds the wanted rows in it."""

from __future__ import annotations

from kernels.cache_view import CacheView
from workers.protocol.frames import ProtocolError
from workers.protocol.messages import KvBlocks, KvOpen, KvWindow
from workers.transfer.block_memory import canonical_view
from workers.transfer.road import End
from workers.transfer.shards import heads_of


def window_of(view: CacheView, address: int, num_bytes: int, handle: bytes = b"") -> KvWindow:
    """Of a cache that lies in `num_bytes` at `address`."""
    return KvWindow(
        num_bytes=num_bytes,
        strides=(view.block_stride, view.layer_stride, view.kv_stride, view.head_stride, view.token_stride),
        num_blocks=view.num_blocks,
        handle=handle,
        offset=view.address - address,
    )


def source_view(end: End, opened: KvOpen, address: int, num_bytes: int) -> CacheView:
    """The sender's cache where its window of `num_bytes` is mapped here, cut to the heads that are wanted.

    Raises ValueError when the window does not hold what it says.
    """
    window, layout = opened.window, end.layout
    assert window is not None
    if len(window.strides) != 5 or min(window.strides) < 0 or window.offset < 0 or window.num_blocks < 1:
        raise ValueError(f"a window of {window}")
    held = heads_of(opened.rank, opened.ranks, layout.num_kv_heads)
    rows = canonical_view(layout, 0, 1, len(held))
    block, layer, kv, head, token = window.strides
    view = CacheView(
        address=address + window.offset,
        num_blocks=window.num_blocks,
        num_layers=rows.num_layers,
        num_heads=rows.num_heads,
        num_tokens=rows.num_tokens,
        row_bytes=rows.row_bytes,
        block_stride=block,
        layer_stride=layer,
        kv_stride=kv,
        head_stride=head,
        token_stride=token,
    )
    last = (
        window.offset
        + (view.num_blocks - 1) * block
        + (view.num_layers - 1) * layer
        + kv
        + (view.num_heads - 1) * head
        + (view.num_tokens - 1) * token
        + view.row_bytes
    )
    if last > num_bytes:
        raise ValueError(f"a cache of {last} bytes in a window of {num_bytes}")
    wanted = end.model_heads
    return view.cut(heads=range(wanted.start - held.start, wanted.stop - held.start))


def check_source(message: KvBlocks, source: CacheView, num_blocks: int) -> None:
    """Raises ProtocolError unless as many blocks were announced, of those that the sender has."""
    if len(message.source) != num_blocks:
        raise ProtocolError(f"{len(message.source)} source blocks for {num_blocks} blocks")
    if not all(0 <= block < source.num_blocks for block in message.source):
        raise ProtocolError(f"source blocks {message.source} of a cache of {source.num_blocks}")
