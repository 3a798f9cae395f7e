"""One layer while it is being planned: which expert is in each slot, and how many tokens each copy serves."""

from __future__ import annotations

import numpy as np

from router.experts.arrays import Floats, Ints
from router.experts.shares import level
from router.experts.topology import Topology
from workers.protocol.experts import LayerExperts, LayerShares

EMPTY = -1
_ROUNDING = 1e-9  # relative: by so much sums may differ


class Layout:
    """Slots of all ranks in one row [S]; ranks [R], experts [E].

    Invariants: no expert twice on a rank; `held`, `copies` and `load` are those of `expert` and `tokens`.
    """

    def __init__(self, loads: Floats, topology: Topology, equal_shares: bool) -> None:
        self.loads = np.asarray(loads, dtype=np.float64)  # tokens of each expert [E]
        self.equal_shares = equal_shares
        self.speed = np.array(topology.speeds)
        self.rank = np.repeat(np.arange(len(topology.ranks)), topology.slots)  # of each slot [S]
        self.node = np.array(topology.nodes)[self.rank]  # of each slot [S]
        self.expert = np.full(len(self.rank), EMPTY, dtype=np.int64)  # in each slot [S]
        self.tokens = np.zeros(len(self.rank))  # that each slot serves [S]
        self.held = np.zeros((len(self.loads), len(self.speed)), dtype=bool)  # [E, R]
        self.copies = np.zeros(len(self.loads), dtype=np.int64)  # [E]
        self.load = np.zeros(len(self.speed))  # tokens of each rank [R]

    def copy(self) -> Layout:
        twin = object.__new__(Layout)
        twin.__dict__.update(self.__dict__)
        for name in ("expert", "tokens", "held", "copies", "load"):
            setattr(twin, name, getattr(self, name).copy())
        return twin

    @property
    def times(self) -> Floats:
        """Of each rank [R]: tokens divided by speed."""
        times: Floats = self.load / self.speed
        return times

    @property
    def fullest(self) -> float:
        return float(self.times.max())

    def put(self, slot: int, expert: int) -> None:
        """A copy of `expert` into `slot`, in place of the one that is there. Shares are to be divided afterwards."""
        self.clear(slot)
        rank = self.rank[slot]
        self.expert[slot] = expert
        self.held[expert, rank] = True
        self.copies[expert] += 1

    def clear(self, slot: int) -> None:
        expert = self.expert[slot]
        if expert == EMPTY:
            return
        rank = self.rank[slot]
        self.held[expert, rank] = False
        self.copies[expert] -= 1
        self.load[rank] -= self.tokens[slot]
        self.tokens[slot] = 0.0
        self.expert[slot] = EMPTY

    def swap(self, one: int, other: int) -> None:
        """Two slots exchange their experts, tokens included."""
        for slot, back in ((one, other), (other, one)):
            self.held[self.expert[slot], self.rank[slot]] = False
            self.load[self.rank[slot]] += self.tokens[back] - self.tokens[slot]
        for row in (self.expert, self.tokens):
            row[one], row[other] = row[other], row[one]
        self.held[self.expert[one], self.rank[one]] = True
        self.held[self.expert[other], self.rank[other]] = True

    def divide(self, target: float = 0.0) -> None:
        """Divides the tokens of every expert among its copies: equally, or so that the fullest rank is as low as
        it gets with these copies; below `target` it stops trying."""
        taken = self.expert != EMPTY
        experts = self.expert[taken]
        even = self.loads / np.maximum(self.copies, 1)
        if self.equal_shares:
            self.tokens[taken] = even[experts]
            self.load = summed(self.rank, self.tokens, len(self.speed))
            return
        # What was divided well stays; what has lost a copy starts from equal shares.
        served = summed(experts, self.tokens[taken], len(self.loads))
        kept = np.abs(served - self.loads) <= _ROUNDING * self.loads
        self.tokens[taken] = np.where(kept[experts], self.tokens[taken], even[experts])
        self.load = summed(self.rank, self.tokens, len(self.speed))
        level(self.expert, self.rank, self.copies, self.tokens, self.load, self.speed, target)

    def take(self, ranks: LayerExperts, shares: LayerShares | None) -> None:
        """Starts from a placement; copies that the ranks have no slots for are left out."""
        first = 0
        for rank, experts in enumerate(ranks):
            slots = int((self.rank == rank).sum())
            for slot, expert in enumerate(experts[:slots], first):
                self.put(slot, expert)
                if shares is not None:
                    self.tokens[slot] = shares[rank][slot - first] * self.loads[expert]
            first += slots

    def with_slots(self, expert: Ints, tokens: Floats) -> Layout:
        """The same layer and ranks with other contents."""
        twin = self.copy()
        twin.expert, twin.tokens = expert.copy(), tokens.copy()
        taken = np.flatnonzero(expert != EMPTY)
        twin.held[:] = False
        twin.held[expert[taken], self.rank[taken]] = True
        twin.copies = np.bincount(expert[taken], minlength=len(self.loads))
        twin.load = summed(self.rank, tokens, len(self.speed))
        return twin

    def placed(self) -> tuple[LayerExperts, LayerShares]:
        """Experts of each rank in ascending order, and their shares."""
        taken = self.expert != EMPTY
        served = summed(self.expert[taken], self.tokens[taken], len(self.loads))
        experts: list[list[tuple[int, float]]] = [[] for _ in self.speed]
        for slot in np.flatnonzero(taken).tolist():
            expert = int(self.expert[slot])
            share = float(self.tokens[slot] / served[expert])
            experts[self.rank[slot]].append((expert, min(share, 1.0)))
        for rank in experts:
            rank.sort()
        return (
            tuple(tuple(expert for expert, _ in rank) for rank in experts),
            tuple(tuple(share for _, share in rank) for rank in experts),
        )


def summed(where: Ints, values: Floats, size: int) -> Floats:
    """The sum of the values that go to each of `size` places."""
    return np.bincount(where, values, size).astype(np.float64, copy=False)
