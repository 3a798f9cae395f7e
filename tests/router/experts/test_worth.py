from __future__ import annotations

import itertools

import numpy as np
import pytest

from router.experts.worth import Point, choose


def point(moves: int, fullest: float) -> Point:
    return Point(moves, fullest, np.zeros(0, dtype=np.int64), np.zeros(0))


def convex_trail(random: np.random.Generator) -> list[Point]:
    """Ever smaller savings, one move each."""
    savings = np.sort(random.uniform(0, 2, 6))[::-1]
    return [point(moves, 20 - float(savings[:moves].sum())) for moves in range(7)]


@pytest.mark.parametrize("seed", range(5))
def test_within_a_limit_the_best_points_are_chosen(seed: int) -> None:
    random = np.random.default_rng(seed)
    trails = [convex_trail(random) for _ in range(3)]
    for most in (0, 1, 4, 9, 18):
        chosen = choose(trails, [0.0] * 3, most)
        assert sum(one.moves for one in chosen) <= most
        best = min(
            sum(one.fullest for one in some)
            for some in itertools.product(*trails)
            if sum(one.moves for one in some) <= most
        )
        assert sum(one.fullest for one in chosen) == pytest.approx(best)


def test_moves_that_save_less_than_they_cost_are_not_made() -> None:
    trail = [point(0, 10.0), point(1, 8.0), point(2, 7.5), point(4, 7.4)]
    assert [choose([trail], [cost], None)[0].moves for cost in (0.0, 0.1, 0.6, 3.0)] == [4, 2, 1, 0]


def test_where_the_next_stretch_is_too_long_the_best_point_on_the_way_is_taken() -> None:
    trail = [point(0, 10.0), point(3, 9.9), point(5, 9.5), point(8, 2.0)]
    assert choose([trail], [0.0], 6)[0].moves == 5
    assert choose([trail], [0.0], 2)[0].moves == 0


def test_what_cannot_be_avoided_is_done_beyond_the_limit() -> None:
    trail = [point(3, 10.0), point(4, 2.0)]
    assert choose([trail], [0.0], 1)[0].moves == 3
    assert choose([trail], [0.0], 4)[0].moves == 4


def test_points_behind_others_are_passed_over() -> None:
    trail = [point(0, 10.0), point(2, 11.0), point(4, 5.0), point(4, 6.0), point(3, 5.0)]
    assert choose([trail], [0.0], None)[0] is trail[4]
