"""Attention over the paged KV cache on a GPU: decode, prefill chunks and any mixture of them in one launch.

A program has one tile: some query tokens of one sequence under one KV head, all query heads that share it being rows of
the tile, whatever their number (a group of 7 fills 14 rows of 16 with two tokens). It goes once over the keys that the
tile sees, with the softmax kept running (Milakov & Gimelshein 2018; Dao et al. 2022). A sequence whose queries fit one
tile is cut over its context besides, each part by a program of its own, and a second launch adds the parts up
(Flash-Decoding, Dao et al. 2023). The sequence of a tile is found by bisecting query_start, as in vLLM's unified kernel,
so that no list of tiles comes from the host and a captured launch serves other batches.
"""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_step import AttentionStep
from kernels.triton.paged_kv import PagedKv, load_rows, operand_type

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the work is cut up. It changes speed, and in the last bits the order of sums."""

    rows: int  # of a tile: a power of two, at least 16
    keys: int  # looked at together: a power of two, at least 16
    split_keys: int  # of a part of a context
    warps: int = 4
    stages: int = 2

    @classmethod
    def choose(cls, group: int, max_queries: int, max_length: int, dim: int, itemsize: int) -> Tiling:
        """By sizes alone, not by how many sequences there are."""
        wanted: int = triton.next_power_of_2(group * max_queries)
        rows = max(16, triton.next_power_of_2(group), min(wanted, 64 if dim > 128 or itemsize == 4 else 128))
        keys = 64 if dim * itemsize <= 256 else 32
        split = max(256, triton.next_power_of_2(max_length) // 16)
        return cls(rows, keys, split, 8 if rows >= 128 else 4, 3 if rows <= 32 else 2)


def paged_attention(
    q: Tensor,
    cache: PagedKv,
    layer: int,
    step: AttentionStep,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    *,
    softcap: float | None = None,
    tiling: Tiling | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One layer's attention, as kernels.reference.paged_attention: q [T, num_heads, D] -> [T, num_heads, D] in q's dtype.

    Causal; with a `window` a token sees the last `window` positions, its own included. `sinks` [num_heads]: a score
    that takes part in the softmax of every query of its head and has no value. `softcap` c: scores become
    c * tanh(score / c) before the mask (Gemma 2). The heads of one token must lie together; tokens may have gaps.
    This step's keys and values must be in the cache. A sequence of no queries is left out. Raises ValueError.
    """
    tokens, num_heads, dim = q.shape
    kv_heads, group = cache.num_kv_heads, num_heads // cache.num_kv_heads
    if dim != cache.head_dim or num_heads % kv_heads:
        raise ValueError(
            f"{num_heads} heads of {dim} do not attend to {kv_heads} KV heads of {cache.head_dim}"
        )
    if not 0 <= layer < cache.data.shape[1]:
        raise ValueError(f"layer {layer} of a cache that has {cache.data.shape[1]}")
    if q.stride(2) != 1 or q.stride(1) != dim:
        raise ValueError(f"the heads of a token must lie together, not by strides {q.stride()}")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    seqs, width = step.block_tables.shape
    if not tokens:
        return out
    size = tiling or Tiling.choose(group, step.max_queries, step.max_length, dim, q.itemsize)
    if size.rows < group:
        raise ValueError(f"a tile of {size.rows} rows does not hold the {group} heads that share a KV head")
    per_tile = size.rows // group  # tokens
    one_each = step.max_queries == 1 and tokens == seqs
    seen = step.max_length if window is None else min(step.max_length, window + per_tile)
    splits = triton.cdiv(seen, size.split_keys)
    padded = triton.next_power_of_2(dim)
    parts = sums = out
    if splits > 1:
        parts = torch.empty((seqs, kv_heads, splits, size.rows, padded), dtype=torch.float32, device=q.device)
        sums = torch.empty((seqs, kv_heads, splits, 2, size.rows), dtype=torch.float32, device=q.device)
    values, scales = cache.pointers
    plane = values.stride(2)
    where = (out, parts, sums, q if sinks is None else sinks, step.query_start, step.lengths)
    numbers = (seqs, out.stride(0), window or 0, size.split_keys, splits)
    kinds = {
        "GROUP": group, "HEAD_DIM": dim, "DIM": padded, "ROWS": size.rows,
        "WINDOWED": window is not None, "SINKS": sinks is not None,
    }  # fmt: skip
    _attend[(seqs if one_each else tokens // per_tile + seqs, kv_heads, splits)](
        q, values, scales, step.block_tables, *where, *numbers,
        q.stride(0), width, values.stride(0), values.stride(3),
        layer * values.stride(1), layer * values.stride(1) + (cache.planes - 1) * plane,
        scale, softcap or 0.0,
        **kinds, KEYS=size.keys, BLOCK_SIZE=cache.block_size, FORMAT=cache.format, OPERAND=operand_type(q.dtype),
        CAPPED=softcap is not None, SPLIT=splits > 1, ONE_EACH=one_each,
        num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    if splits > 1:
        _add_parts[(seqs, kv_heads)](*where, *numbers, **kinds)
    return out


@triton.jit
def _sequence_of(tile, query_start, num_seqs, TOKENS: tl.constexpr):
    """The last s with query_start[s] // TOKENS + s <= tile: every sequence has that many tiles and one before it."""
    low = tile * 0
    high = low + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _seen(tile, count, length, window, WINDOWED: tl.constexpr, TOKENS: tl.constexpr):
    """The positions that some query of the tile sees: [begin, end)."""
    position = length - count + tile * TOKENS  # of the tile's first query
    begin = 0
    if WINDOWED:
        begin = tl.maximum(0, position - window + 1)
    return begin, tl.minimum(length, position + TOKENS)


@triton.jit
def _attend(
    q, values, scales, tables, out, parts, sums, sinks, query_start, lengths,
    num_seqs, stride_out, window, split_keys, num_splits,
    stride_q, table_width, stride_block, stride_head, k_begin, v_begin, scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    WINDOWED: tl.constexpr, SINKS: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr, OPERAND: tl.constexpr,
    CAPPED: tl.constexpr, SPLIT: tl.constexpr, ONE_EACH: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // GROUP
    LOG2_E: tl.constexpr = 1.4426950408889634
    kv_head = tl.program_id(1)
    if ONE_EACH:
        seq = tl.program_id(0)
        tile = seq * 0
        first, count = seq, tile + 1
    else:
        seq = _sequence_of(tl.program_id(0), query_start, num_seqs, TOKENS)
        first = tl.load(query_start + seq)
        count = tl.load(query_start + seq + 1) - first
        tile = tl.program_id(0) - (first // TOKENS + seq)
        if tile * TOKENS >= count:
            return
    length = tl.load(lengths + seq)
    begin, end = _seen(tile, count, length, window, WINDOWED, TOKENS)
    part = tl.program_id(2)
    if SPLIT:
        one_tile = count <= TOKENS
        # Queries whose results this program writes itself: all or none.
        direct = tl.where((count > TOKENS) | (end - begin <= split_keys), count, 0)
        begin += tl.where(one_tile, part * split_keys, 0)
        end = tl.minimum(end, tl.where(one_tile, begin + split_keys, end))
        if (part > 0) & ((count > TOKENS) | (begin >= end)):
            return

    row = tl.arange(0, ROWS)
    token = tile * TOKENS + row // GROUP
    head = kv_head * GROUP + row % GROUP
    real = (row < TOKENS * GROUP) & (token < count)
    position = length - count + token
    column = tl.arange(0, DIM)
    here = real[:, None] & (column < HEAD_DIM)[None, :]
    queries = tl.load(
        q + (first + token).to(tl.int64)[:, None] * stride_q + head[:, None] * HEAD_DIM + column[None, :],
        mask=here, other=0.0,
    ).to(OPERAND)  # fmt: skip

    most = tl.full((ROWS,), float("-inf"), tl.float32)  # of the scores so far, in powers of two
    total = tl.zeros((ROWS,), tl.float32)
    if SINKS:
        counted = real & (token < direct) if SPLIT else real  # of parts where they are added up
        most = tl.load(sinks + head, mask=counted, other=float("-inf")).to(tl.float32) * LOG2_E
        total = tl.where(counted, 1.0, 0.0)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    table = tables + seq.to(tl.int64) * table_width
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < end
        block = tl.load(table + key // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        tile_at = block * stride_block + kv_head * stride_head
        k, k_scale = load_rows(
            values, scales, tile_at + k_begin, key % BLOCK_SIZE, inside, column,
            HEAD_DIM, BLOCK_SIZE, FORMAT, OPERAND,
        )  # fmt: skip
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        if FORMAT != 0:
            scores *= k_scale[None, :]
        if CAPPED:
            scores = softcap * (1.0 - 2.0 / (tl.exp(scores * (2.0 / softcap)) + 1.0))
        visible = inside[None, :] & (key[None, :] <= position[:, None])
        if WINDOWED:
            visible &= key[None, :] > position[:, None] - window
        scores = tl.where(visible, scores * LOG2_E, float("-inf"))
        new = tl.maximum(most, tl.max(scores, axis=1))
        finite = tl.where(new == float("-inf"), 0.0, new)  # no key seen yet: -inf minus itself would be NaN
        shrink = tl.exp2(most - finite)
        weights = tl.exp2(scores - finite[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        most = new
        v, v_scale = load_rows(
            values, scales, tile_at + v_begin, key % BLOCK_SIZE, inside, column,
            HEAD_DIM, BLOCK_SIZE, FORMAT, OPERAND,
        )  # fmt: skip
        if FORMAT != 0:
            weights *= v_scale[None, :]
        acc = tl.dot(weights.to(OPERAND), v, acc * shrink[:, None], input_precision="ieee")

    done = here
    if SPLIT:
        done = here & (token < direct)[:, None]
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place = out + (first + token).to(tl.int64)[:, None] * stride_out + head[:, None] * HEAD_DIM
    tl.store(place + column[None, :], result.to(out.dtype.element_ty), mask=done)
    if SPLIT:
        kept = real & (token >= direct)
        at = (seq.to(tl.int64) * tl.num_programs(1) + kv_head) * num_splits + part
        tl.store(parts + (at * ROWS + row)[:, None] * DIM + column[None, :], acc, mask=kept[:, None])
        tl.store(sums + at * 2 * ROWS + row, most, mask=kept)
        tl.store(sums + (at * 2 + 1) * ROWS + row, total, mask=kept)


@triton.jit
def _add_parts(
    out, parts, sums, sinks, query_start, lengths,
    num_seqs, stride_out, window, split_keys, num_splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    WINDOWED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // GROUP
    LOG2_E: tl.constexpr = 1.4426950408889634
    seq, kv_head = tl.program_id(0), tl.program_id(1)
    first = tl.load(query_start + seq)
    count = tl.load(query_start + seq + 1) - first
    begin, end = _seen(0, count, tl.load(lengths + seq), window, WINDOWED, TOKENS)
    if (count > TOKENS) | (end - begin <= split_keys):
        return
    row, column = tl.arange(0, ROWS), tl.arange(0, DIM)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    real = (row < TOKENS * GROUP) & (token < count)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SINKS:
        most = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2_E
        total = tl.full((ROWS,), 1.0, tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    at = (seq.to(tl.int64) * tl.num_programs(1) + kv_head) * num_splits
    for part in range(0, tl.cdiv(end - begin, split_keys)):
        its_most = tl.load(sums + (at + part) * 2 * ROWS + row, mask=real, other=float("-inf"))
        its_total = tl.load(sums + ((at + part) * 2 + 1) * ROWS + row, mask=real, other=0.0)
        place = parts + ((at + part) * ROWS + row)[:, None] * DIM + column[None, :]
        its_acc = tl.load(place, mask=real[:, None], other=0.0)
        new = tl.maximum(most, its_most)
        finite = tl.where(new == float("-inf"), 0.0, new)
        shrink, its_shrink = tl.exp2(most - finite), tl.exp2(its_most - finite)
        total = total * shrink + its_total * its_shrink
        acc = acc * shrink[:, None] + its_acc * its_shrink[:, None]
        most = new
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place = (
        out + (first + token).to(tl.int64)[:, None] * stride_out + head[:, None] * HEAD_DIM + column[None, :]
    )
    tl.store(place, result.to(out.dtype.element_ty), mask=real[:, None] & (column < HEAD_DIM)[None, :])
