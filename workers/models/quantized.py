"""Quantized matrices in the one form that every checkpoint format is read into and every kernel is packed from.

Integers, scales and minima stay as the checkpoint stores them: reading rounds nothing that was rounded before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

GROUP = 32  # inputs that share a scale
Q8_OFFSET = 128

GroupFormat = Literal["q8", "q4"]


@dataclass(frozen=True, eq=False)
class GroupedWeight:
    """[n, k] with a scale for each 32 inputs. q8: value = d * (q - 128); q4: value = d * q + m, q in 0..15."""

    format: GroupFormat
    q: NDArray[np.uint8]  # [n, k], one value a byte
    d: NDArray[np.float16]  # [n, k / 32]
    m: NDArray[np.float16] | None = None  # [n, k / 32]; q4 only

    def __post_init__(self) -> None:
        n, k = self.q.shape
        expected = (n, k // GROUP)
        minima = [] if self.m is None else [self.m]
        assert k % GROUP == 0, f"{k} inputs are no multiple of {GROUP}"
        assert (self.m is not None) == (self.format == "q4"), f"{self.format} with m {self.m is not None}"
        assert self.q.dtype == np.uint8, self.q.dtype
        for part in (self.d, *minima):
            assert part.shape == expected, f"scales {part.shape} of a matrix {self.q.shape}"
            assert part.dtype == np.float16, part.dtype

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.q.shape
        return n, k

    def dequantize(self) -> NDArray[np.float32]:
        """[n, k], the exact product and one rounding of the sum."""
        n, k = self.q.shape
        values = self.q.reshape(n, -1, GROUP).astype(np.float32)
        if self.m is None:
            values -= Q8_OFFSET
            values *= self.d.astype(np.float32)[:, :, None]
        else:
            values *= self.d.astype(np.float32)[:, :, None]
            values += self.m.astype(np.float32)[:, :, None]
        return values.reshape(n, k)


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


Quantized = GroupedWeight | ChannelWeight


def same_form(parts: Sequence[Any]) -> bool:
    """Whether `parts` are all quantized, and alike enough to be one matrix."""
    if all(isinstance(part, ChannelWeight) for part in parts):
        return True
    return all(isinstance(part, GroupedWeight) and part.format == parts[0].format for part in parts)


def concat_rows(parts: Sequence[Quantized]) -> Quantized:
    """One matrix of `parts` below each other; they are of one form."""
    first = parts[0]
    if len(parts) == 1:
        return first
    assert same_form(parts), "matrices of different forms cannot be stacked"
    q = np.concatenate([part.q for part in parts])
    if isinstance(first, ChannelWeight):
        return ChannelWeight(
            q, np.concatenate([part.scale for part in parts if isinstance(part, ChannelWeight)])
        )
    grouped = [part for part in parts if isinstance(part, GroupedWeight)]
    minima = [part.m for part in grouped if part.m is not None]
    return GroupedWeight(
        first.format,
        q,
        np.concatenate([part.d for part in grouped]),
        np.concatenate(minima) if minima else None,
    )


def cut_rows(matrix: Quantized, rows: range) -> Quantized:
    """Some of the outputs."""
    part = slice(rows.start, rows.stop)
    if isinstance(matrix, ChannelWeight):
        return ChannelWeight(matrix.q[part], matrix.scale[part])
    return GroupedWeight(
        matrix.format, matrix.q[part], matrix.d[part], None if matrix.m is None else matrix.m[part]
    )


def cut_columns(matrix: Quantized, columns: range) -> Quantized | None:
    """Some of the inputs. None: they begin or end within a group, whose scale belongs to others too."""
    part = slice(columns.start, columns.stop)
    if isinstance(matrix, ChannelWeight):
        return ChannelWeight(matrix.q[:, part], matrix.scale)
    if columns.start % GROUP or columns.stop % GROUP:
        return None
    groups = slice(columns.start // GROUP, columns.stop // GROUP)
    return GroupedWeight(
        matrix.format,
        matrix.q[:, part],
        matrix.d[:, groups],
        None if matrix.m is None else matrix.m[:, groups],
    )
