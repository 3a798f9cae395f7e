"""In which ways a GPU can multiply with a matrix. Which one is the fastest is measured, see matmul_choice.

fused         Triton, the weight read as it is stored; activations are not rounded
library       cuBLAS, of floats
widened       the weight made floats in memory, some rows at a time, then cuBLAS
int8 units    activations rounded to int8 by row, cuBLAS on integers; of weights with one scale for each output
fp8 units     the same in fp8
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from kernels.quantized_matrix import QuantizedMatrix, Weight
from kernels.reference_matmul import multiply

# (x [m, k], bias [n] or None, dtype of the result) -> [m, n]
Product = Callable[[Tensor, Tensor | None, torch.dtype], Tensor]

_WIDENED_BYTES = 64 * 1024**2  # of floats at a time: the head of a large vocabulary would take gigabytes
_FEW_ROWS = 64  # beyond, cuBLAS reads floats as fast as memory gives them
_MOST_FUSED_ROWS = 512  # beyond, widening a weight once costs less than widening each tile anew
_HIGHEST = 128  # rows of a tile
_LEAST_INT_ROWS = 32  # cuBLAS refuses up to 16 rows; torch pads from there


@dataclass(frozen=True)
class MatmulForm:
    """`name` is kept in the file of choices. `rounds`: whether activations are rounded to the weight's bits."""

    name: str
    product: Product
    rounds: bool = False


def forms_of(weight: Weight, rows: int, multiprocessors: int) -> list[MatmulForm]:
    """The forms that `rows` rows may take, the one to take unmeasured first."""
    fused = [] if _too_many(weight, rows) else list(_fused(weight, rows, multiprocessors))
    if isinstance(weight, Tensor):
        return [MatmulForm("library", partial(_library, weight)), *fused]
    many = [form for form in (_int8_units(weight, rows), _fp8_units(weight)) if form is not None]
    many.append(MatmulForm("widened", partial(_widened, weight)))
    return fused + many if rows <= _FEW_ROWS else many + fused


def eager(weight: Weight) -> MatmulForm:
    """Slow, and works where torch does."""

    def product(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if isinstance(weight, QuantizedMatrix):
            return multiply(x, weight, bias, dtype)
        return functional.linear(x, weight, bias).to(dtype)

    return MatmulForm("eager", product)


def _too_many(weight: Weight, rows: int) -> bool:
    if not isinstance(weight, Tensor):
        return rows > _MOST_FUSED_ROWS
    return rows > _FEW_ROWS or weight.dtype == torch.float32  # which has no matrix units


def _fused(weight: Weight, rows: int, multiprocessors: int) -> Iterator[MatmulForm]:
    """Tilings that fill the GPU once, twice or four times over."""
    from kernels.triton import matmul

    arrivals = matmul.Arrivals(weight.device)
    high = min(_HIGHEST, max(16, 1 << (rows - 1).bit_length()))
    seen = set()
    for columns in (64, 128):
        tiles = -(-weight.shape[0] // columns) * -(-rows // high)
        for times in (2, 1, 4):
            splits = max(1, times * multiprocessors // tiles)
            if (columns, splits) in seen or (splits > 1 and tiles > len(arrivals.counts)):
                continue
            seen.add((columns, splits))
            tiling = matmul.Tiling(columns, high, splits, warps=4 if columns * high <= 4096 else 8)

            def product(
                x: Tensor, bias: Tensor | None, dtype: torch.dtype, tiling: matmul.Tiling = tiling
            ) -> Tensor:
                return matmul.multiply(x, weight, bias, tiling, arrivals, dtype)

            yield MatmulForm(f"fused {columns}x{high}/{splits}", product)


def _library(weight: Tensor, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if dtype == x.dtype:
        return functional.linear(x, weight, bias)
    if x.device.type != "cuda":
        return functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    y = torch.mm(x, weight.T, out_dtype=dtype)  # sums leave the matrix units as they are
    return y if bias is None else y + bias


def _widened(matrix: QuantizedMatrix, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    from kernels.triton.dequantize import dequantize

    n, k = matrix.shape
    x = _in_order(matrix, x)
    at_once = max(1, _WIDENED_BYTES // (k * x.element_size()))
    if n <= at_once:
        return _library(dequantize(matrix, x.dtype), x, bias, dtype)
    out = torch.empty(len(x), n, dtype=dtype, device=x.device)
    for begin in range(0, n, at_once):
        end = min(n, begin + at_once)
        some = dequantize(matrix, x.dtype, begin, end)
        out[:, begin:end] = _library(some, x, None if bias is None else bias[begin:end], dtype)
    return out


def _in_order(matrix: QuantizedMatrix, x: Tensor) -> Tensor:
    return x if matrix.order is None else x.index_select(1, matrix.order)


def _int8_units(matrix: QuantizedMatrix, rows: int) -> MatmulForm | None:
    n, k = matrix.shape
    if matrix.format != "int8" or matrix.group != k or n % 8 or k % 8 or rows < _LEAST_INT_ROWS:
        return None
    return MatmulForm("int8 units", partial(_on_int8_units, matrix), rounds=True)


def _on_int8_units(matrix: QuantizedMatrix, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    from kernels.triton.quantize_rows import quantize_rows, rescale

    q, scale = quantize_rows(_in_order(matrix, x), "int8")
    return rescale(torch._int_mm(q, matrix.q.T), scale, matrix.scale[0], bias, dtype)


def _fp8_units(matrix: QuantizedMatrix) -> MatmulForm | None:
    n, k = matrix.shape
    if matrix.format != "fp8" or matrix.group != k or n % 16 or k % 16 or matrix.dtype != torch.bfloat16:
        return None
    if matrix.device.type == "cuda" and torch.cuda.get_device_capability(matrix.device) < (8, 9):
        return None
    return MatmulForm("fp8 units", partial(_on_fp8_units, matrix), rounds=True)


def _on_fp8_units(matrix: QuantizedMatrix, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    from kernels.triton.quantize_rows import quantize_rows

    q, scale = quantize_rows(_in_order(matrix, x), "fp8")
    # With scales by row the result is bfloat16, whatever is asked for.
    y = torch._scaled_mm(
        q, matrix.q.T, scale_a=scale, scale_b=matrix.scale, bias=bias, out_dtype=torch.bfloat16
    )
    return y.to(dtype)
