"""Keys and values to their slots as they are, in the form that the cache holds: for models that rotate them elsewhere."""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.paged_kv import PagedKv
from kernels.triton.paged_kv import store_rows


def write_kv(k: Tensor, v: Tensor, cache: PagedKv, layer: int, slots: Tensor) -> None:
    """k, v [T, num_kv_heads, D] into one layer of `cache` at `slots` int64 [T], which are distinct; below 0: nowhere.

    Any strides, but the values of a head lie together. Raises ValueError.
    """
    tokens, heads, dim = k.shape
    wanted = (cache.num_kv_heads, cache.head_dim, 2)
    if k.shape != v.shape or (heads, dim, cache.planes) != wanted or (k.stride(2), v.stride(2)) != (1, 1):
        raise ValueError(
            f"keys {list(k.shape)} and values {list(v.shape)} of strides {k.stride()}, {v.stride()} do not go into "
            f"{cache.planes} planes of {cache.num_kv_heads} heads of {cache.head_dim}"
        )
    if not tokens:
        return
    values, scales = cache.pointers
    _write_kv[(tokens, 2)](
        k, v, values, scales, slots, k.stride(0), k.stride(1), v.stride(0), v.stride(1), heads,
        layer * values.stride(1), values.stride(0), values.stride(2), values.stride(3),
        HEAD_DIM=dim, DIM=triton.next_power_of_2(dim), HEADS=triton.next_power_of_2(heads),
        BLOCK_SIZE=cache.block_size, FORMAT=cache.format, enable_fp_fusion=cache.wire is None,
    )  # fmt: skip


@triton.jit
def _write_kv(
    k, v, values, scales, slots, stride_k, stride_k_head, stride_v, stride_v_head, num_heads,
    layer_begin, stride_block, stride_plane, stride_head,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    token, plane = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    head, column = tl.arange(0, HEADS), tl.arange(0, DIM)
    inside = (head < num_heads)[:, None] & (column < HEAD_DIM)[None, :]
    if plane == 0:
        at = k + token * stride_k + head[:, None] * stride_k_head + column[None, :]
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        at = v + token * stride_v + head[:, None] * stride_v_head + column[None, :]
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    begin = slot // BLOCK_SIZE * stride_block + layer_begin + plane * stride_plane + head * stride_head
    here = head < tl.where(slot >= 0, num_heads, 0)
    store_rows(
        values, scales, begin, slot % BLOCK_SIZE + head * 0, x, here, column, HEAD_DIM, BLOCK_SIZE, FORMAT
    )
