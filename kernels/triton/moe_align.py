"""Assignments of tokens to experts, in blocks of rows of one expert each: what a launch over all experts is cut into.

One program does it, since its work is small beside that of the experts: it counts, lays out the blocks and gives every
assignment a row. In which order the rows of an expert lie is left to chance; each row is multiplied by itself, so that no
result hangs on it.
"""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """Assignments a = token * k + j in blocks of `size` rows, each block of one expert."""

    size: int
    rows: Tensor  # int32 [blocks * size] the assignment of each row; their number where a row only fills up
    experts: Tensor  # int32 [blocks]; the number of experts where a block is not needed


def align(experts: Tensor, num_experts: int, size: int, given: Tensor | None = None) -> Blocks:
    """experts int64 [T, k], contiguous; `num_experts` and above: given to nobody, which takes no row.

    given: int64 [num_experts], to which the number of each expert's assignments is added.
    """
    count, device = experts.numel(), experts.device
    number = -(-count // size) + min(num_experts, count)  # the most blocks that there can be
    rows = torch.empty(number * size, dtype=torch.int32, device=device)
    of_blocks = torch.empty(number, dtype=torch.int32, device=device)
    cursors = torch.empty(num_experts, dtype=torch.int32, device=device)
    if number:
        _align[(1,)](
            experts, rows, of_blocks, cursors, cursors if given is None else given, count, num_experts, number,
            COUNTED=given is not None, SIZE=size, EXPERTS=max(2, triton.next_power_of_2(num_experts + 1)),
            CHUNK=min(2048, max(128, triton.next_power_of_2(count))), BLOCKS=32, num_warps=8,
        )  # fmt: skip
    return Blocks(size, rows, of_blocks)


@triton.jit
def _align(
    experts, rows, of_blocks, cursors, given, count, num_experts, number,
    COUNTED: tl.constexpr, SIZE: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    counts = tl.zeros((EXPERTS,), tl.int32)
    for begin in range(0, count, CHUNK):
        a = begin + tl.arange(0, CHUNK)
        expert = tl.load(experts + a, mask=a < count, other=num_experts)
        counts += tl.histogram(tl.minimum(expert, num_experts).to(tl.int32), EXPERTS)
    bin = tl.arange(0, EXPERTS)
    real = bin < num_experts
    counts = tl.where(real, counts, 0)
    padded = tl.cdiv(counts, SIZE) * SIZE
    ends = tl.cumsum(padded, axis=0)
    tl.store(cursors + bin, ends - padded, mask=real)
    if COUNTED:
        tl.store(given + bin, tl.load(given + bin, mask=real, other=0) + counts, mask=real)
    for begin in range(0, number, BLOCKS):
        block = begin + tl.arange(0, BLOCKS)
        before = (ends[None, :] <= (block * SIZE)[:, None]) & real[None, :]
        tl.store(of_blocks + block, tl.sum(before.to(tl.int32), axis=1), mask=block < number)
    for begin in range(0, number * SIZE, CHUNK):
        row = begin + tl.arange(0, CHUNK)
        tl.store(rows + row, row * 0 + count, mask=row < number * SIZE)
    tl.debug_barrier()  # other threads of this program have written the cursors and what is now written over
    for begin in range(0, count, CHUNK):
        a = begin + tl.arange(0, CHUNK)
        expert = tl.load(experts + a, mask=a < count, other=num_experts)
        somebody = expert < num_experts
        row = tl.atomic_add(cursors + expert, 1, mask=somebody)
        tl.store(rows + row, a, mask=somebody)
