"""One layer placed from nothing: the best of several seeds, each improved by search, and then of several kicks.

If the bound cannot be reached at once, it matters which experts get the few second copies, and search alone ends in
the nearest local optimum. So it is begun from seeds that give out copies more and less freely, and at last from the
best layout found with a few experts of full ranks thrown elsewhere (iterated local search).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from router.experts.arrays import Floats
from router.experts.baselines import eplb_global, placement_of
from router.experts.layout import EMPTY, Layout
from router.experts.search import Search
from router.experts.seed import sow
from router.experts.topology import Topology

_ENOUGH = (
    1.0,
    0.96,
)  # of the limit: experts above get second copies at once, the other slots are left to search
_THROWN = 2  # experts, by one kick
_LOOKS_OF_A_KICK = 80
_LEAST_BUDGET = 40  # looks: with less a kick is not worth trying


class Budget:
    """Looks of the search that are left, divided evenly among the layers that are still to come."""

    def __init__(self, looks: int, layers: int) -> None:
        self.looks = looks
        self.layers = layers

    def of_a_layer(self) -> int:
        return max(self.looks // max(self.layers, 1), 0)

    def spend(self, looks: int) -> None:
        self.looks -= looks

    def next_layer(self) -> None:
        self.layers -= 1


def fresh(loads: Floats, topology: Topology, limit: float, equal_shares: bool, budget: Budget) -> Layout:
    """A layout whose fullest rank is at `limit` if that is found within the layer's part of the budget, else as low as
    was found; never above that of EPLB's global policy, which is one of the seeds."""
    left = budget.of_a_layer()
    best: Layout | None = None
    for seed in _seeds(loads, topology, limit, equal_shares):
        found, looks = _improved(seed, limit, left)
        left -= looks
        budget.spend(looks)
        if best is None or found.fullest < best.fullest:
            best = found
        if best.fullest <= limit or left <= 0:
            return best
    assert best is not None
    random = np.random.default_rng(0)
    while best.fullest > limit and left > _LEAST_BUDGET:
        found, looks = _improved(_kicked(best, limit, random), limit, min(left, _LOOKS_OF_A_KICK))
        looks = max(looks, 1)
        left -= looks
        budget.spend(looks)
        if found.fullest <= best.fullest:
            best = found
    return best


def _seeds(loads: Floats, topology: Topology, limit: float, equal_shares: bool) -> Iterator[Layout]:
    """First the better one of two greedy layouts, ours and EPLB's where ranks are equal."""
    seed = Layout(loads, topology, equal_shares)
    sow(seed)
    seed.divide(limit)
    if len({(rank.slots, rank.speed) for rank in topology.ranks}) == 1:
        ranks = len(topology.ranks)
        greedy = placement_of(eplb_global(loads[None], sum(topology.slots), ranks), ranks)
        theirs = Layout(loads, topology, equal_shares)
        theirs.take(greedy.layers[0], greedy.shares[0] if greedy.shares else None)
        theirs.divide(limit)
        seed = min(seed, theirs, key=lambda layout: layout.fullest)
    yield seed
    for enough in _ENOUGH:
        seed = Layout(loads, topology, equal_shares)
        sow(seed, enough * limit)
        seed.divide(limit)
        yield seed


def _improved(layout: Layout, limit: float, most_looks: int) -> tuple[Layout, int]:
    """The layout with the lowest fullest rank that search passes (of equals the last), and the looks it took."""
    search = Search(layout, limit, most_looks)
    best = layout
    while search.step():
        if search.layout.fullest <= best.fullest:
            best = search.layout
    return best, search.looks


def _kicked(layout: Layout, limit: float, random: np.random.Generator) -> Layout:
    """Some experts of the fuller ranks swapped with any others."""
    after = layout.copy()
    fuller = np.argsort(-layout.times, kind="stable")[: max(2, len(layout.speed) // 4)]
    for _ in range(_THROWN):
        rank = random.choice(fuller)
        own = np.flatnonzero((after.rank == rank) & (after.expert != EMPTY))
        others = np.flatnonzero((after.rank != rank) & (after.expert != EMPTY))
        if not len(own) or not len(others):
            continue
        one, other = random.choice(own), random.choice(others)
        twice = (
            after.held[after.expert[one], after.rank[other]]
            or after.held[after.expert[other], after.rank[one]]
        )
        if not twice:
            after.swap(one, other)
    after.divide(limit)
    return after
