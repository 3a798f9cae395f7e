"""Medians, percentiles, and the order in which runs are taken."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.spread import Spread, interleaved, percentile


def test_the_median_and_the_range() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert Spread.of([1.0, 2.0]).median == 1.5


def test_how_it_is_shown() -> None:
    assert Spread.of([0.0153, 0.0149, 0.0161]).shown(1, 1e3) == "15.3 (14.9–16.1)"
    assert Spread.of([1234.0]).shown() == "1,234"


def test_nothing_has_no_median() -> None:
    with pytest.raises(ValueError, match="no run"):
        Spread.of([])


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.5, 50.0), (0.99, 99.0), (1.0, 99.0)])
def test_percentiles_of_a_hundred(share: float, expected: float) -> None:
    assert percentile([float(n) for n in range(100)], share) == expected


def test_each_runs_once_a_round_and_each_begins_a_round() -> None:
    order = list(interleaved("abc", 4))
    assert [thing for _, thing in order] == list("abcbcacababc")
    assert Counter(order) == Counter((number, thing) for number in range(4) for thing in "abc")
    assert not list(interleaved([], 3))
