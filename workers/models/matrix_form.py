"""A checkpoint's matrices in the form that a scheme says: as stored, as floats, or quantized on loading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.models.quantize import quantize_channels, quantize_fp8, quantize_q4, quantize_q8
from workers.models.quantized import (
    GROUP,
    ChannelWeight,
    Fp8Weight,
    GroupedWeight,
    Quantized,
    concat_rows,
    same_form,
)
from workers.models.scheme import Scheme

Matrix = Tensor | Quantized  # [out, in]


@dataclass(frozen=True)
class MatrixForm:
    """every_form: matrices may come in forms that the native kernels do not have. These are float8, which comes as
    floats otherwise, and scattered inputs, which come in eight bits. quantize_on: a device that does it faster.
    """

    scheme: Scheme
    every_form: bool = False
    quantize_on: torch.device | None = None

    def stored(self, found: Matrix) -> Matrix:
        """What a checkpoint holds, before it is fused with others."""
        if self.every_form or isinstance(found, (Tensor, ChannelWeight)):
            return found
        if isinstance(found, Fp8Weight):
            return to_float(found)
        if found.order is None:
            return found
        values = to_float(found)
        return quantize_q8(values) if self.scheme.name == "stored" else values

    def fused(self, parts: Sequence[Matrix], head: bool = False, was_quantized: bool = False) -> Matrix:
        """`parts` below each other. was_quantized: some of them, in the file, although they came as floats."""
        name, first = self.scheme.name, parts[0]
        if name == "none":
            return _floats(parts)
        if name == "fp8":
            if isinstance(first, Fp8Weight) and same_form(parts):
                return _stacked(parts)
            # Logits decide: three bits of mantissa cost more there than anywhere else.
            in_groups = head and not first.shape[1] % GROUP
            return (quantize_q8 if in_groups else quantize_fp8)(self._values(parts))
        if name == "int8":
            if isinstance(first, ChannelWeight) and same_form(parts):
                return _stacked(parts)
            # A scale for each output goes with one scale for each row of activations, and those have outliers: KL to
            # float32 0.039 on SmolLM2, 0.004 with a scale for each 32 inputs on both sides (docs/quantization.md).
            values = self._values(parts)
            return quantize_channels(values) if values.shape[1] % GROUP else quantize_q8(values)
        if name == "int4":
            wanted = "q8" if head else "q4"
            if isinstance(first, GroupedWeight) and first.format == wanted and same_form(parts):
                return _stacked(parts)
            return (quantize_q8 if head else quantize_q4)(self._values(parts))
        if same_form(parts):
            return _stacked(parts)
        # Fused of different forms, or of one that the kernels do not hold: eight bits are as good as what was stored.
        was_quantized = was_quantized or any(not isinstance(part, Tensor) for part in parts)
        if was_quantized and not first.shape[1] % GROUP:
            return quantize_q8(self._values(parts))
        return _floats(parts)

    def _values(self, parts: Sequence[Matrix]) -> Tensor:
        values = _floats(parts)
        return values if self.quantize_on is None else values.to(self.quantize_on)


def to_float(matrix: Matrix) -> Tensor:
    """The values of `matrix`: as they are, or float32."""
    return matrix if isinstance(matrix, Tensor) else torch.from_numpy(matrix.dequantize())


def _floats(parts: Sequence[Matrix]) -> Tensor:
    return to_float(parts[0]) if len(parts) == 1 else torch.cat([to_float(part) for part in parts])


def _stacked(parts: Sequence[Matrix]) -> Quantized:
    return concat_rows([part for part in parts if not isinstance(part, Tensor)])
