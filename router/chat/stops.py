"""Stop strings: cuts a text, given piece by piece, where the first of them is complete.

The automaton is Aho and Corasick's (CACM 18(6), 1975): one table look-up per character whatever the number of stop
strings, and its state's depth is exactly the length of the text that may yet become a stop string. So nothing is
held back without need, and where the text is cut does not depend on how it was split into pieces.
"""

from __future__ import annotations

from collections import deque


class StopAutomaton:
    """Built once per request; its scanners share it. State 0 is the root."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.next: list[dict[str, int]] = [{}]
        self.fail: list[int] = [0]
        self.depth: list[int] = [0]  # characters since the root
        self.match: list[str | None] = [None]  # the longest stop string that ends in this state
        for stop in stops:
            self._insert(stop)
        self._link()

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            child = self.next[state].get(char)
            if child is None:
                child = len(self.next)
                self.next[state][char] = child
                self.next.append({})
                self.fail.append(0)
                self.depth.append(self.depth[state] + 1)
                self.match.append(None)
            state = child
        self.match[state] = stop

    def _link(self) -> None:
        queue = deque(self.next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self.next[state].items():
                self.fail[child] = self.step(self.fail[state], char)
                self.match[child] = self.match[child] or self.match[self.fail[child]]
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        following = self.next[state].get(char)
        while following is None and state:
            state = self.fail[state]
            following = self.next[state].get(char)
        return following or 0


class StopScanner:
    """Of one text. The stop string whose last character comes first wins; of those that end there, the longest."""

    def __init__(self, automaton: StopAutomaton, include_stop: bool = False) -> None:
        self._automaton = automaton
        self._include_stop = include_stop
        self._state = 0
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that is now certain to come before any stop string. After a match: "" for ever."""
        if self.found is not None:
            return ""
        step, match = self._automaton.step, self._automaton.match
        state = self._state
        for end, char in enumerate(piece, 1):
            state = step(state, char)
            if match[state] is not None:
                self.found = match[state]
                return self._cut(piece[:end])
        self._state = state
        if self._include_stop:
            return piece
        return self._hold(piece)

    def finish(self) -> str:
        """The text held back when no more can come."""
        held, self._held = self._held, ""
        return held

    def _cut(self, piece: str) -> str:
        text, self._held = self._held + piece, ""
        assert self.found is not None
        return text if self._include_stop else text[: len(text) - len(self.found)]

    def _hold(self, piece: str) -> str:
        text = self._held + piece
        certain = len(text) - self._automaton.depth[self._state]
        self._held = text[certain:]
        return text[:certain]
