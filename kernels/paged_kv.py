"""The paged KV cache in any of its forms: a tensor, and what its shape does not say.

A cache of floats is [num_blocks, num_layers, planes, num_kv_heads, block_size, head_dim] as in kernels.reference. A
quantized one has tiles in place of the last two dimensions: uint8 [block_size * (head_dim + 4)], the bytes that
kernels/relayout.py writes down, which are also those of the native int8 cache: so a block is sent as it lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kernels import reference_relayout
from kernels.reference_relayout import Wire

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# FORMAT of the Triton kernels. Only compute capability 8.9 and later have instructions for e4m3; bits give the same
# values.
_PLAIN, _INT8, _FP8_BITS, _FP8 = 0, 1, 2, 3


@dataclass(frozen=True, eq=False)
class PagedKv:
    """`planes` is 2, keys and values, or 1: rows that are both."""

    data: Tensor
    block_size: int  # tokens
    head_dim: int
    wire: Wire | None = None  # None: floats

    @classmethod
    def of(cls, cache: Tensor) -> PagedKv:
        """A contiguous cache of floats. Raises ValueError."""
        if cache.dim() != 6 or cache.dtype not in FLOATS or not cache.is_contiguous():
            raise ValueError(
                f"a KV cache is [blocks, layers, planes, kv_heads, block_size, head_dim], contiguous, of floats, not "
                f"{cache.dtype} {list(cache.shape)} of strides {cache.stride()}"
            )
        return cls(cache, cache.shape[4], cache.shape[5])

    @classmethod
    def of_tiles(cls, tiles: Tensor, block_size: int, head_dim: int, wire: Wire) -> PagedKv:
        """uint8 [num_blocks, num_layers, planes, num_kv_heads, block_size * (head_dim + 4)]. Raises ValueError."""
        wanted = block_size * (head_dim + 4)
        if tiles.dtype != torch.uint8 or tiles.dim() != 5 or tiles.shape[4] != wanted:
            raise ValueError(
                f"tiles of {block_size} tokens of {head_dim} values are uint8 [.., {wanted}], not {tiles.dtype} "
                f"{list(tiles.shape)}"
            )
        if head_dim % 4 or not tiles.is_contiguous():
            raise ValueError(
                f"scales must be aligned: head_dim {head_dim} is no multiple of 4, or gaps lie between"
            )
        return cls(tiles, block_size, head_dim, wire)

    @classmethod
    def held_in(cls, cache: Tensor, head_dim: int, wire: Wire | None) -> PagedKv:
        """Of either form, of which `cache` is. Raises ValueError."""
        if wire is None:
            return cls.of(cache)
        return cls.of_tiles(cache, cache.shape[-1] // (head_dim + 4), head_dim, wire)

    @property
    def num_kv_heads(self) -> int:
        return self.data.shape[3]

    @property
    def planes(self) -> int:
        return self.data.shape[2]

    # Asked for by every launch, of which a step has several in each layer.
    @cached_property
    def format(self) -> int:
        """As the Triton kernels call it."""
        if self.wire is None:
            return _PLAIN
        if self.wire == "int8":
            return _INT8
        on_gpu = self.data.is_cuda and torch.cuda.get_device_capability(self.data.device) >= (8, 9)
        return _FP8 if on_gpu else _FP8_BITS

    @cached_property
    def pointers(self) -> tuple[Tensor, Tensor]:
        """What a kernel reads: the values, and the same memory as float32 (scales), the values again where none are."""
        if self.wire is None:
            return self.data, self.data
        return self.data.view(torch.int8 if self.wire == "int8" else torch.uint8), self.data.view(
            torch.float32
        )

    def values(self) -> Tensor:
        """What the cache stands for: float32 [num_blocks, num_layers, planes, num_kv_heads, block_size, head_dim]."""
        if self.wire is None:
            return self.data.float()
        return reference_relayout.restore(self.data, self.block_size, torch.float32, self.wire)
