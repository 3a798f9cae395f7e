"""How copies of an expert divide its tokens so that the fullest rank is as low as it gets with these copies.

This is a transport problem with a convex cost. Water-filling one expert at a time over its ranks, again and again,
lowers the sum of load^2 / speed until the loads are the most even ones (of all divisions the lexicographically least
sorted loads), which have the lowest fullest rank too. Only experts on ranks above a target need a visit: what they
push over the target elsewhere is visited in the next sweep.
"""

from __future__ import annotations

import math

import numpy as np

from router.experts.arrays import Floats, Ints

_SWEEPS = 60
_SETTLED = 0.02  # a sweep that lowers what is above the target by less (relative) is the last one


def level(
    expert: Ints,
    rank: Ints,
    copies: Ints,
    tokens: Floats,
    load: Floats,
    speed: Floats,
    target: float,
) -> None:
    """Changes `tokens` of slots [S] and `load` of ranks [R] in place.

    expert, rank: of each slot [S]; copies: of each expert [E]; stops when no load / speed is above `target`.
    """
    limits = (speed * target).tolist()
    slots = np.flatnonzero((copies[expert] > 1) & (expert >= 0))
    if not len(slots) or (load <= limits).all():
        return
    groups: dict[int, list[int]] = {}
    visitors: list[list[list[int]]] = [
        [] for _ in limits
    ]  # of each rank: the slots of each shared expert on it
    for slot, owner, place in zip(slots.tolist(), expert[slots].tolist(), rank[slots].tolist(), strict=True):
        group = groups.setdefault(owner, [])
        group.append(slot)
        visitors[place].append(group)
    # Lists: arrays of two or three elements are slower.
    ranks, speeds, loads, served = rank.tolist(), speed.tolist(), load.tolist(), tokens.tolist()
    excess = math.inf
    for _ in range(_SWEEPS):
        over = [place for place, limit in enumerate(limits) if loads[place] > limit]
        before, excess = excess, sum(loads[place] - limits[place] for place in over)
        if excess >= (1 - _SETTLED) * before:
            break
        for place in over:
            for group in visitors[place]:
                fill = _balance if len(group) == 2 else _fill
                fill(group, ranks, speeds, loads, served)
    load[:] = loads
    tokens[:] = served


def _balance(
    slots: list[int], ranks: list[int], speeds: list[float], loads: list[float], served: list[float]
) -> None:
    """`_fill` for two copies."""
    one, other = slots
    here, there = ranks[one], ranks[other]
    speed, their_speed = speeds[here], speeds[there]
    moved = (loads[here] * their_speed - loads[there] * speed) / (speed + their_speed)
    moved = min(max(moved, -served[other]), served[one])
    served[one] -= moved
    served[other] += moved
    loads[here] -= moved
    loads[there] += moved


def _fill(
    slots: list[int], ranks: list[int], speeds: list[float], loads: list[float], served: list[float]
) -> None:
    """Divides one expert's tokens so that its ranks are as even as they get."""
    rest = []
    left = 0.0
    for slot in slots:
        place, tokens = ranks[slot], served[slot]
        others = loads[place] - tokens
        left += tokens
        rest.append((others / speeds[place], others, place, slot))
    rest.sort()
    load = speed = 0.0
    height = rest[0][0]
    for base, others, place, _ in rest:
        if base > height:  # above the water
            break
        load += others
        speed += speeds[place]
        height = (load + left) / speed
    for _, others, place, slot in rest:
        tokens = max(height * speeds[place] - others, 0.0)
        served[slot] = tokens
        loads[place] = others + tokens
