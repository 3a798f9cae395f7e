"""A ring of bytes: pieces are taken, and given back in the same order. Pure."""

from __future__ import annotations

from collections import deque


class Ring:
    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._taken: deque[tuple[int, int]] = deque()  # (start, end), oldest first

    def take(self, num_bytes: int) -> int | None:
        """Offset of a free piece, None while there is no room. A piece never wraps."""
        if num_bytes > self.num_bytes:
            raise ValueError(f"{num_bytes} bytes do not fit a ring of {self.num_bytes}")
        if not self._taken:
            start = 0
        else:
            head, tail = self._taken[0][0], self._taken[-1][1]
            if tail > head:
                start = tail if tail + num_bytes <= self.num_bytes else 0
                if start == 0 and num_bytes > head:
                    return None
            else:
                start = tail
                if tail + num_bytes > head:
                    return None
        self._taken.append((start, start + num_bytes))
        return start

    def give_back(self) -> None:
        """The oldest piece is free."""
        self._taken.popleft()
