"""Block tables spread to full width and tokens taken from the step before, in one launch that a graph can begin with."""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_PIECE = 1024


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
    """As kernels.reference_step_inputs.place_inputs, without looking at lengths on the host."""
    seqs, table_width = tables.shape
    tokens = len(token_ids)
    _place[(seqs + triton.cdiv(tokens, _PIECE),)](
        token_ids, carried, sampled, blocks, block_start, lengths, tables, tokens, seqs, table_width,
        BLOCK_SIZE=block_size, PIECE=_PIECE,
    )  # fmt: skip


@triton.jit
def _place(
    token_ids, carried, sampled, blocks, block_start, lengths, tables, num_tokens, num_seqs, table_width,
    BLOCK_SIZE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    place = tl.arange(0, PIECE)
    if program < num_seqs:
        first = tl.load(block_start + program)
        live = tl.where(first < 0, 0, tl.cdiv(tl.load(lengths + program), BLOCK_SIZE))
        row = tables + program.to(tl.int64) * table_width
        for start in range(0, table_width, PIECE):
            column = start + place
            block = tl.load(blocks + first + column, mask=column < live, other=0)
            tl.store(row + column, block, mask=column < table_width)
    else:
        token = (program - num_seqs) * PIECE + place
        sample = tl.load(carried + token, mask=token < num_tokens, other=-1)
        taken = sample >= 0
        found = tl.load(sampled + sample, mask=taken, other=0)
        tl.store(token_ids + token, tl.maximum(found, 0), mask=taken)
