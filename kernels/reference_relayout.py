"""The oracle of relayout: parts of KV blocks out of a cache and into it, and the wire's compressed rows, in eager torch.

A cache is [num_blocks, num_layers, 2 (k, v), num_heads, num_tokens, head_dim] of any strides: a layout is a permutation
of such a tensor's memory. `layers` and `heads` are contiguous ranges, all of them where None. What the compressed form
holds is written down in kernels/relayout.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Wire = Literal["int8", "fp8"]

_LARGEST = {"int8": 127.0, "fp8": 448.0}
_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def gather(
    cache: Tensor, block_ids: Tensor, *, layers: range | None = None, heads: range | None = None
) -> Tensor:
    """Blocks [n] in wire layout, contiguous: [n, layers, 2, heads, num_tokens, head_dim]."""
    return part(cache, layers, heads).index_select(0, block_ids).contiguous()


def scatter(
    cache: Tensor,
    block_ids: Tensor,
    blocks: Tensor,
    *,
    layers: range | None = None,
    heads: range | None = None,
) -> None:
    """The reverse of `gather`; `block_ids` are distinct."""
    part(cache, layers, heads).index_copy_(0, block_ids, blocks)


def compress(blocks: Tensor, wire: Wire) -> Tensor:
    """[..., num_tokens, head_dim] of floats -> tiles uint8 [..., num_tokens * (head_dim + 4)]."""
    x = blocks.float()
    amax = x.abs().amax(-1, keepdim=True)
    largest = torch.tensor(_LARGEST[wire], device=x.device)
    some = amax > 1e-30
    bad = ~x.isfinite().all(-1, keepdim=True)
    y = torch.where(some & ~bad, x * (largest / amax), 0.0)
    scale = torch.where(some, amax / largest, 0.0).masked_fill(bad, torch.nan)
    q = (y.round() if wire == "int8" else y).to(_TYPES[wire])
    return torch.cat((q.view(torch.uint8).flatten(-2), scale.view(torch.uint8).flatten(-2)), -1)


def restore(tiles: Tensor, num_tokens: int, dtype: torch.dtype, wire: Wire) -> Tensor:
    """The reverse of `compress`: [..., num_tokens, head_dim] of `dtype`."""
    head_dim = tiles.shape[-1] // num_tokens - 4
    q, scale = tiles[..., : num_tokens * head_dim], tiles[..., num_tokens * head_dim :]
    values = q.contiguous().view(_TYPES[wire]).float().view(*tiles.shape[:-1], num_tokens, head_dim)
    restored: Tensor = values * scale.contiguous().view(torch.float32)[..., None]
    return restored.to(dtype)


def part(cache: Tensor, layers: range | None, heads: range | None) -> Tensor:
    """A view of the cache. Raises ValueError for ranges that are no contiguous part of it."""
    for name, dim, wanted in (("layers", 1, layers), ("heads", 3, heads)):
        if wanted is None:
            continue
        if wanted.step != 1 or not 0 <= wanted.start < wanted.stop <= cache.shape[dim]:
            raise ValueError(f"{name} {wanted} of a cache that has {cache.shape[dim]}")
        cache = cache.narrow(dim, wanted.start, len(wanted))
    return cache
