"""Quantized matrices in the one form that every checkpoint format is read into and every kernel is packed from.

Integers, scales and minima stay as the checkpoint stores them: reading rounds nothing that was rounded before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

GROUP = 32  # inputs that share a scale
Q8_OFFSET = 128
SHARED = (128, 64, GROUP)
FP8_GROUP = 128  # inputs that share a scale in float8, where not all do

GroupFormat = Literal["q8", "q4"]


@dataclass(frozen=True, eq=False)
class GroupedWeight:
    """[n, k] with a scale for each 32 inputs. q8: value = d * (q - 128); q4: value = d * q + m, q in 0..15.

    Where a checkpoint scatters the inputs of a group (GPTQ's act-order), column j of q belongs to input order[j].
    """

    format: GroupFormat
    q: NDArray[np.uint8]  # [n, k], one value a byte
    d: NDArray[np.float16]  # [n, k / 32]
    m: NDArray[np.float16] | None = None  # [n, k / 32]; q4 only
    order: NDArray[np.int32] | None = None  # [k], a permutation; the native kernels have none
    shared: int = GROUP  # neighbouring inputs whose groups are known to be alike: 32, 64 or 128

    def __post_init__(self) -> None:
        n, k = self.q.shape
        expected = (n, k // GROUP)
        minima = [] if self.m is None else [self.m]
        assert k % GROUP == 0, f"{k} inputs are no multiple of {GROUP}"
        assert self.shared in SHARED, self.shared
        assert k % self.shared == 0, f"{self.shared} of {k} inputs"
        assert (self.m is not None) == (self.format == "q4"), f"{self.format} with m {self.m is not None}"
        assert self.q.dtype == np.uint8, self.q.dtype
        for part in (self.d, *minima):
            assert part.shape == expected, f"scales {part.shape} of a matrix {self.q.shape}"
            assert part.dtype == np.float16, part.dtype
        assert self.order is None or self.order.shape == (k,), f"an order of {k} inputs"

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.q.shape
        return n, k

    def dequantize(self) -> NDArray[np.float32]:
        """[n, k], inputs in the model's order: the exact product and one rounding of the sum."""
        n, k = self.q.shape
        values = self.q.reshape(n, -1, GROUP).astype(np.float32)
        if self.m is None:
            values -= Q8_OFFSET
            values *= self.d.astype(np.float32)[:, :, None]
        else:
            values *= self.d.astype(np.float32)[:, :, None]
            values += self.m.astype(np.float32)[:, :, None]
        if self.order is None:
            return values.reshape(n, k)
        restored = np.empty((n, k), np.float32)
        restored[:, self.order] = values.reshape(n, k)
        return restored


@dataclass(frozen=True, eq=False)
class ChannelWeight:
    """[n, k] with a scale for each output: value = scale * q."""

    q: NDArray[np.int8]  # [n, k]
    scale: NDArray[np.float32]  # [n]

    def __post_init__(self) -> None:
        assert self.q.dtype == np.int8, self.q.dtype
        assert self.scale.dtype == np.float32, self.scale.dtype
        assert self.scale.shape == (self.q.shape[0],), f"{self.scale.shape} scales of a matrix {self.q.shape}"

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.q.shape
        return n, k

    def dequantize(self) -> NDArray[np.float32]:
        """[n, k]."""
        values: NDArray[np.float32] = self.q.astype(np.float32)
        values *= self.scale[:, None]
        return values


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """[n, k] in float8 e4m3, with a scale for each output, or for each output and 128 inputs: value = scale * q.

    The native kernels have no such form.
    """

    q: NDArray[np.uint8]  # [n, k], the floats' bits
    scale: NDArray[np.float32]  # [n, ceil(k / group)]
    group: int  # k or 128

    def __post_init__(self) -> None:
        n, k = self.q.shape
        assert self.q.dtype == np.uint8, self.q.dtype
        assert self.group in (k, FP8_GROUP), f"groups of {self.group}"
        assert self.scale.shape == (n, -(-k // self.group)), (
            f"scales {self.scale.shape} of a matrix {self.q.shape}"
        )
        assert self.scale.dtype == np.float32, self.scale.dtype

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.q.shape
        return n, k

    def dequantize(self) -> NDArray[np.float32]:
        """[n, k]."""
        values: NDArray[np.float32] = _E4M3[self.q]
        values *= self.scale.repeat(self.group, 1)[:, : self.q.shape[1]]
        return values


def _e4m3_values() -> NDArray[np.float32]:
    """By their bits: sign, 4 of exponent with bias 7, 3 of mantissa; no infinities, and NaN where all are set."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    size[[0x7F, 0xFF]] = np.nan
    return np.where(bits < 128, size, -size).astype(np.float32)


_E4M3 = _e4m3_values()

Quantized = GroupedWeight | ChannelWeight | Fp8Weight


def same_form(parts: Sequence[Any]) -> bool:
    """Whether `parts` are all quantized, and alike enough to be one matrix."""
    first = parts[0]
    if isinstance(first, ChannelWeight):
        return all(isinstance(part, ChannelWeight) for part in parts)
    if isinstance(first, Fp8Weight):
        return all(isinstance(part, Fp8Weight) and part.group == first.group for part in parts)
    return isinstance(first, GroupedWeight) and all(
        isinstance(part, GroupedWeight)
        and part.format == first.format
        and np.array_equal(_order(part), _order(first))
        for part in parts
    )


def _order(matrix: GroupedWeight) -> NDArray[np.int32]:
    return np.arange(matrix.shape[1], dtype=np.int32) if matrix.order is None else matrix.order


def concat_rows(parts: Sequence[Quantized]) -> Quantized:
    """One matrix of `parts` below each other; they are of one form."""
    first = parts[0]
    if len(parts) == 1:
        return first
    assert same_form(parts), "matrices of different forms cannot be stacked"
    q = np.concatenate([part.q for part in parts])
    if not isinstance(first, GroupedWeight):
        scale = np.concatenate([part.scale for part in parts if not isinstance(part, GroupedWeight)])
        return (
            ChannelWeight(q, scale) if isinstance(first, ChannelWeight) else Fp8Weight(q, scale, first.group)
        )
    grouped = [part for part in parts if isinstance(part, GroupedWeight)]
    minima = [part.m for part in grouped if part.m is not None]
    return replace(
        first,
        q=q,
        d=np.concatenate([part.d for part in grouped]),
        m=np.concatenate(minima) if minima else None,
        shared=min(part.shared for part in grouped),
    )


def widest_shared(*sizes: int) -> int:
    """The widest that divides all of `sizes`, multiples of 32."""
    return next(shared for shared in SHARED if not any(size % shared for size in sizes))


def cut_rows(matrix: Quantized, rows: range) -> Quantized:
    """Some of the outputs."""
    part = slice(rows.start, rows.stop)
    if isinstance(matrix, ChannelWeight):
        return ChannelWeight(matrix.q[part], matrix.scale[part])
    if isinstance(matrix, Fp8Weight):
        return Fp8Weight(matrix.q[part], matrix.scale[part], matrix.group)
    return replace(matrix, q=matrix.q[part], d=matrix.d[part], m=None if matrix.m is None else matrix.m[part])


def cut_columns(matrix: Quantized, columns: range) -> Quantized | None:
    """Some of the inputs. None: they begin or end within a group, whose scale belongs to others too."""
    part = slice(columns.start, columns.stop)
    if isinstance(matrix, ChannelWeight):
        return ChannelWeight(matrix.q[:, part], matrix.scale)
    if isinstance(matrix, Fp8Weight) and matrix.group == matrix.shape[1]:
        return Fp8Weight(matrix.q[:, part], matrix.scale, len(columns))
    size = matrix.group if isinstance(matrix, Fp8Weight) else GROUP
    if columns.start % size or (columns.stop % size and columns.stop != matrix.shape[1]):
        return None
    groups = slice(columns.start // size, -(-columns.stop // size))
    if isinstance(matrix, Fp8Weight):
        return Fp8Weight(matrix.q[:, part], matrix.scale[:, groups], size)
    if matrix.order is not None:
        return None
    return GroupedWeight(
        matrix.format,
        matrix.q[:, part],
        matrix.d[:, groups],
        None if matrix.m is None else matrix.m[:, groups],
        shared=widest_shared(matrix.shared, columns.start, columns.stop),
    )
