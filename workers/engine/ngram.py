"""Guesses from the request's own text: what followed its last tokens when they occurred before (prompt look-up).

Pays where answers repeat their prompt: summaries, edits of code, extraction, lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from workers.engine.request import Request


class NgramProposer:
    is_free = True

    def __init__(self, shortest: int, longest: int) -> None:
        self._sizes = range(shortest, longest + 1)
        self._indexes: WeakKeyDictionary[Request, NgramIndex] = WeakKeyDictionary()

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        guesses = []
        for request, most in wanted:
            index = self._indexes.get(request)
            if index is None:
                index = self._indexes[request] = NgramIndex(request.token_ids, self._sizes)
            guesses.append(index.continuation(most) if most > 0 else [])
        return guesses


class NgramIndex:
    """Where each run of tokens last ended. Follows a list that only grows, at a constant price for each token."""

    def __init__(self, token_ids: list[int], sizes: range) -> None:
        self._token_ids = token_ids
        self._ends: list[tuple[int, dict[tuple[int, ...], int]]] = [(size, {}) for size in reversed(sizes)]
        self._indexed = 0  # runs that end at or before this place are in

    def continuation(self, most: int) -> list[int]:
        """At most so many tokens after the latest earlier occurrence of the longest run that has one."""
        token_ids = self._token_ids
        self._catch_up()
        for size, ends in self._ends:
            place = ends.get(tuple(token_ids[-size:])) if size < len(token_ids) else None
            if place is not None:
                guess = token_ids[place : place + most]
                while len(guess) < most:  # the occurrence touches the end: text of that period goes on
                    guess += guess[: most - len(guess)]
                return guess
        return []

    def _catch_up(self) -> None:
        """Every run but the one that ends the list: nothing has followed that yet."""
        token_ids, last = self._token_ids, len(self._token_ids) - 1
        for size, ends in self._ends:
            for end in range(max(self._indexed + 1, size), last + 1):
                ends[tuple(token_ids[end - size : end])] = end
        self._indexed = max(last, 0)
