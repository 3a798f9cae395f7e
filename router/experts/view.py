"""What `GET /cluster/experts` answers, and `headrace experts` and the live page show."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from router.experts.balance import rank_loads
from router.experts.bounds import lower_bound
from router.experts.group import Group
from router.experts.watched import Watched
from router.experts.windows import Array

_DIGITS = 3


async def view_of(watched: Watched, now: float) -> dict[str, Any]:
    """One group. Loads of experts are relative: 1 is an expert with the mean load of its layer. now: time.monotonic()."""
    found = _view(watched, now)
    # Of a large model this takes tens of milliseconds: streams must not wait for it.
    best = await asyncio.to_thread(_best, watched.group, watched.loads.routed())
    found["balancedness"]["best"] = best
    return found


def _view(watched: Watched, now: float) -> dict[str, Any]:
    group = watched.group
    routed = watched.loads.routed()
    measured, predicted = watched.measured(now), watched.predicted(now)
    placement = group.placement()
    planned = watched.planned
    return {
        "group": group.name,
        "pool": group.role,
        "layers": group.num_layers,
        "experts": group.num_experts,
        "slots": [0 if rank is None else rank.slots for rank in group.ranks],
        "tokens": float(routed.sum(axis=1).mean()) if len(routed) else 0.0,
        "counts_lost": watched.loads.lost,
        "changes_of_load": watched.loads.changes,
        "version": group.version,
        "posted": max(watched.state.posted, group.version),
        "why": None if watched.post is None else watched.post.why,
        "posted_by": None if watched.post is None else watched.post.router_id,
        "posted_at": None if watched.post is None else watched.post.at,
        "phase": str(watched.verdict.phase),
        "text": watched.verdict.text,
        "trouble": watched.trouble,
        "planning": watched.planning,
        "last_plan": None
        if planned is None
        else {"at": planned.at, "text": planned.text, "posted": planned.posted},
        "balancedness": {
            "measured": None if measured is None else _rounded(measured.balancedness),
            "predicted": None if predicted is None else _rounded(predicted.balancedness),
        },
        "ranks": [_rank(watched, number, now) for number in range(len(group.ranks))],
        "load": _relative(routed),
        "placement": None
        if placement is None
        else [[list(rank) for rank in layer] for layer in placement.layers],
        "rank_load": None if placement is None else _relative(rank_loads(placement, routed)),
    }


def _rank(watched: Watched, number: int, now: float) -> dict[str, Any]:
    report = watched.group.ranks[number]
    if report is None:
        return {"rank": number, "state": "gone" if number not in watched.group.members else "missing"}
    computed = watched.loads.computed()
    mean = computed.sum() / max(len(watched.group.alive), 1)
    posted = watched.state.posted
    if number not in watched.group.members:
        state = "left out"
    elif report.refused >= max(posted, report.version + 1):
        state = "refuses"
    elif posted > report.version:
        state = "ready" if report.ready >= posted else "loading"
    else:
        state = "in use"
    return {
        "rank": number,
        "state": state,
        "worker_id": report.worker_id,
        "node": report.node,
        "speed": report.speed,
        "slots": report.slots,
        "version": report.version,
        "ready": max(report.ready, report.version),
        "refused": report.refused,
        "reason": report.reason,
        "tokens": watched.loads.tokens[number],
        "load": _rounded(float(computed[:, number].sum() / mean)) if mean else None,
    }


def _best(group: Group, routed: Array) -> float | None:
    """No placement of this load on these ranks is more balanced."""
    topology = group.topology()
    if not routed.any() or sum(topology.slots) < group.num_experts:
        return None
    speed = sum(rank.speed for rank in topology.ranks if rank.slots)
    bounds = sum(lower_bound(layer, topology) for layer in routed)
    return _rounded(min(float(routed.sum()) / speed / bounds, 1.0))


def _relative(loads: Array) -> list[list[float]]:
    mean = loads.mean(axis=1, keepdims=True)
    found: list[list[float]] = np.round(loads / np.where(mean > 0, mean, 1.0), _DIGITS).tolist()
    return found


def _rounded(value: float) -> float:
    return round(value, 4)
