"""Attention over the paged KV cache, in eager torch.

What depends only on the step (gather indices, masks, groups) is worked out once in an `AttentionPlan` and used by
every layer, because eager overhead is paid per layer. Two forms of the same arithmetic:

* sequences with one query token (decode) of about the same length share one gather and two batched matmuls;
* a sequence with more (prefill) is gathered once, then its queries go in tiles, each against the keys up to its end.

Plain matmul + softmax instead of scaled_dot_product_attention because it is 2-3 times quicker on the CPU in bfloat16
(torch 2.13: its flash kernel does not reach oneDNN) and level in float32. In bfloat16 the scores are rounded to
bfloat16 before the softmax, as in transformers' eager attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention_step import AttentionStep
from kernels.paged_kv import PagedKv
from kernels.reference_chunk import Chunk, LayerRows, Scores, capped, softmax, tiles_of
from kernels.reference_rows import Scratch, rows_of

SPLIT_GAIN_BLOCKS = 48  # padded blocks that a further decode group must save to be worth its launches


class AttentionPlan:
    """One step's attention, prepared for all layers. It reads the step's numbers on the host."""

    def __init__(self, step: AttentionStep, cache: PagedKv, scratch: Scratch | None = None) -> None:
        """The cache must stay in place while the plan is used."""
        _, self._num_layers, self._planes, self.num_kv_heads = cache.data.shape[:4]
        self._block_size, self._head_dim = cache.block_size, cache.head_dim
        self._query_start, self._lengths = step.query_start.tolist(), step.lengths.tolist()
        self._tables = step.block_tables.long()
        self._rows = rows_of(cache, scratch or Scratch())
        self._parts: dict[int | None, list[_DecodeGroup | Chunk]] = {}  # by window
        # Number of (slot, k|v, head) in layer 0; another layer's starts further down by a constant.
        slots, self._written = step.slots, None
        if bool((slots < 0).any()):
            self._written = (slots >= 0).nonzero().flatten()
            slots = slots[self._written]
        block, offset = slots // self._block_size, slots % self._block_size
        head_rows = self._first_rows(block)[:, :, None] * self._block_size  # [planes, T, 1]
        heads = torch.arange(self.num_kv_heads, device=block.device) * self._block_size
        self._write_rows = (head_rows + heads + offset[:, None]).view(-1)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store this step's k, v [T, num_kv_heads, D] of one layer at the step's slots."""
        self._write(layer, torch.stack((self._kept(k), self._kept(v))))

    def write_latents(self, layer: int, rows: Tensor) -> None:
        """Store this step's rows [T, D] of one layer, keys and values in one, at the step's slots."""
        self._write(layer, self._kept(rows))

    def _kept(self, rows: Tensor) -> Tensor:
        return rows if self._written is None else rows.index_select(0, self._written)

    def _write(self, layer: int, values: Tensor) -> None:
        self._rows.write(self._first_tile(layer), self._write_rows, values.view(-1, self._head_dim))

    def attend(
        self,
        q: Tensor,
        layer: int,
        scale: float,
        window: int | None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """q [T, num_heads, D] -> [T, num_heads, D]. Keys and values of this step must have been written.

        Causal; with a `window` a token sees the last `window` positions, its own included. `num_heads` is a multiple
        of num_kv_heads: consecutive query heads share a KV head. `sinks` [num_heads]: a score that takes part in the
        softmax of every query of its head and has no value. `softcap`: a score s becomes softcap * tanh(s / softcap)
        (Gemma 2), before anything is hidden.
        """
        parts = self._parts.get(window)
        if parts is None:
            parts = self._parts[window] = self._divide(window, q)
        rows = LayerRows(self._rows, self._first_tile(layer))
        scores = Scores(scale, None if sinks is None else sinks.view(self.num_kv_heads, -1), softcap)
        if len(parts) == 1 and parts[0].covers_all:
            return parts[0].attend(q, rows, scores)
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        for part in parts:
            part.attend_into(out, q, rows, scores)
        return out

    def _first_tile(self, layer: int) -> int:
        return layer * self._planes * self.num_kv_heads

    def _first_rows(self, blocks: Tensor) -> Tensor:
        """Number in layer 0 of the tile of (plane, blocks[i], head 0): [planes, n]."""
        planes = torch.arange(self._planes, device=blocks.device) * self.num_kv_heads
        return planes[:, None] + blocks * (self._num_layers * self._planes * self.num_kv_heads)

    def _gather_rows(self, tables: Tensor) -> Tensor:
        """Numbers of the tiles that bring block tables [S, W] into [planes, S, num_kv_heads, W] order, flattened."""
        seqs, width = tables.shape
        first = self._first_rows(tables.reshape(-1)).view(self._planes, seqs, 1, width)
        heads = torch.arange(self.num_kv_heads, device=tables.device)
        return (first + heads[:, None]).view(-1)

    def _divide(self, window: int | None, q: Tensor) -> list[_DecodeGroup | Chunk]:
        size = self._block_size
        parts: list[_DecodeGroup | Chunk] = []
        single: list[_Single] = []
        for s, length in enumerate(self._lengths):
            start, end = self._query_start[s], self._query_start[s + 1]
            if start == end:
                continue
            position = length - (end - start)  # of the first query
            first_key = 0 if window is None else max(0, position - window + 1)
            first_block = first_key // size
            last_block = -(-length // size)
            if end - start == 1:
                single.append(_Single(start, s, first_block, last_block - first_block, first_key, length))
                continue
            gather = self._gather_rows(self._tables[s : s + 1, first_block:last_block])
            shift = first_block * size
            tiles = tiles_of(
                position - shift, end - start, None if window is None else (window, first_key - shift), q
            )
            parts.append(Chunk((self._planes, self.num_kv_heads), start, end, gather, tiles, q))
        if single:
            for group in _by_length(single):
                parts.append(_DecodeGroup(self, self._tables, group, q))
        return parts


@dataclass(frozen=True)
class _Single:
    """A sequence with one query token."""

    row: int  # of its query
    seq: int
    first_block: int  # in its block table
    num_blocks: int
    first_key: int  # first visible position
    length: int


def _by_length(singles: list[_Single]) -> list[list[_Single]]:
    """Split where padding to the longest would waste more than a further group costs."""
    ordered = sorted(singles, key=lambda item: -item.num_blocks)
    groups: list[list[_Single]] = []
    while ordered:
        longest = ordered[0].num_blocks
        gains = [(longest - item.num_blocks) * (len(ordered) - i) for i, item in enumerate(ordered)]
        best = max(range(len(gains)), key=gains.__getitem__)
        cut = best if gains[best] > SPLIT_GAIN_BLOCKS else len(ordered)
        # The head of a cut is cut again by the next round only if it is still wasteful.
        if cut < len(ordered) and cut > 1:
            groups.extend(_by_length(ordered[:cut]))
        else:
            groups.append(ordered[:cut])
        ordered = ordered[cut:]
    return [sorted(group, key=lambda item: item.row) for group in groups]


class _DecodeGroup:
    """Sequences with one query token each, padded to the longest of them."""

    def __init__(self, plan: AttentionPlan, tables: Tensor, group: list[_Single], q: Tensor) -> None:
        heads, size = plan.num_kv_heads, plan._block_size
        device = tables.device
        self.covers_all = len(group) == q.shape[0]
        self._rows = torch.tensor([item.row for item in group], device=device)
        self._planes, self._num_kv_heads = plan._planes, heads
        width = max(item.num_blocks for item in group)
        columns = torch.tensor([item.first_block for item in group], device=device)[:, None]
        columns = (columns + torch.arange(width, device=device)).clamp_(max=tables.shape[1] - 1)
        seqs = torch.tensor([item.seq for item in group], device=device)
        self._gather = plan._gather_rows(tables[seqs].gather(1, columns))
        self._keys = width * size
        shift = [item.first_block * size for item in group]
        first = torch.tensor(
            [item.first_key - s for item, s in zip(group, shift, strict=True)], device=device
        )
        end = torch.tensor([item.length - s for item, s in zip(group, shift, strict=True)], device=device)
        key = torch.arange(self._keys, device=device)
        hidden = (key < first[:, None]) | (key >= end[:, None])  # [S, keys]
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=device).masked_fill_(hidden, -torch.inf)
        self._mask = mask[:, None, None].expand(-1, heads, -1, -1).reshape(-1, 1, self._keys)

    def attend(self, q: Tensor, rows: LayerRows, how: Scores) -> Tensor:
        """Of queries [S, num_heads, D], one for each sequence of the group."""
        seqs, num_heads, dim = q.shape
        pairs = seqs * self._num_kv_heads
        planes = rows.gather(self._gather, q.dtype).view(self._planes, pairs, self._keys, dim)
        k, v = planes[0], planes[-1]
        grouped = q.reshape(pairs, num_heads // self._num_kv_heads, dim)
        if how.softcap is None:
            scores = torch.baddbmm(self._mask, grouped, k.transpose(1, 2), alpha=how.scale)
        else:
            scores = capped(torch.bmm(grouped, k.transpose(1, 2)), how.scale, how.softcap) + self._mask
        sinks = None if how.sinks is None else how.sinks.expand(seqs, -1, -1).reshape(pairs, -1)
        return torch.bmm(softmax(scores, sinks), v).view(seqs, num_heads, dim)

    def attend_into(self, out: Tensor, q: Tensor, rows: LayerRows, how: Scores) -> None:
        own = self.attend(q.index_select(0, self._rows), rows, how)
        out.index_copy_(0, self._rows, own)


def paged_attention(
    q: Tensor,
    cache: PagedKv,
    layer: int,
    step: AttentionStep,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One layer's attention without a prepared plan: q [T, num_heads, D] -> [T, num_heads, D].

    Causal, grouped-query; with a `window` a token sees the last `window` positions, its own included. This step's
    keys and values must be in the cache. A model builds one `AttentionPlan` per step instead.
    """
    return AttentionPlan(step, cache).attend(q, layer, scale, window, sinks, softcap)
