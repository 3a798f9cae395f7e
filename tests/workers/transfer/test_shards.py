from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.transfer.shards import heads_of, parts

RANKS = st.integers(1, 16)


def legal(ranks: int, heads: int) -> bool:
    return heads % ranks == 0 or ranks % heads == 0


@given(heads=st.integers(1, 16), sources=RANKS, destinations=RANKS)
def test_every_head_of_every_destination_exactly_once(heads: int, sources: int, destinations: int) -> None:
    if not (legal(sources, heads) and legal(destinations, heads)):
        with pytest.raises(ValueError, match="cannot be shared out"):
            parts(sources, destinations, heads)
        return
    found = parts(sources, destinations, heads)
    given_to = Counter((part.destination, head) for part in found for head in part.heads)
    wanted = {(rank, head) for rank in range(destinations) for head in heads_of(rank, destinations, heads)}
    assert given_to == dict.fromkeys(wanted, 1)
    for part in found:
        held = heads_of(part.source, sources, heads)
        assert set(part.heads) <= set(held), "nobody sends what it has not"
        local = part.source_heads(sources, heads)
        assert [held[i] for i in local] == list(part.heads)
        own = heads_of(part.destination, destinations, heads)
        assert [own[i] for i in part.destination_heads(destinations, heads)] == list(part.heads)


@given(heads=st.integers(1, 16), ranks=RANKS)
def test_ranks_hold_all_heads_in_runs_of_equal_length(heads: int, ranks: int) -> None:
    if not legal(ranks, heads):
        with pytest.raises(ValueError, match=f"{heads} KV heads .* {ranks} ranks"):
            heads_of(0, ranks, heads)
        return
    held = [heads_of(rank, ranks, heads) for rank in range(ranks)]
    assert len({len(one) for one in held}) == 1
    assert Counter(head for one in held for head in one) == dict.fromkeys(
        range(heads), max(1, ranks // heads)
    )


def test_sources_that_hold_the_same_head_take_turns() -> None:
    assert [part.source for part in parts(4, 4, 2)] == [0, 1, 2, 3]
    assert [part.source for part in parts(8, 2, 2)] == [0, 5]
    assert [part.source for part in parts(4, 1, 2)] == [0, 2]
    assert [part.source for part in parts(4, 8, 2)] == [0, 1, 0, 1, 2, 3, 2, 3]


@pytest.mark.parametrize("ranks", [0, -1, 2**31, 2**63])
def test_numbers_of_ranks_that_no_worker_has(ranks: int) -> None:
    """A peer says how many it has; it must cost neither time nor memory."""
    for sources, destinations in [(ranks, 1), (1, ranks)]:
        with pytest.raises(ValueError, match=f"{ranks} ranks"):
            parts(sources, destinations, 2)
    with pytest.raises(ValueError, match="rank"):
        heads_of(0, ranks, 2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        heads_of(2, 2, 2)
