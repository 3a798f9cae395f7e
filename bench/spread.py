"""What several runs amount to: the median, the range, and the order in which runs are taken."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Of one figure over several runs."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError when there is no value."""
        if not values:
            raise ValueError("no run has given a value")
        return cls(statistics.median(values), min(values), max(values), len(values))

    def shown(self, digits: int = 0, scale: float = 1.0) -> str:
        """`median (low–high)`, or the bare value of a single run."""
        median, low, high = (f"{value * scale:,.{digits}f}" for value in (self.median, self.low, self.high))
        return median if self.runs == 1 else f"{median} ({low}–{high})"


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of ascending values, by nearest rank from above."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def interleaved(things: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """(round, thing): each once a round, and each round begins one further on.

    What drifts while a benchmark runs (heat, neighbours) then falls on all alike, and none is always the first.
    """
    for number in range(rounds):
        shift = number % len(things) if things else 0
        for thing in [*things[shift:], *things[:shift]]:
            yield number, thing
