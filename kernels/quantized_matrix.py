"""Quantized matrices on a device, in the form that the kernels read.

value[i, j] = scale[g, i] * q[i, j] + minimum[g, i], with g = j // group. Inputs that share a scale lie together: where a
checkpoint scatters them (GPTQ's act-order), column j of q belongs to input order[j].

Two columns of int4 share a byte: of each 128, number p stands in the low and number 64 + p in the high half of byte p,
so that either half of a run of bytes is a run of columns. Columns that fill up the last 128 have no meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Format = Literal["int8", "int4", "fp8"]

PAIR = 64  # columns of int4 between the two of a byte
_STORED = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
_SCALES = (torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """[n, k]: n outputs, k inputs. Raises ValueError for parts that do not go together."""

    format: Format
    q: Tensor  # int8: int8 [n, k]; fp8: float8_e4m3fn [n, k]; int4: uint8 [n, k / 2, filled up to whole pairs]
    scale: Tensor  # float16 or float32 [groups, n]
    minimum: Tensor | None  # as scale; int4 only
    k: int
    group: int  # inputs that share a scale: 32, 64 or 128, or k
    order: Tensor | None = None  # int32 [k], a permutation
    dtype: torch.dtype = torch.bfloat16  # of the floats that it stands for: of what it is multiplied with

    def __post_init__(self) -> None:
        n, k = self.shape
        groups = -(-k // self.group)
        width = -(-k // (2 * PAIR)) * PAIR if self.format == "int4" else k
        if self.q.dtype != _STORED[self.format] or self.q.shape != (n, width):
            raise ValueError(
                f"{self.format} of {k} inputs is {_STORED[self.format]} [{n}, {width}], not "
                f"{self.q.dtype} {list(self.q.shape)}"
            )
        if self.group not in (32, 64, 128, k):
            raise ValueError(f"groups of {self.group} inputs; allowed are 32, 64, 128 or all {k}")
        if self.scale.dtype not in _SCALES or self.scale.shape != (groups, n):
            raise ValueError(
                f"scales are float16 or float32 [{groups}, {n}], not {self.scale.dtype} {list(self.scale.shape)}"
            )
        if (self.minimum is not None) != (self.format == "int4"):
            raise ValueError(f"{self.format} with a minimum: {self.minimum is not None}; int4 has one")
        if self.minimum is not None and (self.minimum.shape, self.minimum.dtype) != (
            self.scale.shape,
            self.scale.dtype,
        ):
            raise ValueError(
                f"minima {self.minimum.dtype} {list(self.minimum.shape)} are not as the scales are"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.k

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def nbytes(self) -> int:
        parts = (self.q, self.scale, self.minimum, self.order)
        return sum(part.nbytes for part in parts if part is not None)

    def rows(self, begin: int, end: int) -> QuantizedMatrix:
        """Outputs begin to end; q is a view."""
        minimum = None if self.minimum is None else self.minimum[:, begin:end].contiguous()
        scale = self.scale[:, begin:end].contiguous()
        return replace(self, q=self.q[begin:end], scale=scale, minimum=minimum)

    def picked(self, rows: Tensor) -> QuantizedMatrix:
        """The outputs `rows`, int64, in that order; a copy."""
        minimum = None if self.minimum is None else self.minimum.index_select(1, rows)
        q = self.q.view(torch.uint8).index_select(0, rows).view(self.q.dtype)
        return replace(self, q=q, scale=self.scale.index_select(1, rows), minimum=minimum)


Weight = Tensor | QuantizedMatrix  # [n, k]


def pack_int4(q: Tensor) -> Tensor:
    """uint8 [n, k] of 0..15 -> uint8 [n, ceil(k / 128) * 64], two columns a byte; fills up with zeros."""
    n, k = q.shape
    whole = torch.zeros(n, -(-k // (2 * PAIR)) * 2 * PAIR, dtype=torch.uint8, device=q.device)
    whole[:, :k] = q
    low, high = whole.view(n, -1, 2, PAIR).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """The reverse: uint8 [n, k]."""
    halves = packed.view(len(packed), -1, PAIR)
    return torch.stack((halves & 15, halves >> 4), 2).flatten(1)[:, :k]
