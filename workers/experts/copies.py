"""Which copy of an expert computes a token: the way from logical experts to members and their slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.protocol.experts import Placement

# Multiples of it, modulo 1, fill the interval evenly however many are taken (Weyl, 1916; Knuth, TAOCP 3, §6.4).
_GOLDEN = (5**0.5 - 1) / 2


class LayerCopies:
    """One layer of a placement, among the members of a view.

    Copies share the tokens of their expert by their shares: token a of a rank goes to the copy in whose part of [0, 1)
    a · golden ratio falls, counted on from batch to batch, so that single tokens are shared out too.
    """

    def __init__(
        self, placement: Placement, layer: int, num_experts: int, members: Sequence[int], me: int
    ) -> None:
        """`members`: ranks of the group; those left out hold nothing (PlacementError is the caller's affair)."""
        copies = placement.copies(layer, num_experts)
        most = max(len(found) for found in copies)
        number = {rank: member for member, rank in enumerate(members)}
        shape = (num_experts, most)
        self._member, self._slot = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        self._until = np.ones(shape)  # end of each copy's part of [0, 1)
        for expert, found in enumerate(copies):
            until = 0.0
            for index, copy in enumerate(found):
                self._member[expert, index], self._slot[expert, index] = number[copy.rank], copy.slot
                until += copy.share
                self._until[expert, index] = until
            self._until[expert, len(found) - 1 :] = 1.0  # shares are rounded
        self._num_copies = most
        # Ranks begin at different points, or they would all send their first token to the same copy.
        self._next = me / len(members)

    def choose(self, experts: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Logical experts [A] -> members [A], slots [A]."""
        if self._num_copies == 1:
            return self._member[experts, 0], self._slot[experts, 0]
        points = (self._next + _GOLDEN * np.arange(1, len(experts) + 1)) % 1.0
        if len(points):
            self._next = float(points[-1])
        copy = (points[:, None] >= self._until[experts]).sum(1)
        return self._member[experts, copy], self._slot[experts, copy]
