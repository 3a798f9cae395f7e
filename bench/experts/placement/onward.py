"""From an incumbent: what is left of a placement when loads change, and what it takes to mend it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from bench.experts.simulate.scenarios import Popularity, zipf
from router.experts.arrays import Floats
from router.experts.baselines import eplb_global, placement_of
from router.experts.placement import Options, balancedness, plan
from router.experts.topology import Topology, uniform
from workers.protocol.experts import Placement, moves

_WINDOWS = 40
_WINDOW_S = 30.0


def changes_of_domain(measured: dict[str, Floats], ranks: int, slots: int) -> list[dict[str, Any]]:
    """Every domain after every other: balancedness and moves of a layer, by what is done about it."""
    topology = uniform(ranks, slots)
    rows = []
    for equal_shares in (False, True):
        before = {
            domain: plan(loads, topology, options=Options(equal_shares=equal_shares)).placement
            for domain, loads in measured.items()
        }
        pairs = [(one, other) for one in measured for other in measured if one != other]
        for label, most in (("nothing is moved", 0), ("8", 8), ("16", 16), ("no limit", None)):
            results = []
            for one, other in pairs:
                loads = measured[other]
                limit = None if most is None else most * len(loads)
                options = Options(equal_shares=equal_shares, max_moves=limit)
                made = plan(loads, topology, before[one], options=options)
                results.append((made.placement, before[one], loads))
            rows.append(_row(f"moves of a layer: {label}", equal_shares, results, topology))
        if equal_shares:
            greedy = {
                domain: placement_of(eplb_global(loads, ranks * slots, ranks), ranks)
                for domain, loads in measured.items()
            }
            results = [(greedy[other], greedy[one], measured[other]) for one, other in pairs]
            rows.append(_row("EPLB anew", True, results, topology))
            results = [(greedy[one], greedy[one], measured[other]) for one, other in pairs]
            rows.append(_row("EPLB as it was", True, results, topology))
    return rows


def _row(
    label: str, equal_shares: bool, results: list[tuple[Placement, Placement, Floats]], topology: Topology
) -> dict[str, Any]:
    even = np.concatenate([balancedness(placement, loads, topology) for placement, _, loads in results])
    moved = [
        np.bincount([move.layer for move in moves(old, placement)], minlength=placement.num_layers)
        for placement, old, _ in results
    ]
    return {
        "what": label,
        "shares": "equal" if equal_shares else "any",
        "mean": float(even.mean()),
        "least": float(even.min()),
        "moves": float(np.concatenate(moved).mean()),
        "most_moves": int(np.concatenate(moved).max()),
    }


def over_time(named: dict[str, Popularity], topology: Topology, num_layers: int) -> list[dict[str, Any]]:
    """Windows of half a minute; each is served by what was planned from the one before it."""
    rows = []
    for name, popularity in named.items():
        windows = [popularity(_WINDOW_S * number) * 1e6 for number in range(_WINDOWS)]
        slots, ranks = sum(topology.slots), len(topology.ranks)
        for policy in ("as it was", "EPLB", "headrace", "headrace, 8 moves a layer"):
            placement = (
                placement_of(eplb_global(windows[0], slots, ranks), ranks)
                if policy == "EPLB"
                else plan(windows[0], topology).placement
            )
            even, moved = [], 0
            for last, loads in itertools.pairwise(windows):
                new = placement
                if policy == "EPLB":
                    new = placement_of(eplb_global(last, slots, ranks), ranks)
                elif policy.startswith("headrace"):
                    most = 8 * num_layers if policy.endswith("layer") else None
                    new = plan(last, topology, placement, options=Options(max_moves=most)).placement
                moved += len(list(moves(placement, new)))
                placement = new
                even.append(float(balancedness(placement, loads, topology).mean()))
            rows.append(
                {
                    "loads": name,
                    "policy": policy,
                    "mean": float(np.mean(even)),
                    "least": float(np.min(even)),
                    "moves": moved / num_layers / (_WINDOWS - 1),
                    "windows": even,
                }
            )
            print({key: rows[-1][key] for key in ("loads", "policy", "mean", "least", "moves")}, flush=True)
    return rows


def synthetic_drift(num_layers: int, num_experts: int) -> Popularity:
    return zipf(num_layers, num_experts, 0.8, 10.0, seed=0)
