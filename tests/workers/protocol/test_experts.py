from __future__ import annotations

import msgspec
import pytest

from workers.protocol.experts import Copy, Move, Placement, PlacementError, contiguous, moves

TWO_RANKS = Placement(3, (((0, 1), (2, 0)),))


def test_copies_share_equally_unless_told_otherwise() -> None:
    assert TWO_RANKS.copies(0, 3) == [
        [Copy(0, 0, 0.5), Copy(1, 1, 0.5)],
        [Copy(0, 1, 1.0)],
        [Copy(1, 0, 1.0)],
    ]
    uneven = Placement(3, TWO_RANKS.layers, (((0.75, 1.0), (1.0, 0.25)),))
    assert uneven.copies(0, 3)[0] == [Copy(0, 0, 0.75), Copy(1, 1, 0.25)]


def test_a_valid_placement_passes_and_survives_the_wire() -> None:
    uneven = Placement(3, TWO_RANKS.layers, (((0.75, 1.0), (1.0, 0.25)),))
    for placement in (TWO_RANKS, uneven):
        placement.validate(3, [2, 2], num_layers=1)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(placement), type=Placement) == placement


@pytest.mark.parametrize(
    ("layer", "shares", "reason"),
    [
        (((0, 1), (2,)), None, "layer 0: expert 3 is on no rank (1 of 4 are missing)"),
        (((0, 1, 2), (3,)), None, "layer 0: rank 0 is given 3 experts, its memory holds 2"),
        (((0, 1), (2, 3), (0,)), None, "layer 0: unknown rank 2: the group has ranks 0 to 1"),
        (((0, 1),), None, "layer 0: nothing is said of rank 1"),
        (((0, 0), (2, 3)), None, "layer 0: rank 0 is given expert 0 2 times"),
        (((0, 1), (2, 4)), None, "layer 0: rank 1 is given expert 4; there are 0 to 3"),
        (((0, -1), (2, 3)), None, "layer 0: rank 0 is given expert -1; there are 0 to 3"),
        (((0, 1), (2, 3)), ((1.0, 0.5), (1.0, 1.0)), "layer 0: the shares of expert 1 sum to 0.5"),
        (((0, 1), (2, 3)), ((1.0, 1.5), (1.0, 1.0)), "layer 0: rank 0 has a share of 1.5 of expert 1"),
        (((0, 1), (2, 3)), ((1.0, float("nan")), (1.0, 1.0)), "has a share of nan of expert 1"),
        (((0, 1), (2, 3)), ((1.0,), (1.0, 1.0)), "shares do not have the shape"),
    ],
)
def test_what_is_invalid_is_refused_with_the_reason(layer, shares, reason: str) -> None:  # type: ignore[no-untyped-def]
    placement = Placement(1, (layer,), None if shares is None else (shares,))
    with pytest.raises(PlacementError) as told:
        placement.validate(4, [2, 2])
    assert reason in str(told.value)


def test_the_number_of_layers_must_be_the_models() -> None:
    with pytest.raises(PlacementError, match="has 1 layers, the model has 2"):
        TWO_RANKS.validate(3, [2, 2], num_layers=2)
    with pytest.raises(PlacementError, match="shares are given for 0 of 1 layers"):
        Placement(1, TWO_RANKS.layers, ()).validate(3, [2, 2])


def test_contiguous_covers_every_expert_in_order() -> None:
    placement = contiguous(num_layers=2, num_experts=7, num_ranks=3)
    assert placement.layers[1] == ((0, 1, 2), (3, 4), (5, 6))
    placement.validate(7, [3, 2, 2], num_layers=2)
    with pytest.raises(PlacementError, match="give one or more"):
        contiguous(1, 4, 0)


def test_only_what_a_rank_lacks_is_moved() -> None:
    after = Placement(4, (((1, 2), (0, 2)),))
    assert list(moves(TWO_RANKS, after)) == [Move(layer=0, rank=0, expert=2)]
    assert list(moves(TWO_RANKS, TWO_RANKS)) == []
    with pytest.raises(PlacementError, match="same model and group"):
        list(moves(TWO_RANKS, contiguous(1, 3, 3)))
