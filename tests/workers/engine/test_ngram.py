from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.engine.ngram import NgramIndex


def by_scanning(token_ids: list[int], sizes: range, most: int) -> list[int]:
    for size in reversed(sizes):
        for end in range(len(token_ids) - 1, size - 1, -1):
            if size < len(token_ids) and token_ids[end - size : end] == token_ids[-size:]:
                guess = list(token_ids[end : end + most])
                period = list(guess)
                while len(guess) < most:
                    guess.append(period[len(guess) % len(period)])
                return guess
    return []


@given(
    tokens=st.lists(st.integers(0, 2), max_size=30),
    shortest=st.integers(1, 3),
    more=st.integers(0, 2),
    most=st.integers(1, 5),
)
def test_guesses_are_those_of_a_scan(tokens: list[int], shortest: int, more: int, most: int) -> None:
    sizes = range(shortest, shortest + more + 1)
    known: list[int] = []
    index = NgramIndex(known, sizes)
    for token in tokens:
        known.append(token)
        if token != 1:  # not asked at every length
            assert index.continuation(most) == by_scanning(known, sizes, most)


def test_the_longest_match_counts_then_the_latest() -> None:
    assert NgramIndex([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], range(2, 4)).continuation(2) == [9, 2]
    assert NgramIndex([2, 3, 9, 2, 3, 8, 2, 3], range(2, 4)).continuation(1) == [8]
    assert NgramIndex([1, 2, 3], range(2, 4)).continuation(4) == []


def test_a_loop_is_followed_as_far_as_asked() -> None:
    assert NgramIndex([7, 1, 2, 1, 2], range(2, 3)).continuation(5) == [1, 2, 1, 2, 1]
