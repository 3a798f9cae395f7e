"""What others do, to compare with: contiguous (see `workers.protocol.experts`), round robin, and greedy as in EPLB.

EPLB is written from its published description (deepseek-ai/EPLB, README): replicate whichever expert carries most
tokens per replica until all replicas are given out, then pack replicas heaviest first into the lightest GPU that has
room. Its hierarchical policy first packs groups of experts into nodes, replicates within each node, and packs within
each node. Its global policy does the last two over all GPUs. It knows equal GPUs only, and may put two replicas of an
expert on one GPU; `placement_of` turns these into one copy with the sum of their shares.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

import numpy as np

from router.experts.arrays import Floats, Ints
from router.experts.topology import Topology
from workers.protocol.experts import LayerExperts, LayerShares, Placement, PlacementError


def round_robin(num_layers: int, num_experts: int, topology: Topology, version: int = 0) -> Placement:
    """Expert e goes to the next rank with room; slots left over are filled with copies of 0, 1, ..."""
    topology.validate(num_experts)
    ranks: list[list[int]] = [[] for _ in topology.ranks]
    dealt = 0
    room = True
    while room:
        room = False
        for rank, slots in zip(ranks, topology.slots, strict=True):
            expert = dealt % num_experts
            if len(rank) < slots and expert not in rank:
                rank.append(expert)
                dealt += 1
                room = True
    layer = tuple(tuple(rank) for rank in ranks)
    placement = Placement(version, (layer,) * num_layers)
    placement.validate(num_experts, topology.slots)
    return placement


def eplb(loads: Floats, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Ints:
    """Logical expert of each physical one [layers, num_replicas], GPU by GPU. loads: [layers, experts].

    Hierarchical where groups can be divided evenly among nodes, else global, as published.
    """
    loads = np.asarray(loads, dtype=np.float64)
    num_experts = loads.shape[1]
    if num_replicas < num_experts or num_replicas % num_gpus or num_gpus % num_nodes:
        raise PlacementError(
            f"EPLB divides {num_replicas} replicas of {num_experts} experts evenly among {num_gpus} GPUs on "
            f"{num_nodes} nodes: it needs no fewer replicas than experts, and whole numbers"
        )
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    if num_experts % num_groups:
        raise PlacementError(f"{num_experts} experts are not {num_groups} groups of equal size")
    return np.stack([_eplb_layer(layer, num_replicas, num_groups, num_nodes, num_gpus) for layer in loads])


def eplb_global(loads: Floats, num_replicas: int, num_gpus: int) -> Ints:
    """As `eplb` with one node and one group."""
    return eplb(loads, num_replicas, 1, 1, num_gpus)


def placement_of(physical: Ints, num_gpus: int, version: int = 0) -> Placement:
    """A placement that loads every GPU as these physical experts [layers, replicas] with equal shares do."""
    layers: list[LayerExperts] = []
    shares: list[LayerShares] = []
    for row in physical.tolist():
        count = Counter(row)
        size = len(row) // num_gpus
        gpus = [Counter(row[gpu * size : (gpu + 1) * size]) for gpu in range(num_gpus)]
        layers.append(tuple(tuple(gpu) for gpu in gpus))
        shares.append(tuple(tuple(gpu[e] / count[e] for e in gpu) for gpu in gpus))
    return Placement(version, tuple(layers), tuple(shares))


def _eplb_layer(loads: Floats, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Ints:
    groups = loads.reshape(num_groups, -1)
    physical: list[int] = []
    for node in _packed(groups.sum(axis=1), num_nodes):
        experts = np.concatenate(
            [np.arange(group * groups.shape[1], (group + 1) * groups.shape[1]) for group in node]
        )
        replicas = _replicated(loads[experts], num_replicas // num_nodes)
        count = Counter(replicas)
        weights = [loads[experts[replica]] / count[replica] for replica in replicas]
        for gpu in _packed(weights, num_gpus // num_nodes):
            physical += [int(experts[replicas[item]]) for item in gpu]
    return np.array(physical)


def _replicated(loads: Floats, num_replicas: int) -> list[int]:
    """Every expert once, in order, then one more of whichever carries most for each of its replicas."""
    replicas = list(range(len(loads)))
    count = np.ones(len(loads))
    for _ in range(num_replicas - len(loads)):
        hottest = int(np.argmax(loads / count))
        count[hottest] += 1
        replicas.append(hottest)
    return replicas


def _packed(weights: Sequence[float] | Floats, num_packs: int) -> list[list[int]]:
    """Items by pack, equally many in each: heaviest first into the lightest pack with room."""
    size = len(weights) // num_packs
    if size == 1:
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    lightest = [(0.0, pack) for pack in range(num_packs)]  # a heap: of equals the first
    for item in np.argsort(-np.asarray(weights), kind="stable").tolist():
        weight, pack = heapq.heappop(lightest)
        packs[pack].append(item)
        if len(packs[pack]) < size:
            heapq.heappush(lightest, (weight + float(weights[item]), pack))
    return packs
