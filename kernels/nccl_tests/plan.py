"""What is measured: operations, types, sizes, counts and the factors that turn a time into a bandwidth. Plain Python.

Sizes, counts and factors follow NVIDIA's nccl-tests, so that numbers can be laid side by side: the size of a line is the
larger of what a rank sends and receives, the count is the one that NCCL's function is called with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kernels.nccl_tests.errors import BadArguments

ALIGNMENT_BYTES = 16  # a rank's part of a split buffer begins at a multiple of this
NO_ROOT = -1
NO_REDOP = "none"
REDOPS = ("sum", "prod", "min", "max", "avg")
_MOST_SIZES = 100_000
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True)
class Operation:
    """One collective."""

    name: str
    reduces: bool = False
    rooted: bool = False
    splits_send: bool = False  # the send buffer holds one part for every rank
    splits_recv: bool = False
    in_place: bool = True  # False: NCCL does not define it, so its result is not checked


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("all_reduce", reduces=True),
        Operation("all_gather", splits_recv=True),
        Operation("reduce_scatter", reduces=True, splits_send=True),
        Operation("broadcast", rooted=True),
        Operation("reduce", reduces=True, rooted=True),
        Operation("sendrecv", in_place=False),
        Operation("alltoall", splits_send=True, splits_recv=True, in_place=False),
    )
}


@dataclass(frozen=True, slots=True)
class Dtype:
    """An element type, by the name that nccl-tests prints."""

    name: str
    num_bytes: int
    floating: bool
    exact_up_to: int  # every whole number up to this is represented


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("int8", 1, False, 127),
        Dtype("int32", 4, False, 2**31 - 1),
        Dtype("int64", 8, False, 2**63 - 1),
        Dtype("half", 2, True, 2**11),
        Dtype("bfloat16", 2, True, 2**8),
        Dtype("float", 4, True, 2**24),
        Dtype("double", 8, True, 2**53),
    )
}
DTYPE_ALIASES = {"float16": "half", "float32": "float", "float64": "double"}


@dataclass(frozen=True, slots=True)
class Counts:
    """Elements: what NCCL's function is called with, and what a rank's two buffers hold."""

    call: int
    send: int
    recv: int


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table, of which every rank knows the same."""

    operation: str
    dtype: str
    redop: str
    root: int
    count: int  # as in Counts.call

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS or self.dtype not in DTYPES:
            raise BadArguments(f"no such case: {self.operation} of {self.dtype}")
        if self.redop not in (*REDOPS, NO_REDOP) or self.count < 1:
            raise BadArguments(f"no such case: redop {self.redop}, count {self.count}")

    def counts(self, num_ranks: int) -> Counts:
        operation = OPERATIONS[self.operation]
        return Counts(
            self.count,
            self.count * (num_ranks if operation.splits_send else 1),
            self.count * (num_ranks if operation.splits_recv else 1),
        )

    def size_bytes(self, num_ranks: int) -> int:
        counts = self.counts(num_ranks)
        return max(counts.send, counts.recv) * DTYPES[self.dtype].num_bytes

    def text(self, num_ranks: int) -> str:
        redop = "" if self.redop == NO_REDOP else f", {self.redop}"
        return f"{self.operation} of {self.size_bytes(num_ranks)} B ({self.dtype}{redop})"


def count_for(operation: Operation, size_bytes: int, dtype: Dtype, num_ranks: int) -> int:
    """Elements to call NCCL with so that a line is at most `size_bytes`; 0 when no element fits."""
    count = size_bytes // dtype.num_bytes
    if not (operation.splits_send or operation.splits_recv):
        return count
    step = ALIGNMENT_BYTES // dtype.num_bytes
    return count // num_ranks // step * step


def bus_factor(operation: str, num_ranks: int) -> float:
    """busbw / algbw: what the links carry for each byte of the size (nccl-tests, doc/PERFORMANCE.md)."""
    if operation == "all_reduce":
        return 2 * (num_ranks - 1) / num_ranks
    if operation in ("all_gather", "reduce_scatter", "alltoall"):
        return (num_ranks - 1) / num_ranks
    return 1.0


def bandwidths(case: Case, num_ranks: int, seconds: float) -> tuple[float, float]:
    """(algbw, busbw) in GB/s, a GB being 10^9 bytes."""
    algorithm = case.size_bytes(num_ranks) / seconds / 1e9
    return algorithm, algorithm * bus_factor(case.operation, num_ranks)


def parse_size(text: str) -> int:
    """Bytes of 8, 4K, 1M, 1G; K is 1024."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise BadArguments(f"{text!r} is no size; write a whole number of bytes, or 4K, 1M, 1G")
    return int(match[1]) * _UNITS[match[2].upper()]


def sizes(min_bytes: int, max_bytes: int, step_bytes: int, step_factor: int | None) -> list[int]:
    """The sizes to run, smallest first. A factor, where there is one, goes before the step."""
    if min_bytes < 1:
        raise BadArguments(f"--minbytes is {min_bytes}; it must be at least 1")
    if max_bytes < min_bytes:
        raise BadArguments(f"--maxbytes ({max_bytes}) is less than --minbytes ({min_bytes})")
    if step_factor is not None and step_factor < 2:
        raise BadArguments(f"--stepfactor is {step_factor}; it must be at least 2")
    if step_bytes < 1:
        raise BadArguments(f"--stepbytes is {step_bytes}; it must be at least 1")
    if not step_factor and (max_bytes - min_bytes) // step_bytes >= _MOST_SIZES:
        raise BadArguments(
            f"--stepbytes is {step_bytes}: these are more than {_MOST_SIZES} sizes; raise it, or use -f"
        )
    found = [min_bytes]
    while (size := found[-1] * step_factor if step_factor else found[-1] + step_bytes) <= max_bytes:
        found.append(size)
    return found


def select(option: str, wanted: str, known: Sequence[str]) -> list[str]:
    """Names of a comma-separated list, or all of them."""
    if wanted == "all":
        return list(known)
    names = [DTYPE_ALIASES.get(name.strip(), name.strip()) for name in wanted.split(",")]
    for name in names:
        if name not in known:
            raise BadArguments(f"{option} is {name!r}; it can be all or any of {', '.join(known)}")
    return names


def roots(wanted: str, num_ranks: int) -> list[int]:
    if wanted == "all":
        return list(range(num_ranks))
    if not wanted.isdigit() or int(wanted) >= num_ranks:
        raise BadArguments(f"--root is {wanted!r}; it can be all or a rank from 0 to {num_ranks - 1}")
    return [int(wanted)]


def cases(
    operation: str,
    all_sizes: Sequence[int],
    dtypes: Sequence[str],
    redops: Sequence[str],
    root: Sequence[int],
    num_ranks: int,
) -> Iterator[Case]:
    """The lines of one operation, in the order in which they are run. Sizes that hold no element are left out."""
    kind = OPERATIONS[operation]
    for dtype in dtypes:
        for redop in redops if kind.reduces else (NO_REDOP,):
            for chosen in root if kind.rooted else (NO_ROOT,):
                before = 0
                for size in all_sizes:
                    count = count_for(kind, size, DTYPES[dtype], num_ranks)
                    if count != before:  # rounding down makes equal lines of unequal sizes
                        yield Case(operation, dtype, redop, chosen, count)
                    before = count


def not_supported(backend: str, case: Case) -> str | None:
    """Why a backend cannot run a case, if it cannot."""
    if backend == "gloo" and case.redop == "avg" and not DTYPES[case.dtype].floating:
        return f"{case.operation} with avg of {case.dtype} is not supported by gloo"
    return None


def not_checkable(case: Case, num_ranks: int) -> str | None:
    """Why a result could not be compared exactly, if so."""
    dtype = DTYPES[case.dtype]
    if case.redop in ("sum", "avg") and num_ranks > dtype.exact_up_to:
        return f"a {case.redop} over {num_ranks} ranks is not exact in {case.dtype}: run it with --check 0"
    return None
