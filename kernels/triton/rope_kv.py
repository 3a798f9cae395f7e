"""From the fused projection to attention in one launch: norms of queries and keys, rotation, and the write to the cache.

One program has one token and one of its three kinds of heads: queries, which go to a tensor of their own; keys and
values, which go to the token's slot in the form that the cache holds.
"""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_step import HeadNorms
from kernels.triton.paged_kv import PagedKv, store_rows


def rotate_and_write(
    qkv: Tensor,
    num_heads: int,
    cache: PagedKv,
    layer: int,
    slots: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: HeadNorms | None = None,
) -> Tensor:
    """qkv [T, num_heads + 2 * num_kv_heads, D], the heads of a token lying together -> queries [T, num_heads, D].

    Keys and values are written to one layer of `cache` at `slots` int64 [T], which are distinct; where one is below 0
    nothing is. cos, sin [P, R / 2]: row `positions` [T] rotates the first R of the D dimensions as
    kernels.reference.apply_rope does. All in float32 but what is stored. Raises ValueError.
    """
    tokens, heads, dim = qkv.shape
    kv_heads, half = cache.num_kv_heads, cos.shape[1]
    if heads != num_heads + 2 * kv_heads or dim != cache.head_dim or cache.planes != 2:
        raise ValueError(
            f"qkv {list(qkv.shape)} is not {num_heads} heads and twice {kv_heads} KV heads of {cache.head_dim}"
        )
    if cos.shape != sin.shape or cos.stride() != sin.stride() or cos.stride(1) != 1 or 2 * half > dim:
        raise ValueError(
            f"cos {list(cos.shape)} and sin {list(sin.shape)} do not both rotate at most {dim} dimensions"
        )
    if qkv.stride(2) != 1 or qkv.stride(1) != dim:
        raise ValueError(f"the heads of a token must lie together, not by strides {qkv.stride()}")
    whole = False
    if norms is not None:
        whole = norms.q.numel() != dim
        wanted = (num_heads * dim, kv_heads * dim) if whole else (dim, dim)
        if (norms.q.numel(), norms.k.numel()) != wanted:
            raise ValueError(
                f"norms of {norms.q.numel()} and {norms.k.numel()} weights, not of one head's {dim} or of all heads'"
            )
    q = torch.empty((tokens, num_heads, dim), dtype=qkv.dtype, device=qkv.device)
    if not tokens:
        return q
    values, scales = cache.pointers
    padded = triton.next_power_of_2(dim)
    _rotate_and_write[(tokens, 3)](
        qkv, q, values, scales, slots, positions, cos, sin,
        qkv if norms is None else norms.q, qkv if norms is None else norms.k, 0.0 if norms is None else norms.eps,
        qkv.stride(0), cos.stride(0), num_heads, kv_heads,
        layer * values.stride(1), values.stride(0), values.stride(2), values.stride(3),
        HEAD_DIM=dim, DIM=padded, HALF=half, BLOCK_SIZE=cache.block_size, FORMAT=cache.format,
        HEADS=triton.next_power_of_2(num_heads), KV_HEADS=triton.next_power_of_2(kv_heads),
        NORMED=norms is not None, WHOLE=whole,
        num_warps=4 if num_heads * padded <= 8192 else 8,
        # One rounding of x * inverse, then another, where the cache is int8 or fp8: kernels/triton/relayout.py.
        enable_fp_fusion=cache.wire is None,
    )  # fmt: skip
    return q


@triton.jit
def _rotated(
    heads_at, num_heads, weight, eps, cos, sin,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    NORMED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Heads [HEADS, DIM] float32, normed and rotated; zeros beyond them. `cos`, `sin` point to the position's row."""
    head, column = tl.arange(0, HEADS), tl.arange(0, DIM)
    inside = (head < num_heads)[:, None] & (column < HEAD_DIM)[None, :]
    turned = column < 2 * HALF
    # What a dimension is rotated with is read a second time instead of being moved between threads.
    other = tl.where(column < HALF, column + HALF, column - HALF)
    other = tl.where(turned, other, column)
    at = head[:, None] * HEAD_DIM + column[None, :]
    other_at = head[:, None] * HEAD_DIM + other[None, :]
    x = tl.load(heads_at + at, mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(heads_at + other_at, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        if WHOLE:
            inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / (num_heads * HEAD_DIM) + eps)
            x = x * inverse * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
            partner = partner * inverse * tl.load(weight + other_at, mask=inside, other=0.0).to(tl.float32)
        else:
            real = column < HEAD_DIM
            inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)
            x = x * inverse[:, None] * tl.load(weight + column, mask=real, other=0.0).to(tl.float32)[None, :]
            scaled = tl.load(weight + other, mask=real, other=0.0).to(tl.float32)
            partner = partner * inverse[:, None] * scaled[None, :]
    angle = tl.where(column < HALF, column, column - HALF)
    c = tl.load(cos + angle, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
    s = tl.where(column < HALF, -s, s)
    return x * c[None, :] + partner * s[None, :]


@triton.jit
def _rotate_and_write(
    qkv, q, values, scales, slots, positions, cos, sin, q_weight, k_weight, eps,
    stride_qkv, stride_angle, num_heads, kv_heads, layer_begin, stride_block, stride_plane, stride_head,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    NORMED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    token, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = qkv + token * stride_qkv
    angles = tl.load(positions + token).to(tl.int64) * stride_angle
    column = tl.arange(0, DIM)
    if kind == 0:
        q_head = tl.arange(0, HEADS)
        queries = _rotated(
            row,
            num_heads,
            q_weight,
            eps,
            cos + angles,
            sin + angles,
            HEAD_DIM,
            DIM,
            HALF,
            HEADS,
            NORMED,
            WHOLE,
        )
        place = q + (token * num_heads + q_head)[:, None] * HEAD_DIM + column[None, :]
        real = (q_head < num_heads)[:, None] & (column < HEAD_DIM)[None, :]
        tl.store(place, queries.to(q.dtype.element_ty), mask=real)
    else:
        slot = tl.load(slots + token)
        head = tl.arange(0, KV_HEADS)
        if kind == 1:
            x = _rotated(
                row + num_heads * HEAD_DIM, kv_heads, k_weight, eps, cos + angles, sin + angles,
                HEAD_DIM, DIM, HALF, KV_HEADS, NORMED, WHOLE,
            )  # fmt: skip
            # A quantized cache sees what one of floats would hold.
            x = x.to(qkv.dtype.element_ty).to(tl.float32)
        else:
            at = (num_heads + kv_heads + head)[:, None] * HEAD_DIM + column[None, :]
            inside = (head < kv_heads)[:, None] & (column < HEAD_DIM)[None, :]
            x = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
        plane = layer_begin + (kind - 1) * stride_plane
        begin = slot // BLOCK_SIZE * stride_block + plane + head * stride_head
        offset = slot % BLOCK_SIZE + head * 0
        here = head < tl.where(slot >= 0, kv_heads, 0)
        store_rows(values, scales, begin, offset, x, here, column, HEAD_DIM, BLOCK_SIZE, FORMAT)
