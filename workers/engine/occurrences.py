"""Which tokens occur in a sequence that grows, and how often: what penalties hang on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence


class Occurrences:
    """Counts token_ids[start:], each token once. Arrays of int32, so that native code can read them in place."""

    def __init__(self, start: int = 0) -> None:
        self.tokens = array("i")  # distinct, in the order of their first occurrence
        self.counts = array("i")  # beside `tokens`
        self._place: dict[int, int] = {}
        self._end = start

    def at(self, token_ids: Sequence[int], draft: Sequence[int] = ()) -> Occurrences:
        """Caught up with `token_ids`, which only grows. With a draft: a copy that has counted it as well."""
        if self._end < len(token_ids):
            self._count(token_ids[self._end :])
            self._end = len(token_ids)
        if not draft:
            return self
        copy = Occurrences()
        copy.tokens, copy.counts, copy._place = self.tokens[:], self.counts[:], dict(self._place)
        copy._count(draft)
        return copy

    def _count(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            place = self._place.get(token)
            if place is None:
                self._place[token] = len(self.tokens)
                self.tokens.append(token)
                self.counts.append(1)
            else:
                self.counts[place] += 1
