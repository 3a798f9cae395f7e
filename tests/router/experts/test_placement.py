from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.experts.baselines import eplb, eplb_global, placement_of
from router.experts.exact import solve
from router.experts.placement import Options, balancedness, over_remaining, plan, rank_times
from router.experts.topology import Rank, Topology, uniform
from workers.protocol.experts import Move, Placement, PlacementError, contiguous, moves


def zipf(num_layers: int, num_experts: int, exponent: float, seed: int = 0) -> np.ndarray:
    """Loads whose order differs from layer to layer."""
    random = np.random.default_rng(seed)
    weights = np.arange(1, num_experts + 1) ** -exponent * 1e5
    loads = np.stack([random.permutation(weights) for _ in range(num_layers)])
    return loads * random.uniform(0.8, 1.2, loads.shape)


groups = st.builds(
    Topology,
    st.lists(
        st.builds(Rank, st.integers(0, 4), st.sampled_from([0.5, 1.0, 3.0]), st.integers(0, 2)),
        min_size=1,
        max_size=6,
    ).map(tuple),
    st.just(1000),
)


@settings(max_examples=40, deadline=None)
@given(topology=groups, data=st.data(), equal_shares=st.booleans())
def test_whatever_is_planned_is_valid(topology: Topology, data: st.DataObject, equal_shares: bool) -> None:
    room = sum(topology.slots)
    if not room:
        return
    num_experts = data.draw(st.integers(1, room))
    rows = st.lists(st.integers(0, 1000), min_size=num_experts, max_size=num_experts)
    first, second = (np.array(data.draw(st.lists(rows, min_size=2, max_size=2)), dtype=float) for _ in "ab")
    limit = data.draw(st.none() | st.integers(0, 5))
    options = Options(equal_shares=equal_shares, max_moves=limit, effort=100)

    new = plan(first, topology, options=options)
    new.placement.validate(num_experts, topology.slots, num_layers=2)
    assert new == plan(first, topology, options=options)  # nothing is left to chance
    made = plan(second, topology, new.placement, options=options)
    made.placement.validate(num_experts, topology.slots, num_layers=2)
    assert made.placement.version == new.placement.version + 1
    assert made.moves == tuple(moves(new.placement, made.placement))
    assert made.moved_bytes == 1000 * len(made.moves)
    if options.max_moves is not None:
        assert len(made.moves) <= options.max_moves
    assert np.all(np.array(made.after) <= np.array(made.before) * (1 + 1e-6) + 1e-2)
    assert np.all(np.array(made.after) >= np.array(made.bounds) * (1 - 1e-6))


@pytest.mark.parametrize(
    ("experts", "ranks", "slots", "exponent"),
    [
        (64, 8, 8, 0.6),
        (64, 8, 9, 1.0),
        (64, 16, 5, 0.8),
        (128, 32, 5, 0.9),
        (256, 64, 5, 1.0),
        (64, 36, 2, 0.8),
    ],
)
def test_from_nothing_it_is_near_the_bound_and_no_worse_than_eplb(
    experts: int, ranks: int, slots: int, exponent: float
) -> None:
    loads, topology = zipf(3, experts, exponent), uniform(ranks, slots, ranks_per_node=ranks // 4)
    made = plan(loads, topology)
    assert np.all(np.array(made.after) <= np.array(made.bounds) * 1.02)
    for physical in (
        eplb_global(loads, ranks * slots, ranks),
        eplb(loads, ranks * slots, num_groups=8, num_nodes=4, num_gpus=ranks),
    ):
        greedy = rank_times(placement_of(physical, ranks), loads, topology).max(axis=1)
        assert np.all(np.array(made.after) <= greedy * (1 + 1e-9))


@pytest.mark.parametrize(("seed", "equal_shares"), [(0, False), (1, False), (2, True), (3, True)])
def test_small_cases_are_within_two_percent_of_the_optimum(seed: int, equal_shares: bool) -> None:
    loads = zipf(1, 10, 1.0, seed)
    topology = Topology((Rank(4), Rank(4), Rank(4)))
    best = solve(loads[0], topology, equal_shares=equal_shares, limit_s=3)
    assert best is not None
    made = plan(loads, topology, options=Options(equal_shares=equal_shares))
    assert best.bound * (1 - 1e-4) <= made.after[0] <= best.time * 1.02


def test_ranks_of_unequal_speed_and_memory_are_used_for_what_they_are() -> None:
    topology = Topology(tuple([Rank(10, 2.0)] * 2 + [Rank(9)] * 4 + [Rank(6, 0.5)] * 4))
    loads = zipf(4, 64, 0.8)
    made = plan(loads, topology)
    assert np.all(np.array(made.bounds) >= 0.97 * np.array(made.after))
    made = plan(zipf(4, 64, 0.8, seed=1), topology, made.placement)
    assert np.all(np.array(made.bounds) >= 0.97 * np.array(made.after))


def test_after_a_change_of_load_few_moves_are_enough() -> None:
    topology = uniform(8, 9, expert_bytes=10)
    old = plan(zipf(6, 64, 0.8), topology).placement
    loads = zipf(6, 64, 0.8, seed=1)
    assert balancedness(old, loads, topology).mean() < 0.8
    made = plan(loads, topology, old, options=Options(max_moves=6 * 16))
    assert balancedness(made.placement, loads, topology).min() > 0.985
    assert len(made.moves) <= 6 * 16
    assert made.gain == pytest.approx(1 - sum(made.after) / sum(made.before))
    anew = tuple(moves(old, plan(loads, topology).placement))
    assert len(made.moves) < len(anew) / 3


def test_shares_alone_are_tried_first() -> None:
    """Both ranks hold the hot expert; nothing has to move for it to be divided otherwise."""
    topology = uniform(2, 2)
    old = Placement(1, (((0, 1), (0, 2)),))
    made = plan(np.array([[10.0, 6.0, 2.0]]), topology, old)
    assert made.moves == ()
    assert made.after == pytest.approx((9.0,), rel=0.01)
    assert made.placement.shares is not None
    assert made.placement.shares[0][0][0] == pytest.approx(0.3, abs=0.01)


def test_a_move_is_made_only_where_it_pays() -> None:
    loads, topology = zipf(4, 32, 0.7, seed=5), uniform(4, 9)
    old = contiguous(4, 32, 4)
    needed = [
        len(plan(loads, topology, old, options=Options(move_cost=cost)).moves)
        for cost in (0.0, 0.005, 0.02, 0.1, 1.0)
    ]
    assert needed == sorted(needed, reverse=True)
    assert needed[0] > needed[2] > needed[-1] == 0


def test_when_a_rank_dies_only_what_was_nowhere_else_is_loaded() -> None:
    topology = uniform(4, 10, expert_bytes=7)
    loads = zipf(3, 24, 1.0)
    old = plan(loads, topology).placement
    made = over_remaining(old, 2, loads, topology)
    remaining = topology.without([2])
    made.placement.validate(24, remaining.slots)
    assert all(ranks[2] == () for ranks in made.placement.layers)
    alone = {
        (layer, expert)
        for layer in range(3)
        for expert, copies in enumerate(old.copies(layer, 24))
        if {copy.rank for copy in copies} == {2}
    }
    assert {(move.layer, move.expert) for move in made.moves} == alone
    assert len(made.moves) == len(alone)
    assert made.moved_bytes == 7 * len(alone)
    better = plan(loads, remaining, made.placement)
    assert sum(better.after) <= sum(made.after)


def test_a_group_that_is_full_gives_up_redundant_copies_for_what_is_missing() -> None:
    old = Placement(4, (((0, 1), (0, 2), (3, 0)),))
    made = over_remaining(old, [1], np.array([[9.0, 1, 1, 1]]), uniform(3, 2))
    assert set().union(*made.placement.layers[0]) == {0, 1, 2, 3}
    assert [move.expert for move in made.moves] == [2]
    assert made.placement.version == 5


def test_too_few_slots_are_told() -> None:
    old = contiguous(1, 6, 3)
    with pytest.raises(PlacementError, match="6 experts do not fit: the 2 ranks that are left hold 4 in all"):
        over_remaining(old, 0, np.ones((1, 6)), uniform(3, 2))
    with pytest.raises(PlacementError, match="unknown rank 3: the group has ranks 0 to 2"):
        over_remaining(old, 3, np.ones((1, 6)), uniform(3, 2))


@pytest.mark.parametrize(
    ("loads", "topology", "previous", "reason"),
    [
        (np.ones(4), uniform(2, 2), None, r"the shape \(4,\); it must be \[layers, experts\]"),
        (np.array([[1.0, np.nan]]), uniform(2, 2), None, "loads must be finite numbers of tokens, 0 or more"),
        (np.array([[1.0, -1.0]]), uniform(2, 2), None, "loads must be finite"),
        (np.ones((1, 2)), Topology((Rank(2, 0.0),)), None, "rank 0 has a speed of 0.0; it must be above 0"),
        (np.ones((1, 2)), Topology((Rank(-1),)), None, "rank 0 has -1 slots; 0 or more are allowed"),
        (np.ones((1, 2)), Topology((Rank(2, node=-1),)), None, "rank 0 is on node -1"),
        (np.ones((1, 4)), uniform(2, 2), contiguous(2, 4, 2), "the placement has 2 layers, loads have 1"),
        (np.ones((1, 4)), uniform(2, 2), contiguous(1, 4, 4), "for 4 ranks, the group has 2"),
        (np.ones((1, 4)), uniform(2, 3), contiguous(1, 5, 2), r"has experts \[3, 4\] on rank 1 in layer 0"),
    ],
)
def test_what_makes_no_sense_is_refused(
    loads: np.ndarray, topology: Topology, previous: Placement | None, reason: str
) -> None:
    with pytest.raises(PlacementError, match=reason):
        plan(loads, topology, previous)


def test_without_any_load_experts_are_spread_evenly() -> None:
    placement = plan(np.zeros((1, 8)), uniform(4, 3)).placement
    assert len({len(rank) for rank in placement.layers[0]}) == 1


def test_a_move_names_who_loads_what() -> None:
    loads = np.array([[4.0, 4.0, 1.0, 1.0]])
    made = plan(loads, uniform(2, 2), contiguous(1, 4, 2))
    assert made.after == (5.0,)
    assert {move.rank for move in made.moves} == {0, 1}
    assert all(isinstance(move, Move) and move.layer == 0 for move in made.moves)
