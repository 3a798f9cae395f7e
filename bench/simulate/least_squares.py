"""Least squares with coefficients of at least zero: no part of a step gives time back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy


def fit_positive(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients of the columns of `rows` that come closest to `seconds`, in shares of each (so that short steps
    count as much as long ones). Non-negative by Lawson and Hanson's active set ("Solving Least Squares Problems", 1974).
    """
    measured = numpy.asarray(seconds, dtype=float)
    if not len(measured) or (measured <= 0).any():
        raise ValueError("nothing to fit: every measured time must be above 0")
    matrix = numpy.asarray(rows, dtype=float) / measured[:, None]
    # Columns differ by ten orders of magnitude (tokens, pairs): scaled, they are equally well determined.
    scale = numpy.abs(matrix).max(axis=0)
    scale[scale == 0] = 1.0
    matrix = matrix / scale
    target = numpy.ones(len(measured))
    width = matrix.shape[1]
    free = numpy.zeros(width, dtype=bool)
    found = numpy.zeros(width)
    for _ in range(10 * width):
        gain = matrix.T @ (target - matrix @ found)
        gain[free] = -numpy.inf
        best = int(gain.argmax())
        if free.all() or gain[best] <= 1e-12:
            break
        free[best] = True
        while True:
            trial = numpy.zeros(width)
            trial[free] = numpy.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            if (trial[free] > 0).all():
                found = trial
                break
            falling = free & (trial <= 0)
            step = (found[falling] / (found[falling] - trial[falling])).min()
            found = found + step * (trial - found)
            free &= found > 1e-15
    return [float(value) for value in found / scale]
