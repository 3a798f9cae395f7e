"""The sizes for which steps are captured in graphs, and which of them a step runs in. Pure.

A graph runs at the size it was captured for, so a step takes the smallest one that holds it, and rows that fill up take
part. Decoding steps, where every sequence has one token, are captured for numbers of sequences 1, 2, 4, then multiples
of 8: what a row costs more is little beside reading the weights, and is at most 7 rows. Small steps that also read
prompts are captured whole as well, padded to room for as many sequences as may run. That is one mechanism instead of two
(no graphs in pieces around attention), because attention is sized by bounds and finds its sequences on the device.

Their sizes double up to 128 tokens, since up to there a step takes as long as reading the weights: by its maker's figures
(989 TFLOP/s, 4.8 TB/s) an H200 multiplies a weight of 16 bits with some 200 numbers while it reads one. From there on what
fills up costs time, and from 256 on launches are hidden: larger steps are launched one kernel at a time at their own size,
while the device is at the step before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """What there is room for in one step's arrays."""

    tokens: int
    seqs: int
    rows: int  # hidden states that go to the head
    max_queries: int  # tokens of one sequence

    def holds(self, tokens: int, seqs: int, rows: int, max_queries: int) -> bool:
        return (
            tokens <= self.tokens
            and seqs <= self.seqs
            and rows <= self.rows
            and max_queries <= self.max_queries
        )


def decode_shapes(most: int) -> list[Shape]:
    """For up to `most` sequences of one token each, ascending."""
    sizes = [size for size in (1, 2, 4) if size < most]
    sizes += range(8, most, 8)
    return [Shape(size, size, size, 1) for size in [*sizes, most]]


def mixed_shapes(most_tokens: int, max_seqs: int) -> list[Shape]:
    """For steps of up to `most_tokens` tokens of up to `max_seqs` sequences, ascending; none where it is 0."""
    if not most_tokens:
        return []
    sizes = [size for size in (16, 32, 64, 128) if size < most_tokens]
    sizes += range(192, most_tokens, 64)
    return [Shape(size, min(size, max_seqs), min(size, max_seqs), size) for size in [*sizes, most_tokens]]


class Buckets:
    """Finds a step's shape."""

    def __init__(self, decode: Sequence[Shape], mixed: Sequence[Shape]) -> None:
        """Each ascending by tokens."""
        self._decode, self._mixed = list(decode), list(mixed)
        self._decode_tokens = [shape.tokens for shape in decode]
        self._mixed_tokens = [shape.tokens for shape in mixed]

    @classmethod
    def of(cls, shapes: Sequence[Shape]) -> Buckets:
        ascending = sorted(shapes, key=lambda shape: shape.tokens)
        decode = [shape for shape in ascending if shape.max_queries == 1]
        return cls(decode, [shape for shape in ascending if shape.max_queries > 1])

    @property
    def all(self) -> list[Shape]:
        """The largest first: what a capture allocates and gives back serves the ones after it."""
        return sorted(self._decode + self._mixed, key=lambda shape: -shape.tokens)

    def shape_for(self, tokens: int, seqs: int, rows: int) -> Shape | None:
        """None: the step is not run in a graph. A step of sequences of one token each has as many rows."""
        if not tokens:
            return None
        if tokens == seqs == rows:
            place = bisect_left(self._decode_tokens, tokens)
            if place < len(self._decode):
                return self._decode[place]
        place = bisect_left(self._mixed_tokens, tokens)
        if place == len(self._mixed):
            return None
        shape = self._mixed[place]
        return shape if shape.holds(tokens, seqs, rows, tokens) else None
