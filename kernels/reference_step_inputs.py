"""The first operation of a step that was captured: what came packed from the host is put where the others read it."""

from __future__ import annotations

from torch import Tensor


def place_inputs(
    token_ids: Tensor, carried: Tensor, sampled: Tensor, packed: Tensor, width: Tensor, tables: Tensor
) -> None:
    """Write `tables` int32 [S, W] and, where tokens are carried, `token_ids` int64 [T].

    carried int32 [T]: places in `sampled` (int64, one at least) of tokens that the step before this one sampled, -1 for the others. A
    token that was no number there is taken as 0. packed int32: S rows of `width` (int32 [1]) one after another; the
    tables' rest becomes zeros.
    """
    known = carried < 0
    found = sampled[carried.clamp_min(0).long()].clamp_min(0)
    token_ids.copy_(token_ids.where(known, found))
    seqs, live = len(tables), int(width)
    tables[:, :live] = packed[: seqs * live].view(seqs, live)
    tables[:, live:] = 0
