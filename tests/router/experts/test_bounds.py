"""No placement is below the bound: shown against HiGHS's optimum, and against all placements there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.experts.bounds import lower_bound
from router.experts.exact import solve
from router.experts.topology import Rank, Topology, uniform
from tests.router.experts.test_shares import least_fullest


def least_of_all(loads: np.ndarray, topology: Topology) -> float:
    """The time of the fullest rank in the best placement, by trying every one."""
    experts = range(len(loads))
    choices = [list(itertools.combinations(experts, min(rank.slots, len(loads)))) for rank in topology.ranks]
    speeds = np.array(topology.speeds)
    return min(
        least_fullest(loads, ranks, speeds)
        for ranks in itertools.product(*choices)
        if set().union(*ranks) == set(experts)
    )


@settings(max_examples=10, deadline=None)
@given(
    loads=st.lists(st.integers(0, 100), min_size=3, max_size=4),
    ranks=st.lists(st.tuples(st.integers(1, 2), st.sampled_from([0.5, 1.0])), min_size=3, max_size=3),
)
def test_the_bound_is_below_every_placement(loads: list[int], ranks: list[tuple[int, float]]) -> None:
    topology = Topology(tuple(Rank(*rank) for rank in ranks))
    if sum(topology.slots) < len(loads):
        return
    tokens = np.array(loads, dtype=float)
    assert lower_bound(tokens, topology) <= least_of_all(tokens, topology) * (1 + 1e-7) + 1e-9


@pytest.mark.parametrize(
    ("experts", "ranks", "slots", "zipf"),
    [(12, 4, 4, 0.8), (13, 5, 3, 1.0), (16, 8, 2, 0.5), (9, 6, 2, 1.0)],
)
def test_the_bound_is_close_to_the_optimum(experts: int, ranks: int, slots: int, zipf: float) -> None:
    loads = np.random.default_rng(1).uniform(0.8, 1.2, experts) / np.arange(1, experts + 1) ** zipf
    topology = uniform(ranks, slots)
    best = solve(loads, topology, limit_s=60)
    assert best is not None
    assert best.proven
    assert best.time * 0.96 <= lower_bound(loads, topology) <= best.time * (1 + 1e-4)


@pytest.mark.slow
def test_the_optimum_of_eplbs_example_with_equal_shares() -> None:
    loads = np.array([20.0, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27])
    best = solve(loads, uniform(8, 2), equal_shares=True, limit_s=30)
    assert best is not None
    assert loads.sum() / 8 / best.time == pytest.approx(0.8401, abs=5e-5)


@pytest.mark.parametrize(
    ("loads", "topology", "least"),
    [
        ([8.0, 1, 1, 1, 1], uniform(2, 4), 6.0),  # the mean: the hot expert has two copies
        ([8.0, 1, 1, 1], uniform(2, 2), 9.0),  # crowding: no second copy, and not alone on its rank
        ([8.0, 2, 2, 2, 2], Topology((Rank(3), Rank(1), Rank(1))), 8.0),
        ([5.0, 4, 3], uniform(2, 2), 6.0),  # with a fourth slot the rest can be divided
        ([3.0, 3, 3], Topology((Rank(2), Rank(1))), 6.0),  # pigeonholes
        (
            [9.0, 9, 1, 1],
            Topology((Rank(1, 2.0), Rank(3, 0.5))),
            22.0,
        ),  # overflow: a slow rank has to take three
        ([0.0, 0, 0], uniform(2, 2), 0.0),
    ],
)
def test_what_bounds_a_load(loads: list[float], topology: Topology, least: float) -> None:
    assert lower_bound(np.array(loads), topology) == pytest.approx(least)


def test_a_few_hot_experts_without_enough_copies() -> None:
    """One slot to spare, so that seven ranks hold two whole experts each: a hot one and another at 14 together, or two
    light ones, which leaves three hot ones for two ranks. The mean is 12.9 only."""
    loads = np.array([10.0] * 8 + [4.0] * 9)
    assert 13.4 < lower_bound(loads, uniform(9, 2)) <= 14.0
