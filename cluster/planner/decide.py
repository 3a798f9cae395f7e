"""How many workers each pool should have now, from what was measured: a pure function of observation, state and time.

A pool grows as soon as it has been too small for `up_after_s`, by as many workers as are missing. It shrinks by one
worker at a time, when for all of `down_after_s` one fewer would have kept `calm` of every limit (the N−1 check), and
`pause_s` after its last change. Between the two lies the band in which nothing happens: noise does not make it flap.

The queue's wait is part of it: prefill workers are an M/G/c queue, and what waits there already is work to be done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean

from cluster.planner.queueing import mgc_wait
from workers.protocol.messages import Role

_WAIT_SHARE = 0.9  # of requests that must keep ttft_s
_KV_FULL = 0.95
_SAMPLES = 64  # (batch, step) pairs that the decode pool remembers
_MOST = 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What the configuration asks of a pool of either kind; see PlannerConfig."""

    ttft_s: float
    tpot_s: float
    headroom: float
    window_s: float
    up_after_s: float
    down_after_s: float
    calm: float
    pause_s: float
    most: Mapping[Role, int]
    least: Mapping[Role, int]


@dataclass(frozen=True, slots=True)
class PrefillSeen:
    """The prefill pool over the window. `workers` take work or are about to; those that drain are apart."""

    workers: int
    draining: int
    busy: float  # seconds of computing per second, all workers together
    arrivals_per_s: float
    service_s: float  # mean, from the first chunk to the first token
    wait_s: float  # mean, in the queue
    backlog_s: float  # seconds that one worker would need for what is queued now


@dataclass(frozen=True, slots=True)
class DecodeSeen:
    """The decode pool over the window."""

    workers: int
    draining: int
    tokens_per_s: float  # all workers together
    batch: float  # requests in a step, mean of the workers that step
    step_s: float  # mean seconds of a step
    kv_used: float  # share of the pool's KV blocks
    waiting: float  # requests that find no room anywhere


@dataclass(frozen=True, slots=True)
class Observation:
    """`prefill` None: decode workers read prompts themselves."""

    decode: DecodeSeen
    prefill: PrefillSeen | None = None


@dataclass(frozen=True, slots=True)
class Need:
    workers: int  # that keep every limit
    calm: int  # that keep `calm` of every limit
    why: str


@dataclass(frozen=True, slots=True)
class PoolState:
    needs: tuple[tuple[float, Need], ...] = ()  # (when, what) of the last `down_after_s`
    changed_at: float = -math.inf
    watched_since: float | None = None


@dataclass(frozen=True, slots=True)
class State:
    pools: Mapping[Role, PoolState] = field(default_factory=dict)
    steps: tuple[tuple[float, float], ...] = ()  # (batch, seconds of a step), the newest of each batch


@dataclass(frozen=True, slots=True)
class Decision:
    """`sizes`: workers that each pool should have; `text`: why, in one line; `state`: for the next time."""

    sizes: Mapping[Role, int]
    changes: Mapping[Role, int]  # of `sizes` against what there is; empty: nothing to do
    text: str
    state: State


def decide(seen: Observation, state: State, limits: Limits, now: float) -> Decision:
    """`now`: seconds on any clock that goes forward."""
    steps = state.steps
    if seen.decode.batch > 0 and seen.decode.step_s > 0:
        # The newest of each batch, rounded: a long calm time must not wash out what others were seen to take.
        kept = (one for one in steps if round(one[0]) != round(seen.decode.batch))
        steps = (*kept, (seen.decode.batch, seen.decode.step_s))[-_SAMPLES:]
    step_s = pace(steps, seen.decode.batch, seen.decode.step_s)
    pools: dict[Role, PoolState] = {}
    sizes: dict[Role, int] = {}
    texts = []
    found: list[tuple[Role, PrefillSeen | DecodeSeen, Callable[[float], tuple[int, str]]]] = []
    if (prefill := seen.prefill) is not None:
        found.append(("prefill", prefill, lambda share: prefill_need(prefill, limits, share)))
    found.append(("decode", seen.decode, lambda share: decode_need(seen.decode, limits, share, step_s)))
    for role, pool, needed in found:
        workers, why = needed(1.0)
        need = Need(workers, max(workers, needed(limits.calm)[0]), why)
        size, text, pools[role] = _size(role, pool, need, state.pools.get(role, PoolState()), limits, now)
        sizes[role] = size
        texts.append(text)
    present = {role: pool.workers for role, pool, _ in found}
    changes = {role: size - present[role] for role, size in sizes.items() if size != present[role]}
    return Decision(sizes, changes, "; ".join(texts), State(pools, steps))


def applied(state: State, role: Role, now: float) -> State:
    """The pool was changed: what was found before no longer counts."""
    return replace(state, pools={**state.pools, role: PoolState(changed_at=now, watched_since=now)})


def _size(
    role: Role, pool: PrefillSeen | DecodeSeen, need: Need, state: PoolState, limits: Limits, now: float
) -> tuple[int, str, PoolState]:
    since = now if state.watched_since is None else state.watched_since
    keep = max(limits.down_after_s, limits.up_after_s)
    needs = (*((at, one) for at, one in state.needs if now - at <= keep), (now, need))
    state = PoolState(needs, state.changed_at, since)
    have, least, most = pool.workers, limits.least[role], limits.most[role]

    lately = [one.workers for at, one in needs if now - at <= limits.up_after_s]
    if min(lately) > have and now - since >= limits.up_after_s:
        wanted = min(lately[-1], most)
        if wanted > have:
            return wanted, f"{role} {have} → {wanted}: {need.why}", state
        return have, f"{role} {have}, needs {lately[-1]}, at most {most}: {need.why}", state
    calm = max(one.calm for _, one in needs)
    rested = now - max(state.changed_at, since) >= max(limits.down_after_s, limits.pause_s)
    if have > least and calm < have and rested and not pool.draining:
        text = f"{role} {have} → {have - 1}: for {limits.down_after_s:g} s {calm} would have done; {need.why}"
        return have - 1, text, state
    return have, f"{role} {have}: {need.why}", state


# --- how many are enough ----------------------------------------------------------------------------------------------


def prefill_need(seen: PrefillSeen, limits: Limits, share: float) -> tuple[int, str]:
    """Workers that keep `share` of each limit, and the measure that says so."""
    offered = max(seen.busy, seen.arrivals_per_s * seen.service_s)
    offered += seen.backlog_s / limits.window_s  # to be caught up within a window
    rate = offered / seen.service_s if seen.service_s > 0 else 0.0
    text = f"{offered:.2f} workers' worth of prompts"
    if seen.wait_s > 0.0005:
        text += f", waiting {seen.wait_s * 1e3:.0f} ms"
    target_s = limits.ttft_s * share

    def enough(workers: int) -> bool:
        if offered > limits.headroom * share * workers:
            return False
        if seen.service_s >= target_s or not rate:
            return True  # waiting is not what is too long: more workers would not read faster
        wait = mgc_wait(workers, rate, seen.service_s, 1.0, 1.0)
        return wait is not None and wait.quantile(_WAIT_SHARE) + seen.service_s <= target_s

    found = _least(enough)
    if seen.wait_s > target_s and seen.workers:
        found = max(found, seen.workers + 1)  # measured is measured, whatever a formula says
        text += f" ({limits.ttft_s:g} s asked)"
    return found, text


def decode_need(
    seen: DecodeSeen, limits: Limits, share: float, step_s: Callable[[float], float]
) -> tuple[int, str]:
    """As `prefill_need`. Requests that find no room would write at the pace of those that have it."""
    running = seen.batch * max(seen.workers, 1)
    tokens_per_s = seen.tokens_per_s * (1 + seen.waiting / running if running else 1)
    text = f"{seen.step_s * 1e3:.3g} ms a token at batch {seen.batch:.1f}, KV {seen.kv_used:.0%}"
    if not tokens_per_s:
        return 1 + bool(seen.waiting), text if seen.waiting else "idle"
    target_s = limits.tpot_s * share

    def enough(workers: int) -> bool:
        batch = _batch(tokens_per_s / workers, step_s)
        if batch is None or step_s(batch) > target_s:
            return False
        return seen.kv_used * max(seen.workers, 1) / workers <= min(limits.headroom * share, _KV_FULL)

    found = _least(enough)
    if found == _MOST and step_s(1.0) > target_s:
        # One request alone is too slow: more workers help nobody. Stay, unless the cache is full.
        found = max(1, math.ceil(seen.kv_used * seen.workers / limits.headroom))
        text += f" ({limits.tpot_s * 1e3:g} ms asked, out of reach)"
    if seen.waiting >= 1:
        found = max(found, seen.workers + 1)
        text += f", {seen.waiting:.0f} without room"
    elif seen.step_s > target_s:
        text += f" ({limits.tpot_s * 1e3:g} ms asked)"
    return found, text


def pace(steps: tuple[tuple[float, float], ...], batch: float, now_s: float) -> Callable[[float], float]:
    """Seconds of a step by batch: what is seen now, and from there on the slope of what was seen; at least a tenth of a
    step is taken as shared by the batch.

    Where all batches were alike the slope is a guess, careful when workers may leave and bold when more are wanted, which
    then shows what is true: a larger batch takes longer nearly in proportion, a smaller one saves four fifths as much.
    """
    if not batch:
        return lambda wanted: now_s
    here = max(batch, 1.0)
    steepest = 0.9 * now_s / here
    batches = [seen for seen, _ in steps]
    up, down = steepest, 0.8 * now_s / here
    if len(steps) >= 3 and max(batches) >= 1.5 * min(batches):
        middle, mean_s = fmean(batches), fmean(seconds for _, seconds in steps)
        spread = sum((one - middle) ** 2 for one in batches)
        slope = sum((one - middle) * (seconds - mean_s) for one, seconds in steps) / spread
        up = down = min(max(slope, 0.0), steepest)

    def step_s(wanted: float) -> float:
        more = max(wanted, 1.0) - here
        return now_s + (up if more > 0 else down) * more

    return step_s


def _least(enough: Callable[[int], bool]) -> int:
    """The smallest number that is enough, where every larger one is too; at most `_MOST`."""
    low, high = 0, 1
    while high < _MOST and not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _batch(tokens_per_s: float, step_s: Callable[[float], float]) -> float | None:
    """How many requests a worker must run at a time to write so much. None: no batch is enough."""
    low, high = 0.0, 1.0
    while high / step_s(high) < tokens_per_s:
        low, high = high, 2 * high
        if high > 65_536:
            return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if middle / step_s(middle) < tokens_per_s else (low, middle)
    return high
