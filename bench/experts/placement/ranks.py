"""Ranks of unequal speed and memory, ranks on several nodes, and how long planning takes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bench.experts.placement.loads import SYNTHETIC, synthetic
from router.experts.arrays import Floats
from router.experts.placement import Options, plan
from router.experts.topology import Rank, Topology, uniform
from router.experts.traffic import Traffic, cross_node

_GROUPS: dict[str, tuple[Rank, ...]] = {
    "8 ranks of 9 slots, half of them at half speed": (Rank(9),) * 4 + (Rank(9, 0.5),) * 4,
    "8 ranks, four twice as fast and large": (Rank(6),) * 4 + (Rank(12, 2.0),) * 4,
    "8 ranks of 9 slots, speeds 0.4 to 2": tuple(
        Rank(9, s) for s in (1.0, 1.3, 0.7, 0.4, 1.0, 2.0, 1.5, 0.9)
    ),
    "16 ranks of 5 slots, half of them at half speed": (Rank(5),) * 8 + (Rank(5, 0.5),) * 8,
}


def unequal(measured: dict[str, Floats]) -> list[dict[str, Any]]:
    """The bound divided by the fullest rank's time, from nothing and after a change of load."""
    named = measured or {name: synthetic(name, 3, 64) for name in SYNTHETIC}
    rows = []
    for group, ranks in _GROUPS.items():
        topology = Topology(ranks)
        for equal_shares in (False, True):
            options = Options(equal_shares=equal_shares)
            made = {name: plan(loads, topology, options=options) for name, loads in named.items()}
            changed = [
                plan(loads, topology, made[old].placement, options=options)
                for name, loads in named.items()
                for old in named
                if old != name
            ]
            parts = [_of_bound(one) for one in made.values()], [_of_bound(one) for one in changed]
            rows.append(
                {
                    "group": group,
                    "shares": "equal" if equal_shares else "any",
                    "anew": float(np.mean(parts[0])),
                    "anew_least": float(np.min(parts[0])),
                    "onward": float(np.mean(parts[1])),
                    "onward_least": float(np.min(parts[1])),
                }
            )
    return rows


def _of_bound(made: Any) -> list[float]:
    return list((np.array(made.bounds) / np.array(made.after)).tolist())


def across_nodes(measured: dict[str, Floats], hops: dict[str, Floats]) -> list[dict[str, Any]]:
    """Share of hops to another node, and how full the fullest rank then is."""
    rows = []
    for nodes, ranks, slots in ((2, 8, 9), (2, 16, 5), (4, 16, 5)):
        topology = uniform(ranks, slots, ranks_per_node=ranks // nodes)
        for domain, coactivation in hops.items():
            loads, traffic = measured[domain], Traffic(coactivation)
            blind = plan(loads, topology)
            found: dict[str, Any] = {
                "group": f"{nodes} nodes, {ranks} ranks of {slots} slots",
                "domain": domain,
                "blind": cross_node(blind.placement, topology, loads.shape[1], traffic),
            }
            for imbalance in (0.02, 0.05):
                made = plan(loads, topology, traffic=traffic, options=Options(imbalance=imbalance))
                found[f"at_{imbalance}"] = cross_node(made.placement, topology, loads.shape[1], traffic)
                mean = loads.sum(axis=1) / ranks
                found[f"imbalance_{imbalance}"] = float((np.array(made.after) / mean).max() - 1)
            few = Options(imbalance=0.05, max_moves=16 * len(loads))
            made = plan(loads, topology, blind.placement, traffic=traffic, options=few)
            found["after_16_moves"] = cross_node(made.placement, topology, loads.shape[1], traffic)
            rows.append(found)
    return rows


def clock(rounds: int) -> list[dict[str, Any]]:
    """Seconds of one core to plan 61 layers of 256 experts over 64 ranks, the best of some rounds."""
    rows = []
    for name in SYNTHETIC:
        loads = synthetic(name, 61, 256)
        drifted = loads * np.exp(0.2 * np.random.default_rng(1).standard_normal(loads.shape))
        for slots in (4, 5, 6):
            topology = uniform(64, slots, ranks_per_node=8)
            spent, spent_on = [], []
            for _ in range(rounds):
                started = time.process_time()
                made = plan(loads, topology)
                middle = time.process_time()
                moved = plan(drifted, topology, made.placement)
                spent.append(middle - started)
                spent_on.append(time.process_time() - middle)
            rows.append(
                {
                    "loads": name,
                    "slots": slots,
                    "anew_s": min(spent),
                    "anew_of_bound": float((np.array(made.after) / np.array(made.bounds)).max()),
                    "drift_s": min(spent_on),
                    "drift_of_bound": float((np.array(moved.after) / np.array(moved.bounds)).max()),
                    "moves": len(moved.moves) / 61,
                }
            )
            print(rows[-1], flush=True)
    return rows
