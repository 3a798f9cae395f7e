"""Products with quantized matrices in eager torch: what the kernels are held against, on any device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.quantized_matrix import QuantizedMatrix, unpack_int4

RowFormat = Literal["int8", "fp8"]  # of activations
LARGEST = {"int8": 127.0, "fp8": 448.0}


def dequantize(matrix: QuantizedMatrix) -> Tensor:
    """float32 [n, k], inputs in the model's order: the exact product and one rounding of the sum."""
    q = unpack_int4(matrix.q, matrix.k) if matrix.format == "int4" else matrix.q
    values = q.float() * _by_input(matrix.scale, matrix)
    if matrix.minimum is not None:
        values += _by_input(matrix.minimum, matrix)
    if matrix.order is None:
        return values
    restored = torch.empty_like(values)
    restored[:, matrix.order.long()] = values
    return restored


def _by_input(parts: Tensor, matrix: QuantizedMatrix) -> Tensor:
    """[groups, n] -> float32 [n, k]."""
    return parts.float().T.repeat_interleave(matrix.group, 1)[:, : matrix.k]


def multiply(
    x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """x [m, k] of any floats -> [m, n] in `dtype` (x's), with weights, products and sums in float32."""
    y = x.float() @ dequantize(matrix).T
    return (y if bias is None else y + bias.float()).to(dtype or x.dtype)


def quantize_rows(x: Tensor, format: RowFormat) -> tuple[Tensor, Tensor]:
    """[m, k] -> q [m, k], scale float32 [m, 1] = the row's largest value / 127 or 448; to the nearest, ties to even.

    A row of zeros has scale 0.
    """
    values = x.float()
    amax = values.abs().amax(1, keepdim=True)
    largest = torch.full_like(amax, LARGEST[format])  # divided by a number, torch multiplies by its inverse
    scale = amax / largest
    scaled = values * torch.where(amax > 0, largest / amax, 0)
    if format == "int8":
        return scaled.round().to(torch.int8), scale
    return scaled.to(torch.float8_e4m3fn), scale
