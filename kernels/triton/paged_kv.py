"""Rows of a paged KV cache (kernels/paged_kv.py) in Triton: a row's values out of its stored form, and into it."""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.paged_kv import PagedKv
from kernels.triton.relayout import _from_e4m3, _to_e4m3

__all__ = ["PagedKv", "kept_in_rows", "load_rows", "operand_type", "store_rows"]


def operand_type(dtype: torch.dtype) -> tl.dtype:
    """In what type `tl.dot` multiplies. Triton's interpreter takes bfloat16's bits for whole numbers there."""
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    if dtype not in types:
        raise ValueError(f"{dtype} is not computed with; known: {', '.join(map(str, types))}")
    return tl.float32 if triton.knobs.runtime.interpret else types[dtype]


@triton.jit
def load_rows(
    values, scales, begin, token, inside, column,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Rows [N, columns] of `token` [N] in the tiles that begin at `begin` [N], in OPERAND, and their scales [N].

    x = row * scale: what is not multiplied by the scale here is exact in any type. Zeros where not `inside`.
    """
    place = values + begin[:, None] + token[:, None] * HEAD_DIM + column[None, :]
    stored = tl.load(place, mask=inside[:, None] & (column < HEAD_DIM)[None, :], other=0)
    if FORMAT == 0:
        rows = stored.to(OPERAND)
        scale = tl.full((token.shape[0],), 1.0, tl.float32)
    else:
        scale = tl.load(scales + (begin + BLOCK_SIZE * HEAD_DIM) // 4 + token, mask=inside, other=0.0)
        if FORMAT == 1:
            rows = stored.to(OPERAND)
        elif FORMAT == 2:
            rows = _from_e4m3(stored.to(tl.int32)).to(OPERAND)
        else:
            rows = stored.to(tl.float8e4nv, bitcast=True).to(OPERAND)
    return rows, scale


@triton.jit
def kept_in_rows(x, FORMAT: tl.constexpr):
    """x, rows that were widened: the compiler may not move that behind a change of layout.

    A matrix unit takes values by column. The compiler would fetch those from shared memory as bytes, one at a time, and
    widen them there; 16 bits it transposes on the way. So a row is widened as it was loaded.
    """
    if FORMAT != 0 and x.dtype.primitive_bitwidth == 16:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


@triton.jit
def store_rows(
    values, scales, begin, token, x, inside, column,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """The reverse: x float32 [N, columns], zero beyond HEAD_DIM. Rounds as kernels.reference_relayout does."""
    place = values + begin[:, None] + token[:, None] * HEAD_DIM + column[None, :]
    here = inside[:, None] & (column < HEAD_DIM)[None, :]
    if FORMAT == 0:
        tl.store(place, x.to(values.dtype.element_ty), mask=here)
    else:
        # Bits of floats without a sign are in order, those that are not finite last; a maximum of floats loses NaN.
        most = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        amax = most.to(tl.float32, bitcast=True)
        finite = most < 0x7F800000
        some = finite & (amax > 1e-30)
        largest = tl.full(amax.shape, 127.0 if FORMAT == 1 else 448.0, tl.float32)
        divisor = tl.where(some, amax, 1.0)
        y = tl.where(some[:, None], x * tl.div_rn(largest, divisor)[:, None], 0.0)
        scale = tl.where(finite, tl.where(some, tl.div_rn(divisor, largest), 0.0), float("nan"))
        # To 1.5 * 2^23 added, the last byte is the rounded integer.
        q = (y + 12582912.0).to(tl.int32, bitcast=True) & 0xFF if FORMAT == 1 else _to_e4m3(y)
        tl.store(place, q.to(tl.uint8).to(values.dtype.element_ty, bitcast=True), mask=here)
        tl.store(scales + (begin + BLOCK_SIZE * HEAD_DIM) // 4 + token, scale, mask=inside)
