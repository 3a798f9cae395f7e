from __future__ import annotations

import numpy as np
import pytest

from router.experts.baselines import eplb, eplb_global, placement_of, round_robin
from router.experts.placement import balancedness
from router.experts.topology import Rank, Topology, uniform
from workers.protocol.experts import PlacementError

# The example of EPLB's README: 2 layers, 12 experts in 4 groups, 16 replicas on 8 GPUs of 2 nodes.
LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_eplb_gives_its_published_example() -> None:
    physical = eplb(LOADS, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
    assert physical.tolist() == PUBLISHED
    even = balancedness(placement_of(physical, 8), LOADS, uniform(8, 2))
    assert even == pytest.approx([0.8277, 0.8050], abs=5e-5)


def test_eplbs_global_policy_is_as_even_as_it_was_measured() -> None:
    physical = eplb_global(LOADS, num_replicas=16, num_gpus=8)
    even = balancedness(placement_of(physical, 8), LOADS, uniform(8, 2))
    assert even == pytest.approx([0.9323, 0.8401], abs=5e-5)


def test_groups_that_nodes_cannot_share_evenly_are_ignored() -> None:
    assert eplb(LOADS, 16, 3, 2, 8).tolist() == eplb_global(LOADS, 16, 8).tolist()


def test_two_replicas_on_one_gpu_become_one_copy_with_both_shares() -> None:
    placement = placement_of(np.array([[0, 0, 1, 0, 2, 1]]), num_gpus=3)
    assert placement.layers == (((0,), (1, 0), (2, 1)),)
    assert placement.shares == (((2 / 3,), (1 / 2, 1 / 3), (1.0, 1 / 2)),)
    placement.validate(3, [2, 2, 2])


@pytest.mark.parametrize(
    ("replicas", "groups", "nodes", "gpus"), [(15, 4, 2, 8), (8, 4, 2, 8), (16, 4, 3, 8), (16, 8, 2, 8)]
)
def test_eplb_refuses_what_it_cannot_divide(replicas: int, groups: int, nodes: int, gpus: int) -> None:
    with pytest.raises(PlacementError):
        eplb(LOADS, replicas, groups, nodes, gpus)


def test_round_robin_deals_to_ranks_with_room() -> None:
    topology = Topology((Rank(1), Rank(3), Rank(3)))
    placement = round_robin(2, 5, topology, version=7)
    assert placement.layers[1] == ((0,), (1, 3, 0), (2, 4, 1))
    assert placement.version == 7
    with pytest.raises(PlacementError, match="8 experts do not fit: the 3 ranks that are left hold 7 in all"):
        round_robin(1, 8, topology)
