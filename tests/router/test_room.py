"""What a refusal means for others, and when it is over."""

from __future__ import annotations

import pytest

from router.room import Refusal
from workers.protocol.messages import Load, Room


def test_who_needs_fewer_blocks_may_be_tried() -> None:
    refusal = Refusal.of(Room(blocks=20))
    assert not refusal.refuses(19)
    assert refusal.refuses(20)


@pytest.mark.parametrize("lacks", [Room(requests=1), Room(tokens=1), Room(requests=1, blocks=20), None])
def test_where_there_is_no_place_nobody_is_tried(lacks: Room | None) -> None:
    assert Refusal.of(lacks).refuses(1)


@pytest.mark.parametrize("first", [Room(blocks=20), Room(blocks=50), Room(tokens=1)])
def test_of_two_the_stricter_counts(first: Room) -> None:
    small, place = Refusal.of(Room(blocks=10)), Refusal.of(Room(requests=1))
    assert Refusal.of(Room(blocks=10), Refusal.of(first)).from_blocks == min(
        10, Refusal.of(first).from_blocks
    )
    assert Refusal.of(Room(requests=1), small) == place
    assert Refusal.of(Room(blocks=10), place) == place


def test_it_is_over_with_room_for_what_was_refused() -> None:
    refusal = Refusal.of(Room(blocks=20))
    assert not refusal.is_over(Load(free_blocks=100, room=Room(requests=4, blocks=19, tokens=100)))
    assert refusal.is_over(Load(room=Room(requests=0, blocks=20)))
    assert not Refusal.of(Room(tokens=1)).is_over(Load(room=Room(requests=4, blocks=100, tokens=0)))


def test_workers_that_do_not_say_are_asked_after_every_heartbeat() -> None:
    assert Refusal.of(None).is_over(Load())
    assert Refusal.of(Room(blocks=20)).is_over(Load(free_blocks=1))
