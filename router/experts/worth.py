"""How far to go from an incumbent: which of the layouts that search has passed, of all layers, are worth their moves."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

from router.experts.arrays import Floats, Ints
from router.experts.layout import Layout


class Point(NamedTuple):
    """A layout on the way of a search."""

    moves: int  # to get there from what the ranks hold
    fullest: float  # time of the fullest rank
    expert: Ints  # in each slot [S]
    tokens: Floats  # that each slot serves [S]

    def restored(self, like: Layout) -> Layout:
        return like.with_slots(self.expert, self.tokens)


def choose(
    trails: Sequence[Sequence[Point]], move_cost: Sequence[float], max_moves: int | None
) -> list[Point]:
    """One point of each trail. A trail starts where moves cannot be avoided, and all of these are made.

    move_cost: time that a move has to save, for each trail. Within `max_moves` in all, the moves that save most time
    each are made first. Trails are cut down to their lower convex hull, on which every further stretch saves less for
    each move than the one before, so that taking the best stretch next is best.
    """
    hulls = [_hull(trail) for trail in trails]
    chosen = [hull.pop(0) for hull in hulls]
    left = math.inf if max_moves is None else max_moves - sum(point.moves for point in chosen)
    waiting: list[tuple[float, int]] = []

    def look_ahead(number: int) -> None:
        if hulls[number]:
            saved = _saved_by_move(chosen[number], hulls[number][0])
            if saved > move_cost[number]:
                heapq.heappush(waiting, (-saved, number))

    for number in range(len(hulls)):
        look_ahead(number)
    while waiting:
        _, number = heapq.heappop(waiting)
        here, there = chosen[number], hulls[number][0]
        if there.moves - here.moves > left:
            # Not so far, then, but to the best point on the way that can be reached.
            near = [point for point in trails[number] if here.moves < point.moves <= here.moves + left]
            near = [point for point in near if _saved_by_move(here, point) > move_cost[number]]
            there = min(near, key=lambda point: (point.fullest, point.moves), default=here)
            hulls[number] = []
        else:
            hulls[number].pop(0)
        left -= there.moves - here.moves
        chosen[number] = there
        look_ahead(number)
    return chosen


def _saved_by_move(here: Point, there: Point) -> float:
    return (here.fullest - there.fullest) / (there.moves - here.moves)


def _hull(trail: Sequence[Point]) -> list[Point]:
    """The points that no others beat in both moves and time, and no mixture of two others either; fewest moves first."""
    hull: list[Point] = []
    for point in sorted(trail, key=lambda one: (one.moves, one.fullest)):
        if hull and point.fullest >= hull[-1].fullest:
            continue
        while len(hull) > 1 and _is_above(hull[-1], hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _is_above(middle: Point, left: Point, right: Point) -> bool:
    """Whether the middle point saves no more than the straight way from left to right."""
    straight = (left.fullest - right.fullest) * (middle.moves - left.moves)
    return (left.fullest - middle.fullest) * (right.moves - left.moves) <= straight
