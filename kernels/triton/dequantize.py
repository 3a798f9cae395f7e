"""A quantized matrix as floats in device memory, for products of so many rows that widening it once costs little."""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantized_matrix import PAIR, QuantizedMatrix
from kernels.triton.relayout import _from_e4m3

_ROWS, _COLUMNS = 16, 256  # of q, for one program
_FORMATS = {"int8": 1, "int4": 2, "fp8": 3}


def dequantize(matrix: QuantizedMatrix, dtype: torch.dtype, begin: int = 0, end: int | None = None) -> Tensor:
    """Rows begin to end, [end - begin, k] in `dtype`: scale * q + minimum, rounded once.

    Columns are in q's order, whatever `order` says.
    """
    n, k = matrix.shape
    end = n if end is None else end
    out = torch.empty((end - begin, k), dtype=dtype, device=matrix.device)
    q = matrix.q.view(torch.uint8) if matrix.format == "fp8" else matrix.q
    width = q.shape[1]
    _dequantize[(triton.cdiv(end - begin, _ROWS), triton.cdiv(width, _COLUMNS))](
        q, matrix.scale, matrix.scale if matrix.minimum is None else matrix.minimum, out, begin, end, n, k, width,
        FORMAT=_FORMATS[matrix.format], GROUP=0 if matrix.group == k else matrix.group, HALF=PAIR,
        ROWS=_ROWS, COLUMNS=_COLUMNS,
    )  # fmt: skip
    return out


@triton.jit
def _scaled(
    w, scale, minimum, out, row, column, begin, end, n, k, GROUP: tl.constexpr, INT4: tl.constexpr
):  # fmt: skip
    inside = (row < end)[:, None] & (column < k)[None, :]
    group = column * 0 if GROUP == 0 else column // GROUP
    place = group[None, :] * n + row[:, None]
    y = w * tl.load(scale + place, mask=inside, other=0.0).to(tl.float32)
    if INT4:
        y += tl.load(minimum + place, mask=inside, other=0.0).to(tl.float32)
    at = out + (row - begin)[:, None].to(tl.int64) * k + column[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["begin", "end"])
def _dequantize(
    q, scale, minimum, out, begin, end, n, k, width,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = begin + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < end)[:, None] & (place < width)[None, :]
    w = tl.load(q + row[:, None].to(tl.int64) * width + place[None, :], mask=inside, other=0)
    if FORMAT == 2:
        first = place // HALF * (2 * HALF) + place % HALF
        _scaled((w & 15).to(tl.float32), scale, minimum, out, row, first, begin, end, n, k, GROUP, True)
        _scaled(
            (w >> 4).to(tl.float32), scale, minimum, out, row, first + HALF, begin, end, n, k, GROUP, True
        )
    else:
        value = _from_e4m3(w.to(tl.int32)) if FORMAT == 3 else w.to(tl.float32)
        _scaled(value, scale, minimum, out, row, place, begin, end, n, k, GROUP, False)
