"""Layouts from nothing, node by node: first which experts live on which node, so that few tokens cross between nodes,
then which rank of the node.

A node is planned as one large rank (`Layout` over nodes), and the ranks of a node as a small group of their own.
Since swapping experts ends in the nearest local optimum, it is begun from several places.
"""

from __future__ import annotations

import numpy as np

from router.experts.arrays import Floats
from router.experts.layout import EMPTY, Layout
from router.experts.search import Search
from router.experts.seed import sow
from router.experts.topology import Rank, Topology
from router.experts.traffic import Traffic, affinity, by_node, exchange, hops_within

_STARTS = 8
_SWEEPS = 12  # over the layers, there and back
_LEAST_GAIN = 1e-5  # of all hops: a swap that saves less is not made
_LOOKS = 100  # of the search for balance, before hops are counted
_SCATTER = 0.7  # of the logarithm of the loads by which starts differ


def sow_by_node(
    loads: Floats, topology: Topology, traffic: Traffic, limits: Floats, equal_shares: bool
) -> list[Layout]:
    """Full layouts of all layers. loads: [layers, E]; limits: time that no rank should exceed, for each layer."""
    nodes = _as_ranks(topology)
    best: tuple[float, list[Layout]] | None = None
    for start in range(_STARTS):
        scatter = np.exp(_SCATTER * np.random.default_rng(start).standard_normal(loads.shape))
        layouts = [
            _start(row, by, nodes, limit) for row, by, limit in zip(loads, scatter, limits, strict=True)
        ]
        settle(layouts, len(nodes.ranks), traffic, limits)
        within = hops_within([by_node(layout, len(nodes.ranks)) for layout in layouts], traffic)
        if best is None or within > best[0]:
            best = within, layouts
    assert best is not None
    return [
        _spread(layout, topology, limit, equal_shares) for layout, limit in zip(best[1], limits, strict=True)
    ]


def settle(
    layouts: list[Layout],
    num_nodes: int,
    traffic: Traffic,
    limits: Floats,
    least_gain: float = _LEAST_GAIN,
    max_moves: int | None = None,
) -> None:
    """Swaps experts between nodes, layer after layer, until nothing saves hops within the limits any more.

    least_gain: share of a layer's hops that a swap must save; it is two moves, of which `max_moves` are allowed.
    """
    least = least_gain * traffic.total / len(layouts)
    left = sum(len(layout.expert) for layout in layouts) * _SWEEPS if max_moves is None else max_moves // 2
    nodes = [by_node(layout, num_nodes) for layout in layouts]
    order = list(range(len(layouts)))
    for _ in range(_SWEEPS):
        made = 0
        for layer in order:
            near = affinity(layer, nodes, traffic)
            made += exchange(layouts[layer], near, float(limits[layer]), least, left - made)
            nodes[layer] = by_node(layouts[layer], num_nodes)
        left -= made
        if not made:
            return
        order.reverse()


def _as_ranks(topology: Topology) -> Topology:
    """Every node as one rank with the slots and the speed of its ranks together."""
    members: list[list[Rank]] = [[] for _ in range(max(topology.nodes) + 1)]
    for rank in topology.ranks:
        if rank.slots:
            members[rank.node].append(rank)
    return Topology(
        tuple(
            Rank(sum(rank.slots for rank in ranks), sum(rank.speed for rank in ranks) or 1.0, node)
            for node, ranks in enumerate(members)
        )
    )


def _start(loads: Floats, scatter: Floats, nodes: Topology, limit: float) -> Layout:
    """One way to divide experts among nodes; no second copies but of experts too hot for one node."""
    layout = Layout(loads * scatter, nodes, equal_shares=False)
    sow(layout, limit * float(scatter.max()))
    layout.loads = loads
    layout.divide()
    return Search(layout, limit, _LOOKS).run()


def _spread(over_nodes: Layout, topology: Topology, limit: float, equal_shares: bool) -> Layout:
    """The ranks of each node share what the node has been given."""
    layout = Layout(over_nodes.loads, topology, equal_shares)
    for node in range(len(over_nodes.speed)):
        given = np.flatnonzero((over_nodes.rank == node) & (over_nodes.expert != EMPTY))
        if not len(given):
            continue
        ranks = tuple(
            rank if rank.node == node else Rank(0, rank.speed, rank.node) for rank in topology.ranks
        )
        inner = Layout(over_nodes.tokens[given], Topology(ranks), equal_shares)
        sow(inner)
        inner.divide(limit)
        inner = Search(inner, limit, _LOOKS).run()
        own = np.flatnonzero(layout.node == node)
        for slot, local, tokens in zip(own, inner.expert, inner.tokens, strict=True):
            if local != EMPTY:
                layout.put(int(slot), int(over_nodes.expert[given[local]]))
                layout.tokens[slot] = tokens
    layout.divide(limit)
    return layout
