"""MXFP4 (OCP Microscaling Formats 1.0, section 5.3): groups of 32 four-bit floats that share a power of two."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_VALUES = torch.cat((_E2M1, -_E2M1))
_BIAS = 127


def widen(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks uint8 [rows, groups, 16], the first of two values in the low half of a byte; scales uint8 [rows, groups],
    the biased exponent. float32 [rows, groups * 32]."""
    low, high = _VALUES[(blocks & 0x0F).int()], _VALUES[(blocks >> 4).int()]
    values = torch.stack((low, high), -1).flatten(-2)  # [rows, groups, 32]
    return torch.ldexp(values, scales.int()[..., None] - _BIAS).flatten(1)
