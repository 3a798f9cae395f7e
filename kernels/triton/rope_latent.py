"""Latent attention between its projections and its scores in one launch: the norm of what is cached, both rotations, and
the write to the cache."""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.paged_kv import PagedKv
from kernels.triton.paged_kv import store_rows


def rotate_and_write_latents(
    rows: Tensor,
    queries: Tensor,
    cache: PagedKv,
    layer: int,
    slots: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor,
    eps: float,
) -> Tensor:
    """rows [T, L + R], a latent and a key; queries [T, num_heads, N + R] -> queries [T, num_heads, L + R].

    The latent is normed by `weight` [L], the key rotated, and both are written to one layer of `cache`, of one plane, at
    `slots` int64 [T], which are distinct; where one is below 0 nothing is. cos, sin [P, R / 2]: row `positions` [T]. Of
    the result the last R are the queries' rotated last R, the first L are left open. Raises ValueError.
    """
    tokens, num_heads, query_dim = queries.shape
    dim, rank, rotated = rows.shape[1], weight.shape[0], 2 * cos.shape[1]
    if (cache.planes, cache.num_kv_heads, cache.head_dim) != (1, 1, dim) or rank + rotated != dim:
        raise ValueError(
            f"rows of {dim}, a norm of {rank} and a rotation of {rotated} do not go with a cache of {cache.planes} planes, "
            f"{cache.num_kv_heads} heads of {cache.head_dim}"
        )
    if rows.stride(1) != 1 or queries.stride(2) != 1 or queries.stride(1) != query_dim or query_dim < rotated:
        raise ValueError(
            f"rows of strides {rows.stride()} and queries {list(queries.shape)} of strides {queries.stride()}: the values "
            "of a token must lie together"
        )
    q = torch.empty((tokens, num_heads, dim), dtype=queries.dtype, device=queries.device)
    if not tokens:
        return q
    values, scales = cache.pointers
    _rotate_and_write_latents[(tokens, 2)](
        rows, queries, q, values, scales, slots, positions, cos, sin, weight, eps,
        rows.stride(0), queries.stride(0), query_dim, cos.stride(0), num_heads,
        layer * values.stride(1), values.stride(0),
        RANK=rank, HALF=rotated // 2, HEAD_DIM=dim, DIM=triton.next_power_of_2(dim),
        ROTATED=triton.next_power_of_2(rotated), HEADS=triton.next_power_of_2(num_heads),
        BLOCK_SIZE=cache.block_size, FORMAT=cache.format,
        enable_fp_fusion=cache.wire is None,  # as in kernels/triton/rope_kv.py
    )  # fmt: skip
    return q


@triton.jit
def _rotate_and_write_latents(
    rows, queries, q, values, scales, slots, positions, cos, sin, weight, eps,
    stride_rows, stride_queries, query_dim, stride_angle, num_heads, layer_begin, stride_block,
    RANK: tl.constexpr, HALF: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    ROTATED: tl.constexpr, HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    angles = tl.load(positions + token).to(tl.int64) * stride_angle
    if tl.program_id(1) == 0:
        _turn_queries(
            queries + token * stride_queries + query_dim - 2 * HALF, q + token * num_heads * HEAD_DIM + RANK,
            cos + angles, sin + angles, query_dim, num_heads, HALF, HEAD_DIM, ROTATED, HEADS,
        )  # fmt: skip
    else:
        column = tl.arange(0, DIM)
        x = _row(
            rows + token * stride_rows, cos + angles, sin + angles, weight, eps, column, RANK, HALF, HEAD_DIM
        )
        # A quantized cache sees what one of floats would hold.
        x = x.to(rows.dtype.element_ty).to(tl.float32)
        slot = tl.load(slots + token)
        one = tl.arange(0, 1)
        begin = slot // BLOCK_SIZE * stride_block + layer_begin + one
        here = one < tl.where(slot >= 0, 1, 0)
        store_rows(
            values, scales, begin, slot % BLOCK_SIZE + one, x[None, :], here, column, HEAD_DIM, BLOCK_SIZE, FORMAT
        )  # fmt: skip


@triton.jit
def _turn_queries(
    queries, q, cos, sin, query_dim, num_heads,
    HALF: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Of all heads of a token, whose first rotated dimension is at `queries` and goes to `q`."""
    turn, head = tl.arange(0, ROTATED), tl.arange(0, HEADS)
    inside = (head < num_heads)[:, None] & (turn < 2 * HALF)[None, :]
    # What a dimension is rotated with is read a second time instead of being moved between threads.
    other = tl.where(turn < HALF, turn + HALF, turn - HALF)
    at = queries + head[:, None] * query_dim
    x = tl.load(at + turn[None, :], mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(at + other[None, :], mask=inside, other=0.0).to(tl.float32)
    c, s = _angle(cos, sin, turn, turn < 2 * HALF, HALF)
    turned = x * c[None, :] + partner * s[None, :]
    tl.store(q + head[:, None] * HEAD_DIM + turn[None, :], turned.to(q.dtype.element_ty), mask=inside)


@triton.jit
def _row(
    row, cos, sin, weight, eps, column, RANK: tl.constexpr, HALF: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """The latent normed, the key behind it rotated, zeros behind that: float32, as `column`."""
    latent, turned = column < RANK, (column >= RANK) & (column < HEAD_DIM)
    x = tl.load(row + column, mask=column < HEAD_DIM, other=0.0).to(tl.float32)
    of_latent = tl.where(latent, x, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(of_latent * of_latent, axis=0) / RANK + eps)
    normed = of_latent * inverse * tl.load(weight + column, mask=latent, other=0.0).to(tl.float32)
    turn = column - RANK
    partner = tl.load(row + tl.where(turn < HALF, column + HALF, column - HALF), mask=turned, other=0.0)
    c, s = _angle(cos, sin, turn, turned, HALF)
    return tl.where(latent, normed, tl.where(turned, x * c + partner.to(tl.float32) * s, 0.0))


@triton.jit
def _angle(cos, sin, turn, turned, HALF: tl.constexpr):
    """The factors of dimension `turn` itself and of the one that it is rotated with."""
    angle = tl.where(turn < HALF, turn, turn - HALF)
    c = tl.load(cos + angle, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
    return c, tl.where(turn < HALF, -s, s)
