"""The KV cache of another rank of the replica, as rank 0 reads and writes it."""

from __future__ import annotations

import os

import torch

from workers.cuda import Cuda
from workers.device_memory import DevicePages, LentDevicePages
from workers.models.sharding import rank_layout
from workers.parallel.messages import Ready
from workers.parallel.shard import Shard
from workers.protocol.messages import KvLayout
from workers.shared_memory import SharedPages
from workers.transfer.block_memory import BlockMemory, DeviceBlocks, HostBlocks


def lend(shared: SharedPages | DevicePages | None) -> tuple[Ready, int | None]:
    """A follower's pages: what it says of them, and the descriptor that goes with it, the caller's to close.

    Raises ValueError when other processes can't open them.
    """
    if shared is None:
        raise ValueError(
            "the KV cache can't be lent to rank 0, see the warning before: tensor_parallel needs cupy"
        )
    if isinstance(shared, DevicePages):
        return Ready(shared.num_bytes, shared.handle), None
    return Ready(shared.num_bytes), shared.writable_fd()


def lent_memory(
    ready: Ready,
    fd: int | None,
    layout: KvLayout,
    shard: Shard,
    like: torch.Tensor,
    cuda: Cuda | None = None,
) -> BlockMemory:
    """`like`: rank 0's KV cache, of the same shape. Takes the descriptor over. Raises ValueError, RuntimeError."""
    expected = like.numel() * like.element_size()
    if ready.num_bytes != expected:
        if fd is not None:
            os.close(fd)
        raise ValueError(
            f"rank {shard.rank} has a KV cache of {ready.num_bytes} bytes, rank 0 one of {expected}"
        )
    if not ready.handle:
        if fd is None:
            raise ValueError(f"rank {shard.rank} gave neither a descriptor nor a handle of its KV cache")
        pages = SharedPages.lent(fd, ready.num_bytes)
        return HostBlocks(
            pages.array, layout, num_heads=rank_layout(layout, shard).num_kv_heads, shared=pages
        )
    # On the GPU where it is, if this process sees that one; else through this rank's, which reaches it as a peer.
    seen = like.device.type == "cuda" and torch.cuda.device_count() > 1
    device = torch.device("cuda", shard.rank) if seen else like.device
    opened = LentDevicePages(ready.handle, ready.num_bytes, device, cuda)
    return DeviceBlocks(opened.tensor.view(like.dtype).view(like.shape), layout, opened)
