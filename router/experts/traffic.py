"""Tokens that have to cross nodes, and how to have fewer of them.

A token that has been at an expert of one layer goes on to experts of the next. How often it goes from which to which
is counted (*co-activation*); pairs that are often used together should be on one node. Tokens start and end at the
rank that holds their request: where it is known how many tokens of each expert start on which node (*sources*), an
expert should be near them. Copies are taken to be chosen by their shares, whatever came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from router.experts.arrays import Floats
from router.experts.layout import EMPTY, Layout, summed
from router.experts.topology import Topology
from workers.protocol.experts import Placement, PlacementError

_PAIRS = 4  # swaps looked at for each slot before all are calculated again


class Traffic(NamedTuple):
    """At least one of the two."""

    coactivation: Floats | None = None  # [layers - 1, E, E]: tokens at expert i of a layer and j of the next
    sources: Floats | None = None  # [layers, nodes, E]: tokens of each expert by the node where they start

    @property
    def total(self) -> float:
        """Hops that were counted."""
        return sum(float(array.sum()) for array in self if array is not None)

    def validate(self, num_layers: int, num_experts: int, num_nodes: int) -> None:
        for name, array, shape in (
            ("coactivation", self.coactivation, (num_layers - 1, num_experts, num_experts)),
            ("sources", self.sources, (num_layers, num_nodes, num_experts)),
        ):
            if array is not None and array.shape != shape:
                raise PlacementError(f"{name} has the shape {array.shape}; it must be {shape}")


def cross_node(placement: Placement, topology: Topology, num_experts: int, traffic: Traffic) -> float:
    """Share of all counted hops between experts (and from sources to experts) that go to another node, 0 to 1."""
    num_nodes = max(topology.nodes) + 1
    nodes = np.zeros((placement.num_layers, num_experts, num_nodes))
    for layer in range(placement.num_layers):
        for expert, copies in enumerate(placement.copies(layer, num_experts)):
            for copy in copies:
                nodes[layer, expert, topology.ranks[copy.rank].node] += copy.share
    return 1 - hops_within(list(nodes), traffic) / traffic.total if traffic.total else 0.0


def hops_within(nodes: Sequence[Floats], traffic: Traffic) -> float:
    """Hops that stay on a node. nodes: of each layer, the share of every expert's tokens by node [E, N]."""
    same = 0.0
    if traffic.coactivation is not None:
        for hops, before, after in zip(traffic.coactivation, nodes[:-1], nodes[1:], strict=True):
            same += float(((hops.T @ before) * after).sum())
    if traffic.sources is not None:
        same += sum(
            float((starts.T * there).sum()) for starts, there in zip(traffic.sources, nodes, strict=True)
        )
    return same


def affinity(layer: int, nodes: Sequence[Floats], traffic: Traffic) -> Floats:
    """Hops that each expert of a layer would have within node n if it were wholly there [E, N].

    nodes: of each layer, the share of every expert's tokens by node [E, N].
    """
    found = np.zeros_like(nodes[layer])
    if traffic.coactivation is not None:
        if layer > 0:
            found += traffic.coactivation[layer - 1].T @ nodes[layer - 1]
        if layer + 1 < len(nodes):
            found += traffic.coactivation[layer] @ nodes[layer + 1]
    if traffic.sources is not None:
        found += traffic.sources[layer].T
    return found


def by_node(layout: Layout, num_nodes: int) -> Floats:
    """Share of every expert's tokens that is served on each node [E, N]."""
    taken = np.flatnonzero(layout.expert != EMPTY)
    where = layout.expert[taken] * num_nodes + layout.node[taken]
    shares = layout.tokens[taken] / np.maximum(layout.loads[layout.expert[taken]], 1e-300)
    return summed(where, shares, len(layout.loads) * num_nodes).reshape(-1, num_nodes)


def exchange(layout: Layout, near: Floats, limit: float, least_gain: float, at_most: int) -> int:
    """Swaps experts between nodes while that saves hops and no rank's time goes above `limit`; how many swaps.

    near: `affinity` of this layer. least_gain: hops that a swap must save.
    """
    made = 0
    while made < at_most:
        before = made
        swapped: set[int] = set()
        # What a swap saves does not depend on other swaps of this layer, so many are made of one calculation.
        for one, other in _swaps(layout, near, limit, least_gain):
            if made < at_most and swapped.isdisjoint((one, other)) and _fits(layout, one, other, limit):
                layout.swap(one, other)
                swapped.update((one, other))
                made += 1
        if made == before:
            break
    return made


def _swaps(layout: Layout, near: Floats, limit: float, least_gain: float) -> list[tuple[int, int]]:
    """Pairs of slots whose swap fits and saves hops, best first, so many for each slot on average."""
    slots = np.flatnonzero(layout.expert != EMPTY)
    expert, rank, node = layout.expert[slots], layout.rank[slots], layout.node[slots]
    tokens = layout.tokens[slots]
    share = tokens / np.maximum(layout.loads[expert], 1e-300)
    value = share[:, None] * near[expert]  # [slots, N]: hops within a node, were this copy there
    there = value[:, node]  # [slots, slots]: the first at the node of the second
    own = np.diagonal(there)
    gain = there + there.T - own[:, None] - own[None, :]
    room = np.maximum(layout.times[rank], limit) * layout.speed[rank] - layout.load[rank]
    more = tokens[:, None] - tokens[None, :]  # for the second's rank
    held = layout.held[expert][:, rank]
    gain[(more > room[None, :]) | (-more > room[:, None]) | held | held.T] = 0.0
    first, second = np.nonzero(np.triu(gain > least_gain))
    best = np.argsort(-gain[first, second], kind="stable")[: _PAIRS * len(slots)]
    return list(zip(slots[first[best]].tolist(), slots[second[best]].tolist(), strict=True))


def _fits(layout: Layout, one: int, other: int, limit: float) -> bool:
    """No rank twice with an expert, and none above the limit, or higher than it is above it already."""
    here, there = layout.rank[one], layout.rank[other]
    if layout.held[layout.expert[one], there] or layout.held[layout.expert[other], here]:
        return False
    more = layout.tokens[one] - layout.tokens[other]
    rank, more = (there, more) if more > 0 else (here, -more)  # only one of the two gets more
    return bool(layout.load[rank] + more <= max(layout.times[rank], limit) * layout.speed[rank])
