from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from workers.engine.occurrences import Occurrences


@given(
    tokens=st.lists(st.integers(0, 5)),
    start=st.integers(0, 5),
    draft=st.lists(st.integers(0, 7)),
    data=st.data(),
)
def test_counts_are_those_of_counting_anew(
    tokens: list[int], start: int, draft: list[int], data: st.DataObject
) -> None:
    start = min(start, len(tokens))
    seen = Occurrences(start)
    for end in sorted(data.draw(st.lists(st.integers(start, len(tokens))))):
        drafted = seen.at(tokens[:end], draft)
        assert dict(zip(drafted.tokens, drafted.counts, strict=True)) == Counter([*tokens[start:end], *draft])
        known = seen.at(tokens[:end])
        assert dict(zip(known.tokens, known.counts, strict=True)) == Counter(tokens[start:end])
