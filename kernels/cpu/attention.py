"""The native attention, rotary embedding and cache write as single operations on tensors, for tests and measurements.

A model's step runs the same kernels from within one native call (decoder.py), over several threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import POINTER, c_float, c_int32, c_void_p
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from kernels.cpu.library import Library
from kernels.cpu.structures import KvCache, KvType

_ITEM_DTYPES = {KvType.F32: torch.float32, KvType.BF16: torch.bfloat16, KvType.I8: torch.int8}


@dataclass(frozen=True, eq=False)
class PagedCache:
    """A KV cache in the native layout (attention.h), of zeros at first."""

    data: Tensor  # uint8 [num_blocks, num_layers, 2, num_kv_heads, tile bytes]
    type: KvType
    block_size: int
    head_dim: int

    @classmethod
    def new(
        cls, type: KvType, blocks: int, layers: int, kv_heads: int, block_size: int, head_dim: int
    ) -> PagedCache:
        tile = block_size * (head_dim + 4 if type == KvType.I8 else head_dim * _ITEM_DTYPES[type].itemsize)
        data = torch.zeros((blocks, layers, 2, kv_heads, tile), dtype=torch.uint8)
        return cls(data, type, block_size, head_dim)

    @property
    def native(self) -> KvCache:
        """The struct, which holds no reference to the memory."""
        blocks, layers, _, kv_heads, _ = self.data.shape
        return KvCache(
            self.data.data_ptr(), self.type, blocks, layers, kv_heads, self.block_size, self.head_dim
        )

    def values(self) -> Tensor:
        """What the cache stands for: float32 [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]."""
        shape = (*self.data.shape[:-1], self.block_size, self.head_dim)
        if self.type != KvType.I8:
            return self.data.view(_ITEM_DTYPES[self.type]).view(shape).float()
        tokens = self.block_size * self.head_dim
        scales = self.data[..., tokens:].contiguous().view(torch.float32)
        return self.data[..., :tokens].contiguous().view(torch.int8).view(shape) * scales[..., None]


def supports(library: Library, head_dim: int, block_size: int) -> bool:
    return bool(library.cdll.hr_attention_supports(c_int32(head_dim), c_int32(block_size)))


def attend(
    library: Library,
    q: Tensor,
    cache: PagedCache,
    layer: int,
    query_start: Sequence[int],
    lengths: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    scale: float,
    window: int | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
    item_rows: int = 0,
    split: bool = False,
    use_tiles: bool = False,
) -> Tensor:
    """q float32 [T, num_heads, D] -> [T, num_heads, D] in `out_dtype` (float32 or bfloat16), in one thread.

    Sequence s has the query rows query_start[s]:query_start[s + 1], the last of them at position lengths[s] - 1.
    `item_rows` query tokens at a time, 0 for as many as the kernel takes; `split` cuts long contexts into parts and
    merges them, as several threads do.
    """
    attend_batch = library.cdll.hr_attend_batch
    attend_batch.restype = None
    attend_batch.argtypes = (
        *(POINTER(KvCache), c_int32, c_int32, c_int32, c_float, c_int32),
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_int32, c_int32),
    )
    starts = [0]
    for table in block_tables:
        starts.append(starts[-1] + len(table))
    q = q.contiguous()
    out = torch.empty(q.shape, dtype=out_dtype)
    native = cache.native
    arrays = [_int32(query_start), _int32(lengths), _int32(chain.from_iterable(block_tables)), _int32(starts)]
    attend_batch(
        ctypes.byref(native),
        layer,
        q.shape[1],
        window or 0,
        scale,
        len(lengths),
        *(array.data_ptr() for array in arrays),
        q.data_ptr(),
        out.data_ptr(),
        out_dtype == torch.bfloat16,
        item_rows,
        split,
        use_tiles,
    )
    return out


def norm_rotate(
    library: Library, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float
) -> None:
    """Heads x float32 [T, H, D] in place: RMS norm where there is a weight [D], then rotation by cos, sin [T, D / 2]."""
    function = library.cdll.hr_norm_rotate
    function.restype = None
    function.argtypes = (c_void_p, c_int32, c_int32, c_int32, c_void_p, c_float, c_void_p, c_void_p)
    weight_at = None if weight is None else weight.data_ptr()
    function(x.data_ptr(), *x.shape, weight_at, eps, cos.data_ptr(), sin.data_ptr())


def write_kv(library: Library, cache: PagedCache, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Store k, v float32 [T, num_kv_heads, D] of one layer at `slots` int64 [T]."""
    function = library.cdll.hr_write_kv
    function.restype = None
    function.argtypes = (POINTER(KvCache), c_int32, c_int32, c_int32, c_void_p, c_void_p)
    native = cache.native
    for which, x in enumerate((k.contiguous(), v.contiguous())):
        function(ctypes.byref(native), layer, which, len(slots), x.data_ptr(), slots.data_ptr())


def split_keys(library: Library) -> int:
    """Keys of one part of a long context."""
    return int(library.cdll.hr_split_keys())


def _int32(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)
