"""A first layout from nothing: copies where they are needed most, then heaviest first to where they end soonest."""

from __future__ import annotations

import heapq

import numpy as np

from router.experts.arrays import Floats, Ints
from router.experts.layout import EMPTY, Layout


def apportion(loads: Floats, num_slots: int, most: int, enough: float = 0.0) -> Ints:
    """Copies of each expert [E]: one each, then one more for whichever has most tokens a copy; `most` at most.

    This makes the largest copy as small as it can be with so many slots.
    """
    copies = np.ones(len(loads), dtype=np.int64)
    heap = [(-float(load), expert) for expert, load in enumerate(loads)] if most > 1 else []
    heapq.heapify(heap)
    for _ in range(num_slots - len(loads)):
        if not heap or -heap[0][0] <= enough:
            break  # idle experts need no second copy
        _, expert = heap[0]
        copies[expert] += 1
        if copies[expert] < most:
            heapq.heapreplace(heap, (-float(loads[expert]) / int(copies[expert]), expert))
        else:
            heapq.heappop(heap)
    return copies


def sow(layout: Layout, target: float = 0.0) -> None:
    """Fills an empty layout. Every expert has a copy afterwards; a second one may find no rank and be left out."""
    free = [np.flatnonzero(layout.rank == rank).tolist() for rank in range(len(layout.speed))]
    room = np.array([len(slots) for slots in free])
    copies = apportion(
        layout.loads, int(room.sum()), int((room > 0).sum()), target * float(layout.speed.max())
    )
    size = layout.loads / copies
    load = np.zeros(len(layout.speed))
    missing = len(layout.loads)  # experts that have no copy yet
    for expert in np.argsort(-size, kind="stable").tolist():
        for number in range(int(copies[expert])):
            if number and int(room.sum()) <= missing - 1:
                break
            ends = (load + size[expert]) / layout.speed
            ends[(room == 0) | layout.held[expert]] = np.inf
            # Of ranks that end equally soon the one with least room: light experts will need the room elsewhere.
            rank = int(np.lexsort((room, ends))[0])
            if np.isinf(ends[rank]):
                break
            layout.put(free[rank].pop(0), expert)
            room[rank] -= 1
            load[rank] += size[expert]
        missing -= 1


def house(layout: Layout) -> None:
    """Gives every expert that has no copy one, heaviest first, where it ends soonest: in an empty slot or in place of
    a redundant copy. There is such a slot as long as there are as many slots as experts."""
    homeless = np.flatnonzero(layout.copies == 0)
    for expert in homeless[np.argsort(-layout.loads[homeless], kind="stable")].tolist():
        usable = np.flatnonzero((layout.expert == EMPTY) | (layout.copies[layout.expert] > 1))
        rank = layout.rank[usable]
        ends = (layout.load[rank] - layout.tokens[usable] + layout.loads[expert]) / layout.speed[rank]
        layout.put(int(usable[np.argmin(ends)]), expert)
        layout.divide()
