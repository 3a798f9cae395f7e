"""When the experts of a group are placed anew. Pure: looks at what is known, and says what is to be done and why.

Planning takes time, so it is two questions. `look`: is it time to plan? `judge`: is the plan worth carrying out? A plan
is judged on counts that it was not made with, so that what it gains is not noise; what it gains must be worth the
loading of experts; and whatever keeps placements from being carried out is told in a verdict, never kept silent.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from router.config import ExpertsConfig
from router.experts.balance import balance, rank_loads
from router.experts.group import Group
from router.experts.windows import Array
from workers.protocol.experts import Placement, moves

_MOST_PATIENCE = 6  # doublings of the pause after refusals
_FUTILE_PAUSES = 10  # until a load for which planning was in vain is planned for again


class Phase(StrEnum):
    OFF = "off"  # it is not wanted
    WAITING = "waiting"  # for ranks, counts, or the end of a pause
    BALANCED = "balanced"  # there is nothing to gain
    PLANNING = "planning"
    LOADING = "loading"  # a placement is being carried out
    STALLED = "stalled"  # ... for too long
    REFUSED = "refused"  # ... or not at all
    FAILED = "failed"  # there is no plan: the reason is told


TROUBLE = frozenset({Phase.STALLED, Phase.REFUSED, Phase.FAILED})  # phases that somebody should look into


@dataclass(frozen=True)
class Seen:
    """What is known of a group at one moment."""

    group: Group
    halves: Array  # [2, layers, experts]: tokens, in two independent halves
    silent_s: float | None = None  # since a rank last sent counts; None: never
    expert_share: float | None = None  # of ranks' time, as measured


@dataclass(frozen=True)
class State:
    """What is remembered of a group between two looks, by the router that plans. Times are time.monotonic()."""

    posted: int = 0  # version posted last, by whomever
    posted_at: float = float("-inf")
    planned_at: float = float("-inf")
    refused: int = 0  # version whose refusal has been taken note of
    refusals: int = 0  # in a row
    refused_ever: int = 0  # placements
    futile: float = 0.0  # what could at best be gained when a plan was last found not worth it
    failure: str = ""  # why the last attempt to plan gave no plan
    members: frozenset[int] | None = None  # that the last plan was for


@dataclass(frozen=True)
class Verdict:
    phase: Phase
    text: str  # for people
    urgent: bool = False  # PLANNING: because of who is there; no gain is asked for
    most_to_gain: float = 0.0  # PLANNING: share of the fullest ranks' time


@dataclass(frozen=True)
class Judgement:
    worth: bool
    text: str
    gain: float  # share by which the fullest ranks' time shrinks, on counts that the plan does not know
    num_moves: int  # experts to be loaded, over all layers and ranks
    load_s: float  # seconds until the rank that has most to load has done so


def look(seen: Seen, state: State, config: ExpertsConfig, now: float) -> tuple[Verdict, State]:
    """Whether it is time to plan. The state that comes back belongs to the next look."""
    group = seen.group
    if not config.rebalance:
        return Verdict(Phase.OFF, "rebalancing is off (router.experts.rebalance)"), state
    if group.missing:
        return Verdict(Phase.WAITING, f"{_ranks(group.missing)} of {len(group.ranks)} not there"), state
    if not group.settled:
        return _under_way(group, state, config, now), state
    state = _noted(group, state)
    members = group.members
    urgent = _membership(group, state, members)
    if urgent is not None:
        # One plan for each change of members, and again after a pause if it was not carried out.
        if state.members == members and _pause_left_s(state, config, now) > 0:
            return _after(urgent, group, state, config, now), state
        return Verdict(Phase.PLANNING, urgent, urgent=True), state
    if state.members is None:
        state = replace(state, members=members)
    under_way = state.posted > group.version
    if under_way and state.refused != state.posted and now - state.posted_at < config.stall_s:
        return _under_way(group, state, config, now), state
    verdict = _worth_planning(seen, state, config, now)
    if verdict.phase is Phase.PLANNING or (verdict.phase is Phase.BALANCED and state.refused == state.posted):
        return verdict, state
    if under_way:
        return _under_way(group, state, config, now), state  # what went wrong stays said until it is replaced
    if state.failure:
        return Verdict(Phase.FAILED, state.failure), state
    return verdict, state


def judge(
    seen: Seen, rehearsal: Placement, plan: Placement, config: ExpertsConfig, *, urgent: bool
) -> Judgement:
    """Whether `plan` should be posted. `rehearsal` was planned the same way on the first half of the counts alone."""
    group, current = seen.group, seen.group.placement()
    assert current is not None, "look() plans only for ranks that agree"
    load_s, num_moves = _loading(group, current, plan, config)
    if urgent:
        return Judgement(True, f"{num_moves} experts to load", 0.0, num_moves, load_s)
    unknown, topology = seen.halves[1], group.topology()
    before = balance(rank_loads(current, unknown), topology)
    after = balance(rank_loads(rehearsal, unknown), topology)
    gain = 1 - after.fullest / before.fullest if before.fullest else 0.0
    share = seen.expert_share or config.expert_share
    saved_s = config.horizon_s * share * gain
    told = (
        f"balancedness {before.balancedness:.3f} → {after.balancedness:.3f}, {num_moves} experts to load: "
        f"the fullest ranks have {gain:.1%} less to do, which saves {saved_s:.1f} s in {config.horizon_s:g} s; "
        f"loading takes {load_s:.1f} s"
    )
    if (plan.layers, plan.shares) == (current.layers, current.shares):
        return Judgement(False, "the best placement found is the present one", gain, 0, 0.0)
    if gain < config.min_gain:
        return Judgement(False, f"{told}; less than {config.min_gain:.1%}", gain, num_moves, load_s)
    if saved_s <= load_s:
        return Judgement(False, f"{told}: not worth it", gain, num_moves, load_s)
    return Judgement(True, told, gain, num_moves, load_s)


def next_version(group: Group, state: State) -> int:
    """Greater than any that a rank or this router has heard of. Redis has the last word when it is posted."""
    return max(group.newest, state.posted) + 1


def posted(state: State, group: Group, version: int, now: float) -> State:
    return replace(
        state,
        posted=version,
        posted_at=now,
        planned_at=now,
        futile=0.0,
        failure="",
        members=group.members,
    )


def in_vain(state: State, most_to_gain: float, now: float) -> State:
    """A plan was made and found not worth it."""
    return replace(state, planned_at=now, futile=most_to_gain, failure="")


def failed(state: State, group: Group, reason: str, now: float) -> State:
    """No plan could be made."""
    return replace(state, planned_at=now, failure=reason, members=group.members)


def heard_of(state: State, version: int, now: float) -> State:
    """Redis has a post that is not this router's: it is waited for in the same way."""
    return replace(state, posted=version, posted_at=now) if version > state.posted else state


def _worth_planning(seen: Seen, state: State, config: ExpertsConfig, now: float) -> Verdict:
    group = seen.group
    if seen.silent_s is None or seen.silent_s > 3 * config.window_s:
        silence = "no counts yet" if seen.silent_s is None else f"no counts for {seen.silent_s:.0f} s"
        return Verdict(Phase.WAITING, f"{silence}: the ranks are idle, or do not report")
    if (pause_s := _pause_left_s(state, config, now)) > 0:
        return Verdict(Phase.WAITING, f"{pause_s:.0f} s of the pause are left")
    # The last layer computes only what tokens are drawn from: of a prompt its end.
    counted = float(np.median(seen.halves.sum(axis=(0, 2))))
    if counted < config.min_tokens or not seen.halves.sum(axis=2).all():
        return Verdict(Phase.WAITING, f"{counted:,.0f} of {config.min_tokens:,} tokens counted")
    current = group.placement()
    assert current is not None
    found = balance(rank_loads(current, seen.halves.sum(axis=0)), group.topology())
    told = f"balancedness {found.balancedness:.3f}"
    if found.most_to_gain < config.min_gain:
        return Verdict(Phase.BALANCED, told)
    lately = now - state.planned_at < _FUTILE_PAUSES * config.pause_s
    if lately and found.most_to_gain < state.futile + config.min_gain / 2:
        return Verdict(Phase.BALANCED, f"{told}: no placement was found that is worth its loading")
    return Verdict(Phase.PLANNING, told, most_to_gain=found.most_to_gain)


def _membership(group: Group, state: State, members: frozenset[int]) -> str | None:
    """Why a plan is needed whatever it gains: who is there has changed."""
    if not group.is_complete():
        return "experts are missing"
    if group.newcomers:
        return f"{_ranks(group.newcomers)} came and hold nothing"
    if state.members is not None and state.members - members:
        return f"{_ranks(sorted(state.members - members))} left"
    return None


def _noted(group: Group, state: State) -> State:
    """What ranks say of the placement that was posted last."""
    refused = max(rank.refused for rank in group.alive)
    if refused >= state.posted > max(state.refused, group.version):
        return replace(
            state,
            refused=state.posted,
            refusals=state.refusals + 1,
            refused_ever=state.refused_ever + 1,
        )
    if state.posted and group.version >= state.posted and state.refusals:
        return replace(state, refusals=0)
    return state


def _under_way(group: Group, state: State, config: ExpertsConfig, now: float) -> Verdict:
    """What has become of the placement that was posted last."""
    version = max(state.posted, group.newest)
    refusing = [rank for rank in group.alive if rank.refused >= version]
    if refusing:
        reasons = Counter(rank.reason or "no reason given" for rank in refusing)
        told = "; ".join(reason for reason, _ in reasons.most_common(3))
        return Verdict(
            Phase.REFUSED, f"version {version} is refused by {_ranks([r.rank for r in refusing])}: {told}"
        )
    behind = [rank.rank for rank in group.alive if max(rank.version, rank.ready) < version]
    waits_s = now - state.posted_at
    if behind:
        told = f"version {version} is being loaded by {_ranks(behind)}"
    else:
        told = f"version {version} is loaded, the ranks are about to switch"
    if np.isfinite(waits_s) and waits_s >= config.stall_s:
        return Verdict(Phase.STALLED, f"{told}, for {waits_s:.0f} s already")
    return Verdict(Phase.LOADING, told)


def _after(urgent: str, group: Group, state: State, config: ExpertsConfig, now: float) -> Verdict:
    """What has come of a plan that had to be made."""
    if state.failure:
        return Verdict(Phase.FAILED, f"{urgent}: {state.failure}")
    verdict = _under_way(group, state, config, now)
    return replace(verdict, text=f"{urgent}: {verdict.text}")


def _pause_left_s(state: State, config: ExpertsConfig, now: float) -> float:
    return max(state.posted_at, state.planned_at) + _pause_s(state, config) - now


def _pause_s(state: State, config: ExpertsConfig) -> float:
    """Ranks that refused will do so again, as likely as not."""
    return config.pause_s * float(2 ** min(state.refusals, _MOST_PATIENCE))


def _loading(group: Group, current: Placement, plan: Placement, config: ExpertsConfig) -> tuple[float, int]:
    """Seconds until the last rank has loaded what it lacks, and how many experts that are in all."""
    lacks = Counter(move.rank for move in moves(current, plan))
    seconds = 0.0
    for rank in group.alive:
        rate = rank.fetch_bytes_per_s or config.bytes_per_s
        seconds = max(seconds, lacks[rank.rank] * group.expert_bytes / rate)
    return seconds, sum(lacks.values())


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"
