"""Activations into int8 or fp8 with a scale for each row, and back: what stands around a product of the matrix units.

Rounds as kernels.reference_matmul.quantize_rows does, bit for bit.
"""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference_matmul import LARGEST, RowFormat
from kernels.triton.relayout import _to_e4m3

_BLOCK = 2048  # values of a row at a time


def quantize_rows(x: Tensor, format: RowFormat) -> tuple[Tensor, Tensor]:
    """[m, k] of any floats -> q int8 or float8_e4m3fn [m, k], scale float32 [m, 1]."""
    rows, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    q = torch.empty((rows, width), dtype=torch.uint8, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows:
        _quantize_rows[(rows,)](
            x, q, scale, width, x.stride(0), LARGEST[format],
            INT8=format == "int8", BLOCK=min(_BLOCK, triton.next_power_of_2(width)), num_warps=8,
        )  # fmt: skip
    return q.view(torch.int8 if format == "int8" else torch.float8_e4m3fn), scale


def rescale(
    sums: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """sums int32 [m, n] * row_scale [m, 1] * column_scale [n] + bias [n] -> [m, n] in `dtype`."""
    rows, width = sums.shape
    out = torch.empty((rows, width), dtype=dtype, device=sums.device)
    if rows:
        _rescale[(rows, triton.cdiv(width, _BLOCK))](
            sums, row_scale, column_scale, out if bias is None else bias, out, width,
            BIASED=bias is not None, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return out


@triton.jit
def _quantize_rows(x, q, scale, width, stride, largest, INT8: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(value))
    amax = tl.max(most, axis=0)
    some = amax > 0.0
    factor = tl.where(some, tl.div_rn(largest, tl.where(some, amax, 1.0)), 0.0)
    tl.store(scale + row, tl.div_rn(amax, largest))
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
        y = value * factor
        # To 1.5 * 2^23 added, the last byte is the rounded integer.
        bits = (y + 12582912.0).to(tl.int32, bitcast=True) & 0xFF if INT8 else _to_e4m3(y)
        tl.store(q + row * width + column, bits.to(tl.uint8), mask=column < width)


@triton.jit
def _rescale(
    sums, row_scale, column_scale, bias, out, width, BIASED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    y = tl.load(sums + row * width + column, mask=inside, other=0).to(tl.float32)
    y *= tl.load(row_scale + row) * tl.load(column_scale + column, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, y.to(out.dtype.element_ty), mask=inside)
