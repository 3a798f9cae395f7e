"""The table to the letter."""

from __future__ import annotations

from kernels.nccl_tests.plan import Case
from kernels.nccl_tests.table import Line, Measured, as_data, footer, header, remarks, row

LINES = [
    # 8 B in 5.71 us; 1 GB (10^9 B) in half a second: 2 GB/s, times 1.5 on the bus of four ranks.
    Line(
        Case("all_reduce", "float", "sum", -1, 2), 4, Measured(5.71e-6, 6e-6, 0), Measured(123.44e-6, 1e-3, 0)
    ),
    Line(
        Case("all_reduce", "float", "sum", -1, 250_000_000), 4, Measured(0.5, 0.6, 0), Measured(0.25, 0.3, 0)
    ),
]
TABLE = """\
#                                                                           out-of-place                            in-place
#       size         count      type   redop    root      time    algbw    busbw  #wrong      time    algbw    busbw  #wrong
#        (B)    (elements)                                (us)   (GB/s)   (GB/s)              (us)   (GB/s)   (GB/s)
           8             2     float     sum      -1      5.71     0.00     0.00       0     123.4     0.00     0.00       0
  1000000000     250000000     float     sum      -1    500000     2.00     3.00       0    250000     4.00     6.00       0
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 2.25055"""


def test_the_table() -> None:
    # (8/5.71e-6 + 8/123.44e-6) * 1.5 / 1e9 = 0.0022 GB/s: (3 + 6 + 0.0022) / 4 = 2.25055
    assert "\n".join([*header(), *map(row, LINES), *footer(LINES)]) == TABLE


def test_wrong_elements_fail_and_what_was_not_checked_says_so() -> None:
    case = Case("sendrecv", "half", "none", -1, 4)
    line = Line(case, 2, Measured(1e-3, 1e-3, 7), Measured(1e-3, 1e-3, None))
    assert row(line).split() == (
        "8 4 half none -1 1000.0 0.00 0.00 7 1000.0 0.00 0.00 N/A".split()  # noqa: SIM905
    )
    assert footer([line])[0] == "# Out of bounds values : 7 FAILED"
    unchecked = Line(case, 2, Measured(1e-3, 1e-3, None), Measured(1e-3, 1e-3, None))
    assert footer([unchecked])[0] == "# Out of bounds values : 0 (nothing was checked)"


def test_one_rank_has_no_bus() -> None:
    line = Line(
        Case("all_reduce", "float", "sum", -1, 2), 1, Measured(1e-6, 1e-6, 0), Measured(1e-6, 1e-6, 0)
    )
    assert footer([line])[1] == "# Avg bus bandwidth    : 0"
    assert "nothing crosses a link" in remarks(1, {}, "nccl")[0]


def test_shared_gpus_and_gloo_are_told() -> None:
    assert remarks(2, {}, "nccl") == []
    assert remarks(3, {"GPU 0 of a": [0, 2]}, "nccl") == [
        "Ranks 0, 2 share GPU 0 of a: busbw is not that of a link."
    ]
    assert "gloo" in remarks(2, {}, "gloo")[0]


def test_as_data() -> None:
    data = as_data(LINES[1])
    assert data["size_bytes"] == 1_000_000_000
    assert data["in_place"] == {
        "time_us": 250000.0,
        "time_slowest_rank_us": 300000.0,
        "algbw_gb_s": 4.0,
        "busbw_gb_s": 6.0,
        "wrong": 0,
    }
