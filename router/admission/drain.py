"""How fast the line moves: what was measured while somebody waited."""

from __future__ import annotations

import math

_MEMORY_S = 10.0  # what lies longer back counts 1/e
_MIN_PLACEMENTS = 8  # before that nothing is predicted


class DrainRate:
    """Work placed out of the line per second, exponentially weighted. Only time in which somebody waits counts.

    A rate of both sums rather than a mean of gaps: places come in bursts when a large request ends, and gaps of zero
    between long ones say little one by one.
    """

    def __init__(self) -> None:
        self._work = 0.0
        self._busy_s = 0.0
        self._at = 0.0
        self._busy = False
        self._placements = 0

    def busy(self, busy: bool, now: float) -> None:
        """Does anybody wait from now on?"""
        if busy != self._busy:
            self._advance(now)
            self._busy = busy

    def placed(self, work: float, now: float) -> None:
        self._advance(now)
        self._work += work
        self._placements += 1

    def work_per_s(self, now: float) -> float | None:
        """None until enough was seen. A stall of all workers lowers it while it lasts."""
        if self._placements < _MIN_PLACEMENTS:
            return None
        self._advance(now)
        return self._work / self._busy_s if self._busy_s > 0 and self._work > 0 else None

    def _advance(self, now: float) -> None:
        """Time in which nobody waited is cut out: the sums stand still meanwhile."""
        passed, self._at = max(now - self._at, 0.0), max(now, self._at)
        if not self._busy or not passed:
            return
        kept = math.exp(-passed / _MEMORY_S)
        self._work *= kept
        self._busy_s = self._busy_s * kept + _MEMORY_S * (1.0 - kept)


class Typical:
    """A value that most of what is measured stays below: mean plus twice the mean deviation, as TCP's timers do."""

    _GAIN = 0.1

    def __init__(self) -> None:
        self._mean: float | None = None
        self._deviation = 0.0

    def add(self, value: float) -> None:
        if self._mean is None:
            self._mean, self._deviation = value, value / 2
            return
        error = value - self._mean
        self._mean += self._GAIN * error
        self._deviation += self._GAIN * (abs(error) - self._deviation)

    @property
    def mean(self) -> float | None:
        return self._mean

    @property
    def upper(self) -> float:
        """0 until something was measured."""
        return 0.0 if self._mean is None else self._mean + 2 * self._deviation
