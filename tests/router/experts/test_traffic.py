from __future__ import annotations

import numpy as np
import pytest

from router.experts.placement import Options, balancedness, plan
from router.experts.topology import uniform
from router.experts.traffic import Traffic, cross_node
from workers.protocol.experts import Placement, PlacementError


def two_worlds(
    num_layers: int, num_experts: int, seed: int = 0, leak: float = 0.1
) -> tuple[np.ndarray, Traffic]:
    """Loads, and hops that mostly stay within one of two hidden halves of the experts of each layer."""
    random = np.random.default_rng(seed)
    halves = np.stack([random.permutation(num_experts) % 2 for _ in range(num_layers)])
    hops = random.uniform(0.5, 1.5, (num_layers - 1, num_experts, num_experts))
    for layer in range(num_layers - 1):
        hops[layer][halves[layer][:, None] != halves[layer + 1][None, :]] *= leak
    loads = np.concatenate([hops.sum(axis=2), hops[-1:].sum(axis=1)])
    return loads, Traffic(hops)


def counted_hops(placement: Placement, node_of: list[int], traffic: Traffic) -> float:
    """Share of hops to another node, pair of copies by pair of copies."""
    assert traffic.coactivation is not None
    crossing = 0.0
    for layer, hops in enumerate(traffic.coactivation):
        here = placement.copies(layer, hops.shape[0])
        there = placement.copies(layer + 1, hops.shape[0])
        for i, j in np.ndindex(*hops.shape):
            for a in here[i]:
                for b in there[j]:
                    if node_of[a.rank] != node_of[b.rank]:
                        crossing += hops[i, j] * a.share * b.share
    return crossing / float(traffic.coactivation.sum())


def test_cross_node_counts_pairs_of_copies() -> None:
    loads, traffic = two_worlds(3, 8)
    topology = uniform(4, 3, ranks_per_node=2)
    placement = plan(loads, topology).placement
    expected = counted_hops(placement, topology.nodes, traffic)
    assert cross_node(placement, topology, 8, traffic) == pytest.approx(expected)


def test_sources_count_where_tokens_start() -> None:
    placement = Placement(0, (((0, 1), (1, 2)),))
    starts = np.array([[[5.0, 1, 0], [3, 4, 1]]])  # node 0 sends 5 to expert 0, ...
    crossing = cross_node(placement, uniform(2, 2, ranks_per_node=1), 3, Traffic(sources=starts))
    assert crossing == pytest.approx((0.5 + 3 + 2) / 14)


def test_hidden_halves_are_found_within_the_imbalance_allowed() -> None:
    loads, traffic = two_worlds(4, 32)
    topology = uniform(8, 5, ranks_per_node=4)
    made = plan(loads, topology, traffic=traffic, options=Options(imbalance=0.05))
    assert cross_node(plan(loads, topology).placement, topology, 32, traffic) > 0.4
    assert cross_node(made.placement, topology, 32, traffic) < 0.12  # what leaks is 0.09
    assert np.all(np.array(made.after) <= np.array(made.bounds) * 1.0501)


def test_from_an_incumbent_hops_are_saved_by_few_moves() -> None:
    loads, traffic = two_worlds(4, 32)
    topology = uniform(8, 5, ranks_per_node=4)
    old = plan(loads, topology).placement
    crossing = [cross_node(old, topology, 32, traffic)]
    for most in (8, 24, 72):
        made = plan(loads, topology, old, traffic=traffic, options=Options(max_moves=most))
        assert len(made.moves) <= most
        assert balancedness(made.placement, loads, topology).min() >= 1 / 1.0501
        crossing.append(cross_node(made.placement, topology, 32, traffic))
    assert crossing == sorted(crossing, reverse=True)
    assert crossing[-1] < crossing[0] - 0.1


def test_experts_go_where_their_tokens_start() -> None:
    random = np.random.default_rng(0)
    home = random.permutation(16) % 2
    loads = random.uniform(1, 2, (1, 16))
    starts = np.where(home[None, :] == np.arange(2)[:, None], 0.9, 0.1) * loads
    topology = uniform(4, 5, ranks_per_node=2)
    made = plan(loads, topology, traffic=Traffic(sources=starts[None]))
    assert cross_node(made.placement, topology, 16, Traffic(sources=starts[None])) < 0.2


def test_traffic_of_another_model_is_refused() -> None:
    loads, traffic = two_worlds(3, 8)
    with pytest.raises(
        PlacementError, match=r"coactivation has the shape \(2, 8, 8\); it must be \(1, 8, 8\)"
    ):
        plan(loads[:2], uniform(4, 3), traffic=traffic)
    with pytest.raises(PlacementError, match="sources has the shape"):
        plan(loads, uniform(4, 3, ranks_per_node=2), traffic=Traffic(sources=np.ones((3, 3, 8))))
