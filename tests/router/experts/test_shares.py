from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from router.experts.bounds import lower_bound
from router.experts.layout import Layout
from router.experts.topology import Rank, Topology
from workers.protocol.experts import LayerExperts


def least_fullest(loads: np.ndarray, ranks: LayerExperts, speeds: np.ndarray) -> float:
    """By linear programming: the time of the fullest rank with these copies and the best shares."""
    copies = [(expert, rank) for rank, experts in enumerate(ranks) for expert in experts]
    size = len(copies) + 1  # tokens of each copy, and the time
    above = np.zeros((len(ranks), size))
    above[:, -1] = -speeds
    served = np.zeros((len(loads), size))
    for number, (expert, rank) in enumerate(copies):
        above[rank, number] = served[expert, number] = 1.0
    goal = np.zeros(size)
    goal[-1] = 1.0
    return float(linprog(goal, above, np.zeros(len(ranks)), served, loads).fun)


@pytest.mark.parametrize("seed", range(12))
def test_shares_are_the_best_that_there_are(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_ranks, num_experts, slots = 5, 11, 4
    loads = random.pareto(1.5, num_experts) * 100 + 1
    topology = Topology(
        tuple(Rank(slots, float(speed)) for speed in random.choice([0.5, 1.0, 2.0], num_ranks))
    )
    owners = np.arange(num_experts) % num_ranks
    held = np.zeros((num_experts, num_ranks), dtype=bool)
    held[np.arange(num_experts), owners] = True
    for rank in range(num_ranks):
        others = np.flatnonzero(~held[:, rank])
        held[random.choice(others, slots - held[:, rank].sum(), replace=False), rank] = True
    ranks = tuple(tuple(np.flatnonzero(held[:, rank]).tolist()) for rank in range(num_ranks))
    best = least_fullest(loads, ranks, np.array(topology.speeds))

    layout = Layout(loads, topology, equal_shares=False)
    layout.take(ranks, None)
    layout.divide(target=best)
    assert layout.fullest == pytest.approx(best, rel=2e-3)
    assert best >= lower_bound(loads, topology) * (1 - 1e-9)
    served = np.bincount(layout.expert, layout.tokens, num_experts)
    assert served == pytest.approx(loads)
    assert (layout.tokens >= 0).all()
    assert layout.load == pytest.approx(np.bincount(layout.rank, layout.tokens, num_ranks))


def test_what_is_below_the_target_is_left_alone() -> None:
    layout = Layout(np.array([4.0, 2.0]), Topology((Rank(2), Rank(1))), equal_shares=False)
    layout.take(((0, 1), (0,)), ((0.5, 1.0), (0.5,)))
    layout.divide(target=4.0)
    assert layout.tokens.tolist() == [2.0, 2.0, 2.0]
    layout.divide(target=3.0)
    assert layout.tokens.tolist() == [1.0, 2.0, 3.0]


def test_equal_shares_stay_equal() -> None:
    layout = Layout(np.array([4.0, 2.0]), Topology((Rank(2, 0.1), Rank(1))), equal_shares=True)
    layout.take(((0, 1), (0,)), None)
    layout.divide()
    assert layout.tokens.tolist() == [2.0, 2.0, 2.0]
