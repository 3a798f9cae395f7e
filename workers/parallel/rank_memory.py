"""The KV cache of another rank of the replica, as rank 0 reads and writes it."""

from __future__ import annotations

import os

import torch

from workers.device_memory import LentDevicePages
from workers.models.sharding import rank_layout
from workers.parallel.messages import Ready
from workers.parallel.shard import Shard
from workers.protocol.messages import KvLayout
from workers.shared_memory import SharedPages
from workers.transfer.block_memory import BlockMemory, DeviceBlocks, HostBlocks


def lend(shared: SharedPages | LentDevicePages | object, num_bytes: int) -> tuple[Ready, int | None]:
    """A follower's pages: what it says of them, and the descriptor that goes with it, the caller's to close.

    Raises ValueError when other processes can't open them.
    """
    if isinstance(shared, SharedPages):
        return Ready(shared.num_bytes), shared.writable_fd()
    handle = getattr(shared, "handle", None)
    if handle is None:
        raise ValueError("the KV cache can't be shown to rank 0: CUDA IPC needs cupy and memory of its own")
    return Ready(num_bytes, handle), None


def lent_memory(
    ready: Ready, fd: int | None, layout: KvLayout, shard: Shard, like: torch.Tensor
) -> BlockMemory:
    """`like`: rank 0's KV cache, of the same shape. Takes the descriptor over. Raises ValueError, RuntimeError."""
    expected = like.numel() * like.element_size()
    if ready.num_bytes != expected:
        if fd is not None:
            os.close(fd)
        raise ValueError(
            f"rank {shard.rank} has a KV cache of {ready.num_bytes} bytes, rank 0 one of {expected}"
        )
    if like.device.type == "cpu":
        if fd is None:
            raise ValueError(f"rank {shard.rank} gave no descriptor of its KV cache")
        pages = SharedPages.lent(fd, ready.num_bytes)
        return HostBlocks(
            pages.array, layout, num_heads=rank_layout(layout, shard).num_kv_heads, shared=pages
        )
    opened = LentDevicePages(ready.handle, ready.num_bytes, like.device)
    return DeviceBlocks(opened.tensor.view(like.dtype).view(like.shape), layout, opened)
