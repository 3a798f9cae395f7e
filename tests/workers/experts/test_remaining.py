"""What survivors make of a placement."""

from __future__ import annotations

import random

import pytest

from workers.experts.remaining import over_members
from workers.protocol.experts import Placement, PlacementError, contiguous


def test_nothing_changes_while_all_are_there() -> None:
    placement = Placement(3, (((0, 1), (1, 2)),), (((1.0, 0.3), (0.7, 1.0)),))
    assert over_members(placement, 3, [0, 1], slots=2) == placement


def test_only_what_is_lost_is_loaded_anew() -> None:
    rng = random.Random(0)
    for _ in range(200):
        num_experts, num_ranks = rng.randint(1, 12), rng.randint(2, 5)
        placement = contiguous(3, num_experts, num_ranks, version=7)
        members = sorted(rng.sample(range(num_ranks), rng.randint(1, num_ranks)))
        left = over_members(placement, num_experts, members, slots=num_experts)
        slots = [num_experts if rank in members else 0 for rank in range(num_ranks)]
        left.validate(num_experts, slots)
        assert left.version == 7
        for before, after in zip(placement.layers, left.layers, strict=True):
            for rank in members:
                assert after[rank][: len(before[rank])] == before[rank]
            sizes = [len(after[rank]) for rank in members]
            assert max(sizes) - min(sizes) <= 1 or max(sizes) == max(len(before[r]) for r in members)


def test_copies_make_room() -> None:
    placement = Placement(1, (((0, 1), (1, 2), (3,)),))
    left = over_members(placement, 4, [0, 1], slots=2)
    left.validate(4, [2, 2, 0])


def test_too_little_memory_is_said() -> None:
    with pytest.raises(
        PlacementError, match="layer 0: 4 experts do not fit on ranks 1, whose memory holds 2 each"
    ):
        over_members(contiguous(1, 4, 2), 4, [1], slots=2)
