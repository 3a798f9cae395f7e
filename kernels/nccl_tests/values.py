"""What ranks send and what they must receive, in whole numbers small enough that no type rounds them.

An element depends on its index modulo a prime, the rank that sends it and the repetition. So a buffer of gigabytes is
made from one short pattern, and a block that landed in the wrong place is still seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.nccl_tests.plan import DTYPES, Case

PERIOD = (
    16_381  # elements; a prime, so that no part of a split buffer begins at a multiple of it but the first
)
POISON = 0x6B  # what a receive buffer is filled with before a checked run
_CHUNK_PERIODS = 256
_NUMPY: dict[str, np.dtype[Any]] = {
    "int8": np.dtype(np.int8),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "half": np.dtype(np.float16),
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
}
_EPSILON = {"half": 2.0**-10, "bfloat16": 2.0**-7, "float": 2.0**-23, "double": 2.0**-52}
_AVERAGES = 8  # sums and averages are of values below this, or of fewer when there are very many ranks

Bytes = NDArray[np.uint8]
Values = NDArray[Any]
Reader = Callable[[int, int], Bytes]
"""Bytes of the receive buffer: (first byte, number of bytes)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements of a receive buffer that repeat one pattern."""

    first: int
    count: int
    pattern: Values


def encode(values: Values, dtype: str) -> Bytes:
    """The bytes of `values` in an element type; bfloat16 is rounded to the nearest, ties to even."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.astype(np.uint16).view(np.uint8)
    return np.ascontiguousarray(values, _NUMPY[dtype]).view(np.uint8)


def decode(data: Bytes, dtype: str) -> Values:
    if dtype == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(_NUMPY[dtype])


def sent(case: Case, rank: int, num_ranks: int, repetition: int) -> Bytes:
    """One period of a rank's send buffer."""
    length = min(PERIOD, case.counts(num_ranks).send)
    return encode(_values(case, rank, num_ranks, repetition, 0, length), case.dtype)


def expected(case: Case, rank: int, num_ranks: int, repetition: int) -> Iterator[Segment]:
    """What a rank's receive buffer must hold. Nothing, where NCCL leaves it undefined."""
    count = case.count

    def of(sender: int, first: int, at: int = 0) -> Segment:
        values = _values(case, sender, num_ranks, repetition, first, min(PERIOD, count))
        return Segment(at, count, values)

    def reduced(first: int) -> Segment:
        values = [
            _values(case, sender, num_ranks, repetition, first, min(PERIOD, count))
            for sender in range(num_ranks)
        ]
        return Segment(0, count, _reduce(case, np.stack(values)))

    match case.operation:
        case "all_reduce":
            yield reduced(0)
        case "reduce":
            if rank == case.root:
                yield reduced(0)
        case "reduce_scatter":
            yield reduced(rank * count)
        case "broadcast":
            yield of(case.root, 0)
        case "sendrecv":
            yield of((rank - 1) % num_ranks, 0)
        case "all_gather":
            for sender in range(num_ranks):
                yield of(sender, 0, sender * count)
        case "alltoall":
            for sender in range(num_ranks):
                yield of(sender, rank * count, sender * count)


def count_wrong(case: Case, rank: int, num_ranks: int, repetition: int, read: Reader) -> int:
    """Elements of a rank's receive buffer that are not what they must be."""
    item = DTYPES[case.dtype].num_bytes
    tolerance = _tolerance(case, num_ranks)
    wrong = 0
    for segment in expected(case, rank, num_ranks, repetition):
        pattern = decode(encode(segment.pattern, case.dtype), case.dtype)
        length = len(pattern) * _CHUNK_PERIODS
        tiled = np.tile(pattern, -(-min(length, segment.count) // len(pattern)))
        for begin in range(0, segment.count, length):
            size = min(length, segment.count - begin)
            got = decode(read((segment.first + begin) * item, size * item), case.dtype)
            if tolerance:
                difference = np.abs(got.astype(np.float64) - tiled[:size].astype(np.float64))
                wrong += size - int(np.count_nonzero(difference <= tolerance))  # NaN is wrong too
            else:
                wrong += int(np.count_nonzero(got != tiled[:size]))
    return wrong


def _hash(index: Values, rank: int, repetition: int) -> Values:
    mask = (1 << 64) - 1
    start = np.uint64((rank * 0x9E3779B97F4A7C15 + repetition * 0xD1B54A32D192ED03 + 1) & mask)
    x = (index.astype(np.uint64) + start) * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(31)
    x *= np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(29))


def _values(case: Case, rank: int, num_ranks: int, repetition: int, first: int, length: int) -> Values:
    """Elements `first` and following of a rank's send buffer, as int64."""
    index = (np.arange(length) + first % PERIOD) % PERIOD
    bits = _hash(index, rank, repetition)
    match case.redop:
        case "sum" | "avg":
            # The largest sum, and so every sum on the way to it, must be exact.
            choices = max(1, min(_AVERAGES, DTYPES[case.dtype].exact_up_to // num_ranks + 1))
            return (bits % np.uint64(choices)).astype(np.int64)
        case "prod":
            # At most four ranks hold a 2 or a -2 and all others 1 or -1: never above 16.
            doubled = (index + rank) % num_ranks < index % 5
            sign = np.where(bits & np.uint64(1), -1, 1)
            return np.where(doubled, 2, 1) * sign
        case "min" | "max" | "none":
            return (bits % np.uint64(101)).astype(np.int64) - 50
    raise AssertionError(case.redop)


def _reduce(case: Case, values: Values) -> Values:
    """Over the first axis, which is the ranks."""
    reduced: Values
    match case.redop:
        case "sum":
            reduced = values.sum(axis=0)
        case "avg":
            total = values.sum(axis=0)
            reduced = total / len(values) if DTYPES[case.dtype].floating else total // len(values)
        case "prod":
            reduced = values.prod(axis=0)
        case "min":
            reduced = values.min(axis=0)
        case "max":
            reduced = values.max(axis=0)
        case _:
            raise AssertionError(case.redop)
    return reduced


def _tolerance(case: Case, num_ranks: int) -> float:
    """NCCL averages by adding values times 1/n. That is exact where n is a power of two, and rounds elsewhere."""
    rounds = case.redop == "avg" and DTYPES[case.dtype].floating and num_ranks & (num_ranks - 1) != 0
    return (num_ranks + 2) * _EPSILON[case.dtype] * _AVERAGES if rounds else 0.0
