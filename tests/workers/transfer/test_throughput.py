from __future__ import annotations

import pytest

from workers.transfer.throughput import Throughput

MIB = 1 << 20


def test_idle_time_does_not_count() -> None:
    seen = Throughput()
    for start in (0.0, 1000.0):
        seen.begin(start)
        seen.took(MIB, start + 0.5, idle=True)
    assert seen.bytes_per_s == pytest.approx(2 * MIB)
    assert seen.num_bytes == 2 * MIB


def test_pieces_that_overlap_share_the_time() -> None:
    seen = Throughput()
    seen.begin(0.0)
    seen.begin(0.1)  # the second is on its way beside the first
    seen.took(MIB, 1.0, idle=False)
    assert seen.bytes_per_s == pytest.approx(MIB)
    seen.took(MIB, 2.0, idle=True)
    assert seen.bytes_per_s == pytest.approx(MIB)


def test_small_pieces_are_gathered_into_one_sample() -> None:
    seen = Throughput()
    for i in range(1024):
        assert seen.bytes_per_s == 0
        seen.begin(i)
        seen.took(MIB // 1024, i + 0.001, idle=True)
    assert seen.bytes_per_s == pytest.approx(MIB / 1.024)


def test_the_newest_counts_most_and_the_average_stays_between() -> None:
    seen = Throughput()
    now = 0.0
    for seconds in (1.0, 0.1, 0.1, 0.1):
        before = seen.bytes_per_s
        seen.begin(now)
        now += seconds
        seen.took(MIB, now, idle=True)
        assert before <= seen.bytes_per_s <= 10 * MIB * 1.0001
    assert seen.bytes_per_s > 5 * MIB


def test_what_was_refused_is_no_throughput_and_no_clock_divides_by_zero() -> None:
    seen = Throughput()
    seen.begin(1.0)
    seen.took(0, 2.0, idle=True)
    seen.took(5 * MIB, 2.0, idle=True)
    assert seen.num_bytes == 5 * MIB
    zero = Throughput()
    zero.begin(1.0)
    zero.took(5 * MIB, 1.0, idle=True)
    assert zero.bytes_per_s == 0
