"""Counts of tokens in windows of time: recent ones weigh more, and after a change of load older ones not at all.

A window holds two halves, filled in turn message by message. A placement that was planned on one half is judged on the
other: what it has merely learned of noise gains nothing there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_WINDOWS = 24
_PARTS = 8  # windows that hold enough together
# Windows in a row that differ from what came before: one alone may be a burst that is over already.
_CONFIRM = 2
# Times the difference that independent tokens would make by chance: tokens of one text go to the same experts, and
# real counts of equal loads differ by more.
_CHANCE = 3.0
# A total variation distance that is not worth a second thought, however many tokens show it.
_TOLERATED = 0.02


class Window:
    """What was counted from `began` on."""

    def __init__(self, began: float, layers: int, experts: int, ranks: int) -> None:
        self.began = began
        self.routed = np.zeros((2, layers, experts))  # by half: tokens sent to each expert
        self.computed = np.zeros((layers, ranks))  # tokens that each rank computed
        self.seconds = np.zeros(ranks)  # that each rank reports of
        self.expert_s = np.zeros(ranks)  # of these, spent in experts


class Windows:
    """Of one group. Memory is bounded: MAX_WINDOWS windows.

    A window is full after `window_s`, but not before it has its part of `enough` tokens: where few are served, windows
    are longer, and it takes longer until they are forgotten.
    """

    def __init__(
        self, layers: int, experts: int, ranks: int, *, window_s: float, half_life_s: float, enough: int
    ) -> None:
        """`enough`: tokens of a layer that say how experts are used, each counted once for every expert."""
        self._shape = (layers, experts, ranks)
        self._window_s = window_s
        self._fades = 0.5 ** (window_s / half_life_s)  # by this factor for each window
        self._enough = enough
        self._windows: deque[Window] = deque(maxlen=MAX_WINDOWS)  # the last one is open
        self.changes = 0  # how often the load was seen to have changed

    def at(self, now: float) -> Window:
        """The window that what is heard now belongs to."""
        if not self._windows or self._is_full(self._windows[-1], now):
            self._drop_what_is_over()
            self._windows.append(Window(now, *self._shape))
        return self._windows[-1]

    def total(self, of: Callable[[Window], Array]) -> Array:
        """The sum over windows, of older ones less. Zero before anything was counted."""
        found = np.zeros_like(of(Window(0.0, *self._shape)))
        for window in self._windows:
            found = found * self._fades + of(window)
        return found

    def forget_computed(self) -> None:
        """The ranks have another placement now: what they computed before says nothing of it."""
        for window in self._windows:
            window.computed[:] = 0

    def _is_full(self, window: Window, now: float) -> bool:
        return now - window.began >= self._window_s and _tokens(window) >= self._enough / _PARTS

    def _drop_what_is_over(self) -> None:
        """Called when a window is full. What came before a change of load says nothing of what comes.

        Enough stays in any case: where texts come one after the other, each is a change.
        """
        windows = list(self._windows)
        kept = _CONFIRM
        while kept < len(windows) and sum(map(_tokens, windows[-kept:])) < self._enough:
            kept += 1
        older, recent = windows[:-kept], windows[-_CONFIRM:]
        if not older:
            return
        before = np.asarray(sum(window.routed.sum(axis=0) for window in older))
        if all(differ(before, window.routed.sum(axis=0)) for window in recent):
            self.changes += 1
            for _ in older:
                self._windows.popleft()


def _tokens(window: Window) -> float:
    """Of a layer, on average."""
    return float(window.routed.sum()) / window.routed.shape[1]


def differ(before: Array, after: Array) -> bool:
    """Whether two counts, both [layers, experts], are of different loads, rather than different by chance.

    By the total variation distance of their distributions, mean over layers, against what it would be for independent
    draws of one distribution: half the sum over experts of the mean absolute deviation sqrt(2/pi * p * (1/n + 1/m)).
    """
    n, m = before.sum(axis=1), after.sum(axis=1)
    counted = (n > 0) & (m > 0)
    if not counted.any():
        return False
    n, m = n[counted, None], m[counted, None]
    p, q = before[counted] / n, after[counted] / m
    distance = 0.5 * np.abs(p - q).sum(axis=1).mean()
    both = (before[counted] + after[counted]) / (n + m)
    chance = 0.5 * np.sqrt(2 / np.pi * both * (1 / n + 1 / m)).sum(axis=1).mean()
    return bool(distance > _TOLERATED + _CHANCE * chance)
