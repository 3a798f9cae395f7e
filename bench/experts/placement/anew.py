"""From nothing: how far above the bound, and above the optimum where that can be computed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.experts.placement.loads import SYNTHETIC, synthetic
from router.experts.arrays import Floats
from router.experts.baselines import eplb, eplb_global, placement_of, round_robin
from router.experts.exact import solve
from router.experts.placement import Options, plan, rank_times
from router.experts.topology import Topology, uniform
from workers.protocol.experts import Placement, contiguous

EXPERTS = (64, 128, 256, 512)
RANKS = (8, 16, 32, 64, 128, 256)
REDUNDANT = (0, 8, 16, 32)  # in all
_LAYERS = 3
_NEAR = (
    1.25  # EPLB needs ranks with equally many slots: the nearest number that divides them, within this factor
)
_GROUPS = 8  # of EPLB's hierarchical policy, on as many nodes as divide both


def cells() -> Iterator[tuple[int, int, int]]:
    """(experts, ranks, slots of a rank)."""
    for num_experts in EXPERTS:
        for redundant in REDUNDANT:
            total = num_experts + redundant
            divisors = [ranks for ranks in range(1, total + 1) if total % ranks == 0]
            nearest = {min(divisors, key=lambda ranks: abs(np.log(ranks / wanted))) for wanted in RANKS}
            for ranks in sorted(nearest):
                wanted = min(RANKS, key=lambda one: abs(np.log(ranks / one)))
                if 1 / _NEAR <= ranks / wanted <= _NEAR and RANKS[0] <= ranks <= num_experts + redundant:
                    yield num_experts, ranks, total // ranks


def grid(measured: dict[str, Floats], effort: int) -> list[dict[str, Any]]:
    """One row for each cell and load: times of the fullest rank divided by the bound, mean and worst of the layers."""
    rows = []
    for num_experts, ranks, slots in cells():
        named = {name: synthetic(name, _LAYERS, num_experts) for name in SYNTHETIC}
        if num_experts == 64:
            named |= {f"OLMoE {domain}": loads for domain, loads in measured.items()}
        for name, loads in named.items():
            rows.append(_row(name, loads, uniform(ranks, slots), effort))
        print(f"{num_experts} experts, {ranks} ranks, {slots} slots", flush=True)
    return rows


def _row(name: str, loads: Floats, topology: Topology, effort: int) -> dict[str, Any]:
    ranks, slots = len(topology.ranks), topology.ranks[0].slots
    started = time.process_time()
    made = plan(loads, topology, options=Options(effort=effort))
    spent = time.process_time() - started
    bounds = np.array(made.bounds)
    of_bound = {
        which: (rank_times(placement, loads, topology).max(axis=1) / bounds).tolist()
        for which, placement in (("headrace", made.placement), *baselines(loads, topology))
    }
    return {
        "loads": name,
        "experts": loads.shape[1],
        "ranks": ranks,
        "slots": slots,
        "redundant": ranks * slots - loads.shape[1],
        "bound_of_mean": (bounds / (loads.sum(axis=1) / ranks)).tolist(),
        "of_bound": of_bound,
        "layer_ms": 1e3 * spent / len(loads),
    }


def baselines(loads: Floats, topology: Topology) -> Iterator[tuple[str, Placement]]:
    """Of equal ranks."""
    num_layers, num_experts = loads.shape
    ranks = len(topology.ranks)
    total = sum(topology.slots)
    nodes = int(np.gcd(np.gcd(ranks, _GROUPS), total))
    yield "eplb", placement_of(eplb_global(loads, total, ranks), ranks)
    if num_experts % _GROUPS == 0 and ranks * topology.ranks[0].slots // nodes >= num_experts // nodes:
        yield "eplb by node", placement_of(eplb(loads, total, _GROUPS, nodes, ranks), ranks)
    yield "round robin", round_robin(num_layers, num_experts, topology)
    yield "contiguous", contiguous(num_layers, num_experts, ranks)


def optima(limit_s: float) -> list[dict[str, Any]]:
    """Small cases, against HiGHS's optimum. Only what it proved within `limit_s` is kept."""
    rows = []
    for experts, ranks, slots in (
        (12, 4, 4),
        (16, 4, 5),
        (16, 8, 2),
        (13, 5, 3),
        (20, 10, 2),
        (24, 6, 5),
        (16, 6, 3),
    ):
        for name in SYNTHETIC:
            for equal_shares in (False, True):
                loads, topology = synthetic(name, 1, experts, seed=1), uniform(ranks, slots)
                best = solve(loads[0], topology, equal_shares=equal_shares, limit_s=limit_s)
                if best is None or best.bound < best.time * 0.998:
                    continue
                made = plan(loads, topology, options=Options(equal_shares=equal_shares))
                greedy = placement_of(eplb_global(loads, ranks * slots, ranks), ranks)
                rows.append(
                    {
                        "case": f"{experts} experts, {ranks} ranks of {slots} slots, {name}",
                        "shares": "equal" if equal_shares else "any",
                        "headrace": made.after[0] / best.time,
                        "eplb": float(rank_times(greedy, loads, topology).max()) / best.time,
                        "bound": made.bounds[0] / best.time,
                    }
                )
                print(rows[-1], flush=True)
    return rows
