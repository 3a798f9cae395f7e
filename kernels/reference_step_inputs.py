"""The first operation of a step that was captured: what came packed from the host is put where the others read it."""

from __future__ import annotations

from torch import Tensor


def place_inputs(
    token_ids: Tensor,
    carried: Tensor,
    sampled: Tensor,
    blocks: Tensor,
    block_start: Tensor,
    lengths: Tensor,
    tables: Tensor,
    block_size: int,
) -> None:
    """Write `tables` int32 [S, W] and, where tokens are carried, `token_ids` int64 [T].

    carried int32 [T]: places in `sampled` (int64, one at least) of tokens that the step before this one sampled, -1 for the
    others. A token that was no number there is taken as 0. The blocks of sequence s begin at blocks[block_start[s]], as many
    as `lengths` tokens take; none where block_start (int32 [S]) is below 0. The tables' rest becomes zeros.
    """
    known = carried < 0
    found = sampled[carried.clamp_min(0).long()].clamp_min(0)
    token_ids.copy_(token_ids.where(known, found))
    tables.zero_()
    for row, (start, length) in enumerate(zip(block_start.tolist(), lengths.tolist(), strict=True)):
        if start >= 0:
            count = -(-length // block_size)
            tables[row, :count] = blocks[start : start + count]
