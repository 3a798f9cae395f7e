"""How evenly a placement spreads a load: what is shown to people, and what a change of placement is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from router.experts.topology import Topology
from router.experts.windows import Array
from workers.protocol.experts import Placement

Index = NDArray[np.int64]


def rank_loads(placement: Placement, loads: Array) -> Array:
    """Tokens [layers, ranks] that ranks compute of `loads` [layers, experts].

    An expert whose copies' shares do not sum to 1, because a rank is gone, is divided in the same proportion.
    """
    layer, rank, expert, part = spread(placement, loads.shape[1])
    tokens = loads[layer, expert] * part
    ranks = placement.num_ranks
    found: Array = np.bincount(layer * ranks + rank, tokens, placement.num_layers * ranks).astype(np.float64)
    return found.reshape(placement.num_layers, ranks)


@lru_cache(maxsize=16)
def spread(placement: Placement, num_experts: int) -> tuple[Index, Index, Index, Array]:
    """Of all copies [copies]: layer, rank, expert, and its part of the expert's tokens.

    Looking through a placement takes longer than using it, and it is used again and again.
    """
    copies = [
        (layer, rank, expert, 1.0 if placement.shares is None else placement.shares[layer][rank][slot])
        for layer, ranks in enumerate(placement.layers)
        for rank, experts in enumerate(ranks)
        for slot, expert in enumerate(experts)
    ]
    columns = np.array(copies, dtype=np.float64).reshape(-1, 4).T
    layer, rank, expert = columns[:3].astype(np.int64)
    share, key = columns[3], layer * num_experts + expert
    total = np.bincount(key, share)[key]
    even = 1 / np.bincount(key)[key]
    part = np.divide(share, total, out=even, where=total > 0)
    return layer, rank, expert, part


@dataclass(frozen=True)
class Balance:
    """Times are tokens divided by speed, summed over layers: all ranks wait for the fullest one in each layer."""

    mean: float  # what it would be if every rank of a layer ended at the same time
    fullest: float

    @property
    def balancedness(self) -> float:
        """1: even. 0.5: half of the ranks' time is spent waiting for the fullest one. 1 without any load."""
        return self.mean / self.fullest if self.fullest else 1.0

    @property
    def most_to_gain(self) -> float:
        """Share by which the fullest rank's time could shrink at best."""
        return 1 - self.balancedness


def balance(tokens: Array, topology: Topology) -> Balance:
    """Of what ranks compute [layers, ranks]. Ranks without slots are gone, and no part of the mean."""
    alive = topology.alive
    if not alive:
        return Balance(0.0, 0.0)
    speeds = np.array(topology.speeds)[alive]
    tokens = tokens[:, alive]
    return Balance(float(tokens.sum() / speeds.sum()), float((tokens / speeds).max(axis=1).sum()))
