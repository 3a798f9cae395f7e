"""Attention over the paged KV cache on a GPU: decode, prefill chunks and any mixture of them in one launch.

A program has one tile: some query tokens of one sequence under one KV head, the query heads that share it being rows of
the tile, whatever their number (a group of 7 fills 14 rows of 16 with two tokens). It goes once over the keys that the
tile sees, with the softmax kept running (Milakov & Gimelshein 2018; Dao et al. 2022). A sequence whose queries fit one
tile is cut over its context besides, each part by a program of its own, the last of which adds the parts up
(Flash-Decoding, Dao et al. 2023, in one launch). The sequence of a tile is found by bisecting query_start, as in vLLM's
unified kernel, and how long its parts are by its own context, so that neither list nor length comes from the host: a
captured launch serves any batch of its size.

Rows of a cache of latents are keys, and in their first dimensions values: they are read once for both.
"""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_step import AttentionStep
from kernels.triton.paged_kv import PagedKv, kept_in_rows, load_rows, operand_type
from kernels.triton.tiling import Tiling

__all__ = ["Tiling", "paged_attention"]

LOG2_E = math.log2(math.e)


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
    values: int | None = None,
    tiling: Tiling | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One layer's attention, as kernels.reference.paged_attention: q [T, num_heads, D] -> [T, num_heads, D] in q's dtype.

    Causal; with a `window` a token sees the last `window` positions, its own included. `sinks` [num_heads]: a score
    that takes part in the softmax of every query of its head and has no value. `softcap` c: scores become
    c * tanh(score / c) before the mask (Gemma 2). `values`: how many of a row's first dimensions are its value, for a
    cache of one plane, whose rows are keys and values; None: all; the result is [T, num_heads, values]. The heads of one
    token must lie together; tokens may have gaps. This step's keys and values must be in the cache. A sequence of no
    queries is left out, and what is no sequence's is left open. Raises ValueError.
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
    summed = dim if values is None else values
    if not 0 < summed <= dim or (summed < dim and cache.planes != 1):
        raise ValueError(
            f"{summed} of {dim} dimensions cannot be the values of a cache of {cache.planes} planes"
        )
    if out is None:
        out = torch.empty((tokens, num_heads, summed), dtype=q.dtype, device=q.device)
    seqs, width = step.block_tables.shape
    if not tokens:
        return out
    size = tiling or Tiling.choose(
        group, kv_heads, seqs, step.max_queries, step.max_length, summed, q.itemsize
    )
    if size.rows < size.heads or group % size.heads:
        raise ValueError(
            f"tiles of {size.heads} heads in {size.rows} rows do not hold the {group} heads that share a KV head"
        )
    per_tile = size.rows // size.heads  # tokens
    one_each = step.max_queries == 1 and tokens == seqs
    seen = step.max_length if window is None else min(step.max_length, window + per_tile)
    parts = min(size.parts, triton.cdiv(seen, size.least))
    # The least that a matrix unit multiplies is 16.
    padded, of_tiles = max(16, triton.next_power_of_2(summed)), num_heads // size.heads
    partial = sums = out
    if parts > 1:
        partial = torch.empty(
            (seqs, of_tiles, parts, size.rows, padded), dtype=torch.float32, device=q.device
        )
        sums = torch.empty((seqs, of_tiles, parts, 2, size.rows), dtype=torch.float32, device=q.device)
    stored, scales = cache.pointers
    arrived = _counters(q.device, seqs * of_tiles) if parts > 1 else step.lengths
    stored, scales = cache.pointers
    tiles = seqs if one_each else tokens // per_tile + seqs  # at most
    # The first parts of all tiles, then the others of all sequences, since only a sequence of one tile has others.
    _attend[(tiles + seqs * (parts - 1), of_tiles)](
        q, stored, scales, step.block_tables, out, partial, sums, arrived, q if sinks is None else sinks,
        step.query_start, step.lengths, seqs, tiles, out.stride(0), window or 0, size.least, parts,
        q.stride(0), width, stored.stride(0), stored.stride(3), layer * stored.stride(1), stored.stride(2),
        scale, softcap or 0.0,
        HEADS=size.heads, VALUES=summed, DIM=padded, ROWS=size.rows, KEYS=size.keys,
        WINDOWED=window is not None, SINKS=sinks is not None, HEAD_DIM=dim,
        TAIL=0 if summed == dim else max(16, triton.next_power_of_2(dim - summed)),
        TILES=group // size.heads, ONE_PLANE=cache.planes == 1,
        BLOCK_SIZE=cache.block_size, FORMAT=cache.format, OPERAND=operand_type(q.dtype),
        CAPPED=softcap is not None, SPLIT=parts > 1, ONE_EACH=one_each,
        num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return out


_held: dict[tuple[torch.device, int], list[Tensor]] = {}


def _counters(device: torch.device, number: int) -> Tensor:
    """Zeros, int32 [number or more], which every launch leaves as it found them: launches of one queue may share them.

    None is ever freed, as captured launches hold its address; so the first is larger than most will need.
    """
    queue = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _held.setdefault((device, queue), [])
    if not held or len(held[-1]) < number:
        # Not in a graph's memory, which other graphs write over.
        assert not (queue and torch.cuda.is_current_stream_capturing()), "it must run once before"
        held.append(
            torch.zeros(triton.next_power_of_2(max(number, 1 << 16)), dtype=torch.int32, device=device)
        )
    return held[-1]


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
def _part_of(begin, end, num_parts, least, KEYS: tl.constexpr):
    """Keys of one part of [begin, end): by the length of this context alone, in whole tiles."""
    return tl.maximum(least, tl.cdiv(tl.cdiv(end - begin, num_parts), KEYS) * KEYS)


@triton.jit
def _attend(
    q, values, scales, tables, out, parts, sums, arrived, sinks, query_start, lengths,
    num_seqs, num_tiles, stride_out, window, least, num_parts,
    stride_q, table_width, stride_block, stride_head, k_begin, stride_plane, scale, softcap,
    HEADS: tl.constexpr, VALUES: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOWED: tl.constexpr, SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, TAIL: tl.constexpr, TILES: tl.constexpr,
    ONE_PLANE: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr, OPERAND: tl.constexpr,
    CAPPED: tl.constexpr, SPLIT: tl.constexpr, ONE_EACH: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // HEADS
    LOG2_E: tl.constexpr = 1.4426950408889634
    kv_head = tl.program_id(1) // TILES
    tile = tl.program_id(0)
    part = tile * 0
    seq = tile
    if SPLIT and tile >= num_tiles:
        part = (tile - num_tiles) // num_seqs + 1
        seq = (tile - num_tiles) % num_seqs
    elif not ONE_EACH:
        seq = _sequence_of(tile, query_start, num_seqs, TOKENS)
    if ONE_EACH:
        first, count = seq, part * 0 + 1
        tile = part * 0
    else:
        first = tl.load(query_start + seq)
        count = tl.load(query_start + seq + 1) - first
        tile = tl.where(part == 0, tile - (first // TOKENS + seq), 0)
        if tile * TOKENS >= count:
            return
    length = tl.load(lengths + seq)
    begin, end = _seen(tile, count, length, window, WINDOWED, TOKENS)
    if SPLIT:
        one_tile = count <= TOKENS
        its_keys = _part_of(begin, end, num_parts, least, KEYS)
        used = tl.cdiv(end - begin, its_keys)
        # Queries whose results this program writes itself: all or none.
        direct = tl.where((count > TOKENS) | (end - begin <= its_keys), count, 0)
        begin += tl.where(one_tile, part * its_keys, 0)
        end = tl.minimum(end, tl.where(one_tile, begin + its_keys, end))
        if (part > 0) & ((count > TOKENS) | (begin >= end)):
            return

    row = tl.arange(0, ROWS)
    token = tile * TOKENS + row // HEADS
    head = tl.program_id(1) * HEADS + row % HEADS
    real = (row < TOKENS * HEADS) & (token < count)
    position = length - count + token
    column = tl.arange(0, DIM)
    here = real[:, None] & (column < VALUES)[None, :]
    q_at = q + (first + token).to(tl.int64)[:, None] * stride_q + head[:, None] * HEAD_DIM
    queries = tl.load(q_at + column[None, :], mask=here, other=0.0).to(OPERAND)
    if TAIL:  # dimensions that take part in the scores and have no value
        behind = VALUES + tl.arange(0, TAIL)
        its = real[:, None] & (behind < HEAD_DIM)[None, :]
        query_tails = tl.load(q_at + behind[None, :], mask=its, other=0.0).to(OPERAND)

    most = tl.full((ROWS,), float("-inf"), tl.float32)  # of the scores so far, in powers of two
    total = tl.zeros((ROWS,), tl.float32)
    if SINKS:
        counted = real & (token < direct) if SPLIT else real  # of parts where they are added up
        most = tl.load(sinks + head, mask=counted, other=float("-inf")).to(tl.float32) * LOG2_E
        total = tl.where(counted, 1.0, 0.0)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    table = tables + seq.to(tl.int64) * table_width
    # First the keys that all queries see, which need no mask; then what is left.
    clear = begin
    if not WINDOWED:
        seen_by_all = tl.minimum(end, length - count + tile * TOKENS + 1)
        clear = begin + tl.maximum(0, seen_by_all - begin) // KEYS * KEYS
    for stage in tl.static_range(1 if WINDOWED else 0, 2):
        for start in range(clear if stage == 1 else begin, end if stage == 1 else clear, KEYS):
            key = start + tl.arange(0, KEYS)
            inside = (key < end) if stage == 1 else tl.full((KEYS,), 1, tl.int1)
            block = tl.load(table + key // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            tile_at = block * stride_block + kv_head * stride_head
            k, k_scale = load_rows(
                values, scales, tile_at + k_begin, key % BLOCK_SIZE, inside, column,
                HEAD_DIM, BLOCK_SIZE, FORMAT, OPERAND,
            )  # fmt: skip
            scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
            if TAIL:
                tail, _ = load_rows(
                    values, scales, tile_at + k_begin, key % BLOCK_SIZE, inside, behind,
                    HEAD_DIM, BLOCK_SIZE, FORMAT, OPERAND,
                )  # fmt: skip
                scores = tl.dot(query_tails, tl.trans(tail), scores, input_precision="ieee")
            if FORMAT != 0:
                scores *= k_scale[None, :]
            if CAPPED:
                scores = softcap * (1.0 - 2.0 / (tl.exp(scores * (2.0 * scale / softcap)) + 1.0)) * LOG2_E
            else:
                scores *= scale * LOG2_E
            if stage == 1:
                visible = inside[None, :] & (key[None, :] <= position[:, None])
                if WINDOWED:
                    visible &= key[None, :] > position[:, None] - window
                scores = tl.where(visible, scores, float("-inf"))
            new = tl.maximum(most, tl.max(scores, axis=1))
            finite = new
            if stage == 1:  # no key seen yet: -inf minus itself would be NaN
                finite = tl.where(new == float("-inf"), 0.0, new)
            shrink = tl.exp2(most - finite)
            weights = tl.exp2(scores - finite[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            most = new
            v, v_scale = k, k_scale
            if not ONE_PLANE:
                v, v_scale = load_rows(
                    values, scales, tile_at + k_begin + stride_plane, key % BLOCK_SIZE, inside, column,
                    HEAD_DIM, BLOCK_SIZE, FORMAT, OPERAND,
                )  # fmt: skip
            if FORMAT != 0:
                weights *= v_scale[None, :]
            v = kept_in_rows(v, FORMAT)
            acc = tl.dot(weights.to(OPERAND), v, acc * shrink[:, None], input_precision="ieee")

    place = (
        out + (first + token).to(tl.int64)[:, None] * stride_out + head[:, None] * VALUES + column[None, :]
    )
    done = here
    if SPLIT:
        done = here & (token < direct)[:, None]
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(place, result.to(out.dtype.element_ty), mask=done)
    if SPLIT and direct == 0:
        group = seq.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        at = group * num_parts + part
        tl.store(parts + (at * ROWS + row)[:, None] * DIM + column[None, :], acc, mask=real[:, None])
        tl.store(sums + at * 2 * ROWS + row, most, mask=real)
        tl.store(sums + (at * 2 + 1) * ROWS + row, total, mask=real)
        tl.debug_barrier()  # what all threads have stored is released by the one that counts
        if tl.atomic_add(arrived + group, 1, sem="acq_rel", scope="gpu") == used - 1:
            tl.store(arrived + group, 0)
            if SINKS:
                most = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2_E
                total = tl.full((ROWS,), 1.0, tl.float32)
            else:
                most = tl.full((ROWS,), float("-inf"), tl.float32)
                total = tl.zeros((ROWS,), tl.float32)
            result = _sum_of_parts(
                parts, sums, group * num_parts, used, most, total, real, row, column, ROWS, DIM
            )
            tl.store(place, result.to(out.dtype.element_ty), mask=here)


@triton.jit
def _sum_of_parts(
    parts, sums, at, number, most, total, real, row, column, ROWS: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """In the order of the context, whichever came last. Past the first cache, which may hold what lay there before."""
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for part in range(0, number):
        its_sums = sums + (at + part) * 2 * ROWS + row
        its_most = tl.load(its_sums, mask=real, other=float("-inf"), cache_modifier=".cg")
        its_total = tl.load(its_sums + ROWS, mask=real, other=0.0, cache_modifier=".cg")
        place = parts + ((at + part) * ROWS + row)[:, None] * DIM + column[None, :]
        its_acc = tl.load(place, mask=real[:, None], other=0.0, cache_modifier=".cg")
        new = tl.maximum(most, its_most)
        finite = tl.where(new == float("-inf"), 0.0, new)
        shrink, its_shrink = tl.exp2(most - finite), tl.exp2(its_most - finite)
        total = total * shrink + its_total * its_shrink
        acc = acc * shrink[:, None] + its_acc * its_shrink[:, None]
        most = new
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]
