"""Plans where experts live: pure functions from loads and an incumbent placement to a better one.

In order of weight: the fullest rank of each layer (its tokens divided by its speed) as low as it gets, since all
ranks wait for it; then few hops between nodes (`traffic.py`); with as few moves as that takes. How low is possible
says `bounds.py`; search ends within `Options.tolerance` of it. A plan from an incumbent walks away from it step by
step (`search.py`) and goes, layer by layer, only as far as each move is worth what it costs (`worth.py`). A plan from
nothing starts where greedy (ours, and EPLB's where its conditions hold) ends, so that it is never worse than EPLB.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from router.experts.arrays import Bools, Floats
from router.experts.bounds import lower_bound
from router.experts.fresh import Budget, fresh
from router.experts.hierarchy import settle, sow_by_node
from router.experts.layout import EMPTY, Layout
from router.experts.search import Search
from router.experts.seed import house
from router.experts.topology import Topology
from router.experts.traffic import Traffic
from router.experts.worth import Point, choose
from workers.protocol.experts import Move, Placement, PlacementError, moves

_WALK = 3  # times the effort of a plan from nothing: a walk from an incumbent has farther to go
_IDLE = 1e-6  # of the mean: what an expert without tokens counts as, so that these are spread too


class Options(NamedTuple):
    tolerance: float = 0.005  # above the bound of the fullest rank: good enough
    imbalance: float = 0.05  # the same where traffic is given: what fewer hops may cost
    equal_shares: bool = False  # copies share tokens equally, as in EPLB
    move_cost: float = 0.0005  # of a layer's time (or hops): what one moved expert has to gain
    max_moves: int | None = None  # of all layers together
    effort: int = 2000  # looks of the search (`search.py`) for all layers together; 0.2 to 0.4 ms each


class Plan(NamedTuple):
    placement: Placement
    moves: tuple[Move, ...]  # what ranks have to load; from nothing: none
    moved_bytes: int
    before: tuple[
        float, ...
    ]  # time of the fullest rank of each layer if nothing is changed; from nothing: empty
    after: tuple[float, ...]
    bounds: tuple[float, ...]  # no placement is below

    @property
    def gain(self) -> float:
        """Share of the time of all layers' experts that is saved, 0 to 1."""
        return 1 - sum(self.after) / sum(self.before) if sum(self.before) else 0.0


def plan(
    loads: Floats,
    topology: Topology,
    previous: Placement | None = None,
    *,
    traffic: Traffic | None = None,
    options: Options = Options(),  # noqa: B008 (immutable)
    version: int | None = None,
) -> Plan:
    """A placement for these loads [layers, E] (tokens of each expert).

    Without `previous` everything is placed anew. With it, ranks that have no slots any more are left, experts that
    have lost their last copy are placed first, and further moves are made where they pay. version: of the new
    placement; the next one unless given. Raises PlacementError where loads, topology or traffic make no sense or the
    experts do not fit.
    """
    given = _checked(loads, topology, previous, traffic)
    mean = given.mean(axis=1, keepdims=True)
    loads = np.maximum(given, np.where(mean > 0, _IDLE * mean, 1.0))
    bounds = np.array([lower_bound(layer, topology) for layer in loads])
    limits = bounds * (1 + (options.imbalance if traffic else options.tolerance))
    if previous is None:
        layouts = _anew(loads, topology, traffic, limits, options)
    else:
        layouts = _onward(loads, topology, previous, traffic, limits, options)
    if version is None:
        version = previous.version + 1 if previous else 0
    placement = _placement(layouts, version, options.equal_shares)
    placement.validate(loads.shape[1], topology.slots)
    needed = tuple(moves(previous, placement)) if previous else ()
    return Plan(
        placement,
        needed,
        len(needed) * topology.expert_bytes,
        _fullest(previous, given, topology) if previous else (),
        _fullest(placement, given, topology),
        tuple(np.where(mean[:, 0] > 0, bounds, 0.0).tolist()),
    )


def over_remaining(
    placement: Placement,
    lost: int | Iterable[int],
    loads: Floats,
    topology: Topology,
    *,
    equal_shares: bool = False,
) -> Plan:
    """The placement that the other ranks can switch to soonest when ranks have died: only experts that have no copy
    left are moved; the shares of the others are divided among the copies that remain.

    Raises PlacementError where the experts do not fit into what is left.
    """
    remaining = topology.without([lost] if isinstance(lost, int) else lost)
    return plan(loads, remaining, placement, options=Options(equal_shares=equal_shares, max_moves=0))


def rank_times(placement: Placement, loads: Floats, topology: Topology) -> Floats:
    """Tokens of each rank divided by its speed [layers, ranks]. Of a rank that is gone: 0."""
    loads = np.asarray(loads, dtype=np.float64)
    times = np.zeros((placement.num_layers, len(topology.ranks)))
    for layer, ranks in enumerate(placement.layers):
        rank = np.repeat(np.arange(len(ranks)), [len(experts) for experts in ranks])
        expert = np.concatenate(ranks).astype(np.int64)
        if placement.shares is None:
            share = 1 / np.bincount(expert)[expert]
        else:
            share = np.concatenate(placement.shares[layer])
        times[layer] = np.bincount(rank, share * loads[layer, expert], len(topology.ranks))
    alive = np.array([rank.slots > 0 for rank in topology.ranks])
    return np.where(alive, times / np.array(topology.speeds), 0.0)


def _fullest(placement: Placement, loads: Floats, topology: Topology) -> tuple[float, ...]:
    return tuple(rank_times(placement, loads, topology).max(axis=1).tolist())


def balancedness(placement: Placement, loads: Floats, topology: Topology) -> Floats:
    """Of each layer: the time that all ranks together would need, divided by that of the fullest; 1 is perfect."""
    speed = sum(rank.speed for rank in topology.ranks if rank.slots)
    fullest = rank_times(placement, loads, topology).max(axis=1)
    mean = np.asarray(loads, dtype=np.float64).sum(axis=1) / speed
    return np.where(fullest > 0, mean / np.maximum(fullest, 1e-300), 1.0)


def _checked(
    loads: Floats, topology: Topology, previous: Placement | None, traffic: Traffic | None
) -> Floats:
    loads = np.array(loads, dtype=np.float64)
    if loads.ndim != 2 or 0 in loads.shape:
        raise PlacementError(f"loads have the shape {loads.shape}; it must be [layers, experts]")
    if not np.isfinite(loads).all() or (loads < 0).any():
        raise PlacementError("loads must be finite numbers of tokens, 0 or more")
    topology.validate(loads.shape[1])
    if traffic is not None:
        traffic.validate(loads.shape[0], loads.shape[1], max(topology.nodes) + 1)
    if previous is not None:
        _check_previous(previous, loads.shape[0], loads.shape[1], len(topology.ranks))
    return loads


def _check_previous(previous: Placement, num_layers: int, num_experts: int, num_ranks: int) -> None:
    """It need not be valid any more, since ranks may have died, but it must be of this model and group."""
    if previous.num_layers != num_layers:
        raise PlacementError(f"the placement has {previous.num_layers} layers, loads have {num_layers}")
    if previous.num_ranks != num_ranks:
        raise PlacementError(f"the placement is for {previous.num_ranks} ranks, the group has {num_ranks}")
    for layer, ranks in enumerate(previous.layers):
        for rank, experts in enumerate(ranks):
            if len(set(experts)) != len(experts) or not set(experts) <= set(range(num_experts)):
                raise PlacementError(
                    f"the placement has experts {list(experts)} on rank {rank} in layer {layer}; "
                    f"allowed are 0 to {num_experts - 1}, each once"
                )


def _anew(
    loads: Floats, topology: Topology, traffic: Traffic | None, limits: Floats, options: Options
) -> list[Layout]:
    if traffic is None or len(set(topology.nodes)) == 1:
        budget = Budget(options.effort, len(loads))
        layouts = []
        for row, limit in zip(loads, limits.tolist(), strict=True):
            layouts.append(fresh(row, topology, limit, options.equal_shares, budget))
            budget.next_layer()
        return layouts
    layouts = sow_by_node(loads, topology, traffic, limits, options.equal_shares)
    layouts = [
        Search(layout, limit, options.effort // len(layouts)).run()
        for layout, limit in zip(layouts, limits.tolist(), strict=True)
    ]
    settle(layouts, max(topology.nodes) + 1, traffic, limits)
    return layouts


def _onward(
    loads: Floats,
    topology: Topology,
    previous: Placement,
    traffic: Traffic | None,
    limits: Floats,
    options: Options,
) -> list[Layout]:
    layouts, trails, held = [], [], []
    to_walk, to_start_anew = Budget(_WALK * options.effort, len(loads)), Budget(options.effort, len(loads))
    for number, (row, limit) in enumerate(zip(loads, limits.tolist(), strict=True)):
        layout = Layout(row, topology, options.equal_shares)
        layout.take(previous.layers[number], previous.shares[number] if previous.shares else None)
        held.append(layout.held.copy())
        house(layout)
        layout.divide(limit)
        trail = [_point(layout, held[-1])]
        if options.max_moves != 0:
            trail += _walk(layout, limit, held[-1], to_walk)
            if trail[-1].fullest > limit:
                trail.append(
                    _point(fresh(row, topology, limit, options.equal_shares, to_start_anew), held[-1])
                )
        layouts.append(layout)
        trails.append(trail)
        to_walk.next_layer()
        to_start_anew.next_layer()
    mean = loads.sum(axis=1) / sum(rank.speed for rank in topology.ranks if rank.slots)
    chosen = choose(trails, (mean * options.move_cost).tolist(), options.max_moves)
    found = [point.restored(layout) for point, layout in zip(chosen, layouts, strict=True)]
    if traffic is not None:
        left = None if options.max_moves is None else options.max_moves - sum(point.moves for point in chosen)
        settle(found, max(topology.nodes) + 1, traffic, limits, 2 * options.move_cost, left)
    for layout, before in zip(found, held, strict=True):
        _prune(layout, before)
    return found


def _walk(layout: Layout, limit: float, held: Bools, budget: Budget) -> list[Point]:
    """The layouts that a search passes."""
    search = Search(layout, limit, budget.of_a_layer(), held)
    trail = []
    while search.step():
        trail.append(_point(search.layout, held))
    budget.spend(search.looks)
    return trail


def _point(layout: Layout, held: Bools) -> Point:
    serving = np.flatnonzero((layout.expert != EMPTY) & (layout.tokens > 0))
    moved = int((~held[layout.expert[serving], layout.rank[serving]]).sum())
    return Point(moved, layout.fullest, layout.expert, layout.tokens)


def _prune(layout: Layout, held: Bools) -> None:
    """A copy that would have to be loaded and serves nothing is left out."""
    for slot in np.flatnonzero((layout.expert != EMPTY) & (layout.tokens <= 0)).tolist():
        expert = int(layout.expert[slot])
        if layout.copies[expert] > 1 and not held[expert, layout.rank[slot]]:
            layout.clear(slot)


def _placement(layouts: list[Layout], version: int, equal_shares: bool) -> Placement:
    layers, shares = zip(*(layout.placed() for layout in layouts), strict=True)
    return Placement(version, tuple(layers), None if equal_shares else tuple(shares))
