"""Local search: one step takes work off a rank that is above the target, at the lowest cost in moves.

Steps, for an expert a on such a rank r:

* *add* a copy of a on another rank, in an empty slot or in place of a redundant copy there (one move);
* *move* a to an empty slot (one move);
* *swap* a with an expert of another rank (two moves).

They are scored all at once by how far they bring the ranks concerned down to the target (sum of speed * excess^2),
per move; the best ones are then tried in earnest, shares divided anew, and the first that helps is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from router.experts.arrays import Bools, Floats, Ints
from router.experts.layout import EMPTY, Layout

_TRIED = 3  # best-scored steps of a rank that are tried in earnest
_LEAST_GAIN = 1e-6  # relative: less is rounding
_EVENNESS = (
    1e-3  # weight of loads below the target: of steps that do equally well, the one that evens out most
)


class Step(NamedTuple):
    kind: str  # "add", "move", "swap"
    slot: int  # of the expert that leaves or is copied
    other: int  # where it goes


class Search:
    """Brings one layout down to `target` (time of the fullest rank), step by step.

    held_before: [E, R] bool, what the ranks hold now; putting it back costs next to nothing. None: all steps cost
    the same. `looks` counts how often the steps of a rank were scored, which is where time goes; after `most_looks`
    there are no more steps.
    """

    def __init__(
        self, layout: Layout, target: float, most_looks: int, held_before: Bools | None = None
    ) -> None:
        self.layout = layout
        self.target = target
        self.most_looks = most_looks
        self.held_before = held_before
        self.looks = 0

    def run(self) -> Layout:
        while self.step():
            pass
        return self.layout

    def step(self) -> bool:
        """Makes one step; False when none is needed or none helps."""
        layout = self.layout
        times = layout.times
        before = self._excess()
        for rank in np.argsort(-times, kind="stable").tolist():
            if times[rank] <= self.target or self.looks >= self.most_looks:
                return False
            self.looks += 1
            for step in self._best_of(rank):
                self.layout = applied(layout, step, self.target)
                if self._excess() < before * (1 - _LEAST_GAIN):
                    return True
            self.layout = layout
        return False

    def _excess(self) -> float:
        layout = self.layout
        return float((layout.speed * np.maximum(layout.times - self.target, 0.0) ** 2).sum())

    def _best_of(self, rank: int) -> list[Step]:
        layout = self.layout
        own = np.flatnonzero((layout.rank == rank) & (layout.tokens > 0))
        others = np.flatnonzero(layout.rank != rank)
        if not len(own) or not len(others):
            return []
        empty = layout.expert[others] == EMPTY
        redundant = layout.copies[layout.expert[others]] > 1
        scored = [
            ("add", others[empty | redundant], self._score_add(own, others[empty | redundant])),
            ("move", others[empty], self._score_move(own, others[empty])),
            ("swap", others[~empty], self._score_swap(own, others[~empty])),
        ]
        found: list[tuple[float, Step]] = []
        for kind, theirs, scores in scored:
            flat = scores.ravel()
            for place in _largest(flat):
                if flat[place] > 0:
                    i, j = divmod(place, len(theirs))
                    found.append((float(flat[place]), Step(kind, int(own[i]), int(theirs[j]))))
        found.sort(key=lambda one: -one[0])
        return [step for _, step in found[:_TRIED]]

    def _penalty(self, load: Floats, speed: Floats) -> Floats:
        time = load / speed
        return speed * (np.maximum(time - self.target, 0.0) ** 2 + _EVENNESS * time**2)

    def _score_swap(self, own: Ints, others: Ints) -> Floats:
        layout = self.layout
        there = layout.rank[others]
        here = int(layout.rank[own[0]])
        mine, theirs = layout.expert[own], layout.expert[others]
        shift = layout.tokens[own][:, None] - layout.tokens[others][None, :]
        gain = self._gain(here, there, -shift, shift)
        gain /= self._cost(mine, there) + self._cost(theirs, np.array([here])).T
        gain[layout.held[mine][:, there] | layout.held[theirs, here][None, :]] = -np.inf
        return gain

    def _score_move(self, own: Ints, others: Ints) -> Floats:
        layout = self.layout
        there = layout.rank[others]
        mine = layout.expert[own]
        shift = layout.tokens[own][:, None]
        gain = self._gain(int(layout.rank[own[0]]), there, -shift, shift) / self._cost(mine, there)
        gain[layout.held[mine][:, there]] = -np.inf
        return gain

    def _score_add(self, own: Ints, others: Ints) -> Floats:
        layout = self.layout
        here, there = int(layout.rank[own[0]]), layout.rank[others]
        mine, theirs = layout.expert[own], layout.expert[others]
        # The tokens of a copy that is dropped go to the other copies: count them on the least busy of these.
        elsewhere = np.where(layout.held[theirs], layout.times[None, :], np.inf)
        elsewhere[np.arange(len(others)), there] = np.inf
        heir = np.argmin(elsewhere, axis=1)
        dropped = layout.tokens[others]
        extra = np.where(heir == here, dropped, 0.0)
        if layout.equal_shares:
            copies = layout.copies[mine]
            given = (layout.loads[mine] / (copies + 1))[:, None]
            taken = (layout.loads[mine] / copies)[:, None] - given
        else:
            speed, their_speed = layout.speed[here], layout.speed[there]
            even = (layout.load[here] + extra) * their_speed - (layout.load[there] - dropped) * speed
            given = taken = np.clip(even / (speed + their_speed), 0.0, layout.tokens[own][:, None])
        gain = self._gain(here, there, extra - taken, given - dropped)
        heirs = layout.load[heir]
        burden = self._penalty(heirs + dropped, layout.speed[heir]) - self._penalty(heirs, layout.speed[heir])
        gain -= np.where((heir == here) | (theirs == EMPTY), 0.0, burden)
        gain /= self._cost(mine, there)
        gain[layout.held[mine][:, there]] = -np.inf
        return gain

    def _gain(self, here: int, there: Ints, own_change: Floats, their_change: Floats) -> Floats:
        """By how much the penalty of rank `here` and of each rank `there` together falls [own, others]."""
        layout = self.layout
        speed, load = layout.speed[here], layout.load[here]
        their_speed, their_load = layout.speed[there], layout.load[there]
        before = self._penalty(load, speed) + self._penalty(their_load, their_speed)
        after = self._penalty(load + own_change, speed) + self._penalty(
            their_load + their_change, their_speed
        )
        return before - after

    def _cost(self, experts: Ints, ranks: Ints) -> Floats:
        """Moves to bring these experts to these ranks [experts, ranks]; what is there already costs little."""
        if self.held_before is None:
            return np.ones((len(experts), len(ranks)))
        return np.where(self.held_before[experts][:, ranks], 0.1, 1.0)


def applied(layout: Layout, step: Step, target: float) -> Layout:
    after = layout.copy()
    if step.kind == "swap":
        after.swap(step.slot, step.other)
    else:
        after.put(step.other, int(layout.expert[step.slot]))
        if step.kind == "move":
            after.clear(step.slot)
    after.divide(target)
    return after


def _largest(scores: Floats) -> list[int]:
    """Where the few largest scores are, the largest first."""
    if len(scores) <= _TRIED:
        return list(np.argsort(-scores, kind="stable").tolist())
    most = np.argpartition(-scores, _TRIED)[:_TRIED]
    return list(most[np.argsort(-scores[most], kind="stable")].tolist())
