"""How low the fullest rank can be at best, whatever the placement: what a plan is measured by.

All times are tokens divided by speed. Every bound holds for any division of an expert's tokens among its copies, so
for equal shares too. With E experts of loads w (heaviest first), R ranks and D = slots - E redundant copies:

* *crowding*: the i heaviest experts are on some j ranks, and can be on at most i + D. The slots outside those ranks
  are too few for all the others, so that the lightest of them have to be inside too. Whatever j is, their sum is
  served by j ranks. With i = E this is the mean load.
* *overflow*: what the fast ranks have no slots for is served by the slow ones: at least the lightest experts.
* *pigeonholes*: of the (k-1) * R + 1 + D heaviest experts at most D have more than one copy, so k whole ones meet on
  some rank.
* *copies*: see `_copies`. Where few experts carry much and redundant copies are few, this is the one that counts.

The linear relaxation of the exact problem (`exact.py`) gives no more than the mean and the hottest expert divided by
all ranks; these bounds are never below it.
"""

from __future__ import annotations

import numpy as np

from router.experts.arrays import Floats, Ints
from router.experts.topology import Topology

_PRECISION = 1e-5  # of the search for the least T that leaves enough copies
_PASSENGERS = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4)  # quantiles tried for the weight that a passenger counts as
_SLOPES = (0.0, 0.2, 0.5)  # tried between the least and the greatest allowed


def lower_bound(loads: Floats, topology: Topology) -> float:
    """No placement's fullest rank is below this. loads: tokens of each expert of one layer [E]."""
    heavy_first = np.sort(np.asarray(loads, dtype=np.float64))[::-1]
    speeds = np.array([rank.speed for rank in topology.ranks if rank.slots])
    slots = np.array([rank.slots for rank in topology.ranks if rank.slots])
    if not heavy_first.any():
        return 0.0
    fastest = float(speeds.max())
    crowding = _crowding(heavy_first, speeds, slots)
    pigeonholes = _pigeonholes(heavy_first, slots) / fastest
    overflow = _overflow(heavy_first, speeds, slots)
    return _copies(heavy_first / fastest, slots, max(crowding, pigeonholes, overflow))


def _crowding(heavy_first: Floats, speeds: Floats, slots: Ints) -> float:
    num_experts, num_ranks = len(heavy_first), len(speeds)
    redundant = int(slots.sum()) - num_experts
    heaviest = np.cumsum(heavy_first)  # of the i + 1 heaviest
    lightest = np.concatenate([[0.0], np.cumsum(heavy_first[::-1])])
    # For j = 1..R: at best the fastest ranks, and at best the largest ones outside.
    fastest = np.cumsum(np.sort(speeds)[::-1])
    outside = np.concatenate([[0], np.cumsum(np.sort(slots)[::-1])])[num_ranks - 1 :: -1]
    i = np.arange(1, num_experts + 1)[:, None]
    j = np.arange(1, num_ranks + 1)[None, :]
    inside = np.maximum(num_experts - i - outside[None, :], 0)
    time = (heaviest[:, None] + lightest[inside]) / fastest[None, :]
    time[j > i + redundant] = np.inf
    return float(time.min(axis=1).max())


def _overflow(heavy_first: Floats, speeds: Floats, slots: Ints) -> float:
    lightest = np.concatenate([[0.0], np.cumsum(heavy_first[::-1])])
    slow_first = np.lexsort((slots, speeds))
    outside = int(slots.sum()) - np.cumsum(slots[slow_first])
    inside = np.maximum(len(heavy_first) - outside, 0)
    return float((lightest[inside] / np.cumsum(speeds[slow_first])).max())


def _pigeonholes(heavy_first: Floats, slots: Ints) -> float:
    num_experts, num_ranks = len(heavy_first), len(slots)
    redundant = int(slots.sum()) - num_experts
    sums = np.concatenate([[0.0], np.cumsum(heavy_first)])
    best = 0.0
    for together in range(1, int(slots.max()) + 1):
        counted = (together - 1) * num_ranks + 1 + redundant
        if counted > num_experts:
            break
        best = max(best, float(sums[counted] - sums[counted - together]))
    return best


def _copies(heavy_first: Floats, slots: Ints, at_least: float) -> float:
    """The least time T, not below `at_least`, for which redundant copies may suffice. Times of experts [E].

    Link every expert with the ranks that hold it. A connected part of k ranks with c slots each has at least k - 1
    redundant copies (or empty slots), and (c-1) * k + 1 experts if just so many. Say it holds hot experts H (those
    that no rank can serve alone); the others, passengers, take at least some time L each, less d_e for those that
    are lighter. All this has to fit into k * T, so with tau = T - (c-1) * L and d = sum of d_e

        redundant copies of the part  >=  ceil((sum over H of (w_e - L) + L - d) / tau) - 1.

    Alone and with d = 0 a hot expert costs n_e = ceil(w_e / tau) - 1, with a rest of alpha_e = w_e / tau - n_e. Parts
    with several hot experts, and light passengers, save s of these where the rests are small:
    sum of alpha_e <= (|H|-1) * L / tau + d / tau + 1 - s. For any theta between L / tau and 1 it follows that
    s <= sum of max(0, 1 - alpha_e / theta) + d / (tau * theta), summed over all parts too. So T is too small if

        sum of (n_e - max(0, 1 - alpha_e / theta))  -  sum of d_e / (tau * theta)  >  D.

    The left side falls as T grows. L and theta are free: some are tried. (L = 0: only ceil(w_e / T) copies.)
    """
    redundant = int(slots.sum()) - len(heavy_first)
    others = int(slots.min()) - 1  # passengers of a rank
    best = at_least
    for quantile in _PASSENGERS if others else (None,):
        if quantile is None:
            passenger = lighter = 0.0
        else:
            place = int(len(heavy_first) * quantile)
            passenger = float(heavy_first[-1 - place])
            lighter = float((passenger - heavy_first[len(heavy_first) - place :]).sum())
        least = passenger / max(best - others * passenger, 1e-300)
        if least >= 1 or best <= others * passenger:
            continue
        for slope in _SLOPES:
            theta = least + (1 - least) * slope
            best = _least_time(heavy_first, redundant, best, others * passenger, lighter, theta)
    return best


def _least_time(
    loads: Floats, redundant: int, low: float, passengers: float, lighter: float, theta: float
) -> float:
    """The least T >= low that `_copies` cannot exclude with these numbers."""

    def excluded(time: float) -> bool:
        tau = time - passengers
        ratio = loads[: int(np.searchsorted(-loads, -tau))] / tau
        copies = np.ceil(ratio - 1e-9) - 1
        needed = float(copies.sum()) - lighter / (tau * theta) if theta else float(copies.sum())
        if theta:
            needed -= float(np.maximum(1 - (ratio - copies) / theta, 0.0).sum())
        return needed > redundant + 1e-9

    if not excluded(low * (1 + 1e-3)):
        return low
    high = max(2 * low, float(loads[0]) + passengers)
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if excluded(middle) else (low, middle)
    return low
