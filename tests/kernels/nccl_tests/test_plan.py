"""Sizes, counts and factors against values worked out by hand, and the mistakes that are told."""

from __future__ import annotations

import pytest

from kernels.nccl_tests.errors import BadArguments
from kernels.nccl_tests.plan import (
    DTYPES,
    OPERATIONS,
    Case,
    Counts,
    bandwidths,
    bus_factor,
    cases,
    count_for,
    not_checkable,
    not_supported,
    parse_size,
    roots,
    select,
    sizes,
)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("8", 8), ("4K", 4096), ("1M", 1_048_576), ("1G", 1_073_741_824), ("2g", 2 << 30), ("1MiB", 1 << 20)],
)
def test_sizes_are_read(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "K", "1.5M", "-8", "1X", "8 8"])
def test_what_is_no_size_is_told(text: str) -> None:
    with pytest.raises(BadArguments, match="is no size"):
        parse_size(text)


def test_a_factor_or_a_step_between_sizes() -> None:
    assert sizes(8, 100, 1 << 20, 2) == [8, 16, 32, 64]
    assert sizes(10, 30, 10, None) == [10, 20, 30]
    assert sizes(32, 32, 1 << 20, None) == [32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 1, 2), "--minbytes is 0"),
        ((16, 8, 1, 2), r"--maxbytes \(8\) is less"),
        ((8, 16, 1, 1), "--stepfactor is 1; it must be at least 2"),
        ((8, 16, 0, None), "--stepbytes is 0"),
        ((8, 1 << 40, 8, None), "more than 100000 sizes"),
    ],
)
def test_sizes_that_cannot_be(arguments: tuple[int, int, int, int | None], message: str) -> None:
    with pytest.raises(BadArguments, match=message):
        sizes(*arguments)


# With n = 4: 2 * 3/4, and 3/4; with n = 8: 2 * 7/8, and 7/8.
@pytest.mark.parametrize(
    ("operation", "of_one", "of_four", "of_eight"),
    [
        ("all_reduce", 0.0, 1.5, 1.75),
        ("all_gather", 0.0, 0.75, 0.875),
        ("reduce_scatter", 0.0, 0.75, 0.875),
        ("alltoall", 0.0, 0.75, 0.875),
        ("broadcast", 1.0, 1.0, 1.0),
        ("reduce", 1.0, 1.0, 1.0),
        ("sendrecv", 1.0, 1.0, 1.0),
    ],
)
def test_bus_factors(operation: str, of_one: float, of_four: float, of_eight: float) -> None:
    assert [bus_factor(operation, n) for n in (1, 4, 8)] == [of_one, of_four, of_eight]


# 1,000 B hold 250 floats. Split over 4 ranks that is 62, and 60 once every part begins at 16 bytes.
@pytest.mark.parametrize(
    ("operation", "counts", "size"),
    [
        ("all_reduce", Counts(250, 250, 250), 1000),
        ("broadcast", Counts(250, 250, 250), 1000),
        ("reduce", Counts(250, 250, 250), 1000),
        ("sendrecv", Counts(250, 250, 250), 1000),
        ("all_gather", Counts(60, 60, 240), 960),
        ("reduce_scatter", Counts(60, 240, 60), 960),
        ("alltoall", Counts(60, 240, 240), 960),
    ],
)
def test_counts_of_a_thousand_bytes_over_four_ranks(operation: str, counts: Counts, size: int) -> None:
    count = count_for(OPERATIONS[operation], 1000, DTYPES["float"], 4)
    case = Case(operation, "float", "sum", 0, count)
    assert case.counts(4) == counts
    assert case.size_bytes(4) == size


def test_a_bandwidth_by_hand() -> None:
    # 1e9 bytes in half a second are 2 GB/s; an all_reduce of 4 ranks moves 1.5 times that over each link.
    case = Case("all_reduce", "float", "sum", -1, 250_000_000)
    assert bandwidths(case, 4, 0.5) == (2.0, 3.0)
    # The size of an all_gather is what a rank ends with.
    case = Case("all_gather", "float", "none", -1, 62_500_000)
    assert bandwidths(case, 4, 0.5) == (2.0, 1.5)


def test_sizes_that_hold_no_element_and_lines_that_would_be_equal_are_left_out() -> None:
    found = list(cases("all_gather", [8, 16, 32, 40, 64], ["float"], ["sum"], [0], 2))
    assert [case.count for case in found] == [4, 8]
    assert {(case.redop, case.root) for case in found} == {("none", -1)}


def test_reductions_run_each_redop_and_rooted_ones_each_root() -> None:
    found = list(cases("reduce", [8], ["float", "int8"], ["sum", "max"], [0, 1], 2))
    assert [(case.dtype, case.redop, case.root) for case in found] == [
        (dtype, redop, root) for dtype in ("float", "int8") for redop in ("sum", "max") for root in (0, 1)
    ]


def test_names_and_their_aliases() -> None:
    assert select("-d", "float16,float32,int8", list(DTYPES)) == ["half", "float", "int8"]
    assert select("-d", "all", list(DTYPES)) == list(DTYPES)
    with pytest.raises(BadArguments, match="--datatype is 'fp8'; it can be all or any of int8, int32"):
        select("--datatype", "fp8", list(DTYPES))


def test_roots() -> None:
    assert roots("all", 3) == [0, 1, 2]
    assert roots("2", 3) == [2]
    for wrong in ("3", "-1", "x"):
        with pytest.raises(BadArguments, match="a rank from 0 to 2"):
            roots(wrong, 3)


def test_what_a_backend_lacks_is_named() -> None:
    case = Case("all_reduce", "int32", "avg", -1, 4)
    assert not_supported("gloo", case) == "all_reduce with avg of int32 is not supported by gloo"
    assert not_supported("nccl", case) is None


def test_more_ranks_than_a_type_can_sum_exactly() -> None:
    assert not_checkable(Case("reduce", "bfloat16", "sum", 0, 4), 256) is None
    assert "--check 0" in str(not_checkable(Case("reduce", "bfloat16", "sum", 0, 4), 257))
    assert not_checkable(Case("reduce", "bfloat16", "prod", 0, 4), 257) is None


def test_a_case_from_elsewhere_is_looked_at() -> None:
    for fields in (
        ("exec", "float", "sum", 0, 1),
        ("reduce", "float", "xor", 0, 1),
        ("reduce", "float", "sum", 0, 0),
    ):
        with pytest.raises(BadArguments, match="no such case"):
            Case(*fields)
