from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.transfer.ring import Ring

SIZE = 20


@given(st.lists(st.one_of(st.none(), st.integers(1, SIZE)), max_size=60))
def test_pieces_never_overlap_and_a_ring_that_drains_has_room(moves: list[int | None]) -> None:
    ring = Ring(SIZE)
    taken: deque[range] = deque()
    for num_bytes in moves:
        if num_bytes is None:
            if taken:
                ring.give_back()
                taken.popleft()
            continue
        at = ring.take(num_bytes)
        if at is None:
            assert taken, "an empty ring has room for whatever fits"
            used = {byte for piece in taken for byte in piece}
            end = taken[-1].stop
            assert end + num_bytes > SIZE or used & set(range(end, end + num_bytes)), "there was room behind"
            wrapped = taken[-1].start < taken[0].start
            assert wrapped or used & set(range(num_bytes)), "there was room at the start"
            continue
        piece = range(at, at + num_bytes)
        assert piece.start >= 0
        assert piece.stop <= SIZE
        assert not any(set(piece) & set(other) for other in taken)
        taken.append(piece)


def test_two_halves_fill_it() -> None:
    ring = Ring(10)
    assert [ring.take(5), ring.take(5), ring.take(1)] == [0, 5, None]
    ring.give_back()
    assert [ring.take(6), ring.take(5), ring.take(1)] == [None, 0, None]


def test_what_can_never_fit_is_said() -> None:
    with pytest.raises(ValueError, match="11 bytes do not fit a ring of 10"):
        Ring(10).take(11)
