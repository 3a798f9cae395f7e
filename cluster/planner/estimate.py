"""What a given number of workers would do for a workload: times to the first token and per token, and what limits them.

Pure. Where it simplifies, it says so here:

- Prefill workers share one queue (the router sends a prompt where least is queued, which is nearly that).
- The whole prompt is handed over, as if the decode worker had none of it.
- A unified worker puts a chunk of a prompt into each step beside its running answers: reading a prompt takes its own
  time plus a decode step for each chunk, and decode steps are stretched by the share of time that prompts take.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import NormalDist, fmean
from typing import Any

from cluster.planner.profile import Profile
from cluster.planner.queueing import NO_WAIT, Occupancy, Wait, mgc_wait, occupancy
from cluster.planner.slo import Slo
from cluster.planner.workload import Workload

SHARES = (0.5, 0.9, 0.99)
_KV_USABLE = 0.95  # blocks are not all full, and requests not all mean
_NO_TIME = dict.fromkeys(SHARES, math.inf)


@dataclass(frozen=True, slots=True)
class Pools:
    """`prefill` 0: the others are unified workers, which do both."""

    prefill: int
    decode: int

    @property
    def unified(self) -> bool:
        return self.prefill == 0

    def shown(self) -> str:
        return f"{self.decode} unified" if self.unified else f"{self.prefill} prefill + {self.decode} decode"


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A limit that is not kept. `limit`: prefill queue, prefill time, decode batch, decode time, KV capacity, transfer."""

    limit: str
    text: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds by share of requests; infinite where a queue grows without end."""

    pools: Pools
    ttft_s: dict[float, float]
    tpot_s: dict[float, float]
    prefill_utilization: float  # of a unified worker: the share of time that prompts take
    prefill_wait_s: float  # mean
    decode_batch: float  # mean, of a worker
    decode_seats: int  # of a worker
    seats_limited_by: str  # "KV capacity" or "max_num_seqs"
    kv_used: float  # share, mean
    decode_wait_s: float  # mean, for a seat
    handover_s: float  # mean, that is not hidden behind prefill
    link_utilization: float  # of the busiest prefill worker's way out
    shortfalls: tuple[Shortfall, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return not self.shortfalls


def estimate(workload: Workload, profile: Profile, pools: Pools, slo: Slo, share: float) -> Estimate:
    """`share`: of requests that must keep each limit of the SLO."""
    return (_Unified if pools.unified else _Split)(workload, profile, pools, slo, share).estimate()


class _Split:
    """Prefill and decode workers apart."""

    def __init__(self, workload: Workload, profile: Profile, pools: Pools, slo: Slo, share: float) -> None:
        self.workload, self.profile, self.pools, self.slo, self.share = workload, profile, pools, slo, share
        self.reading_s = [
            profile.prefill_s(shape.new_tokens, shape.cached_tokens) for shape in workload.shapes
        ]
        self.steps = [max(shape.output_tokens - 1, 0) for shape in workload.shapes]
        self.mean_steps = fmean(self.steps)
        # A request that stays longer is met more often: held and read contexts are weighted by its steps.
        total = sum(self.steps) or 1
        self.context = sum(
            steps * (shape.prompt_tokens + shape.output_tokens / 2)
            for steps, shape in zip(self.steps, workload.shapes, strict=True)
        ) / total or fmean(shape.prompt_tokens for shape in workload.shapes)
        self.shares = sorted({*SHARES, share})

    def estimate(self) -> Estimate:
        workload, profile, pools = self.workload, self.profile, self.pools
        mean_s, cv2 = moments(self.reading_s)
        handovers = [
            profile.handover_s(shape.prompt_tokens, seconds)
            for shape, seconds in zip(workload.shapes, self.reading_s, strict=True)
        ]
        link = workload.prefill_rate / pools.prefill * self._sent_bytes() / profile.transfer_bytes_per_s
        wait = mgc_wait(pools.prefill, workload.prefill_rate, mean_s, cv2, workload.arrival_cv2)
        # Blocks are held from the reservation on, while the prompt waits and is read.
        before_s = mean_s + fmean(handovers) + (wait.mean_s if wait is not None else 0.0)
        held = workload.prefill_rate * before_s * fmean(s.prompt_tokens for s in workload.shapes)
        seats, limited_by = self._seats(held)
        there = occupancy(pools.decode, seats, workload.decode_rate, self.mean_steps, self._step_s())
        ttft = _NO_TIME
        if wait is not None and there is not None and link < 1:
            service = [a + b for a, b in zip(self.reading_s, handovers, strict=True)]
            ttft = quantiles(service, wait, there.wait, self.shares)
        tpot = self._tpot(there)
        return Estimate(
            pools=pools,
            ttft_s=ttft,
            tpot_s=tpot,
            prefill_utilization=workload.prefill_rate * mean_s / pools.prefill,
            prefill_wait_s=math.inf if wait is None else wait.mean_s,
            handover_s=fmean(handovers),
            link_utilization=link,
            **self._decode_figures(there, seats, limited_by, held),
            shortfalls=tuple(self._shortfalls(ttft, tpot, wait, there, handovers, link, seats, limited_by)),
        )

    def _decode_figures(
        self, there: Occupancy | None, seats: int, limited_by: str, held: float
    ) -> dict[str, Any]:
        mean = self.pools.decode * seats if there is None else there.mean
        tokens = self.pools.decode * self.profile.kv_tokens
        return {
            "decode_batch": mean / self.pools.decode,
            "decode_seats": seats,
            "seats_limited_by": limited_by,
            "kv_used": min(1.0, (mean * self.context + held) / tokens),
            "decode_wait_s": math.inf if there is None else there.wait.mean_s,
        }

    def _seats(self, held: float) -> tuple[int, str]:
        """Requests that one decode worker runs at a time, and why not more."""
        room = _KV_USABLE * self.profile.kv_tokens - held / self.pools.decode
        by_memory = int(max(room, 0.0) / self.context)
        if by_memory < self.profile.max_num_seqs:
            return by_memory, "KV capacity"
        return self.profile.max_num_seqs, "max_num_seqs"

    def _step_s(self) -> Callable[[float], float]:
        return lambda batch: self.profile.step_s(batch, self.context)

    def _tpot(self, there: Occupancy | None) -> dict[float, float]:
        if there is None:
            return _NO_TIME
        step_s = self._step_s()

        # Requests that come in clumps are met in clumps: peakedness of a renewal stream, (1 + cv²) / 2.
        spread = math.sqrt((1 + self.workload.arrival_cv2) / 2)

        def seen(share: float) -> float:
            """With so many others and itself."""
            others = there.mean + spread * (there.quantile(share) - there.mean)
            return step_s(min(max(others, 0.0) + 1, there.seats) / there.workers)

        return {share: seen(share) for share in self.shares}

    def _sent_bytes(self) -> float:
        return fmean(s.prompt_tokens for s in self.workload.shapes) * self.profile.kv_bytes_per_token

    # --- what is not kept, and why --------------------------------------------------------------------------------

    def _shortfalls(
        self,
        ttft: dict[float, float],
        tpot: dict[float, float],
        wait: Wait | None,
        there: Occupancy | None,
        handovers: Sequence[float],
        link: float,
        seats: int,
        limited_by: str,
    ) -> list[Shortfall]:
        found = []
        if wait is None:
            busy = self.workload.prefill_rate * fmean(self.reading_s) / self.pools.prefill
            found.append(
                Shortfall("prefill queue", f"prompts bring {busy:.0%} of what the prefill workers can read")
            )
        if link >= 1:
            found.append(Shortfall("transfer", f"blocks need {link:.0%} of a prefill worker's way out"))
        if there is None:
            found.append(self._too_many(seats, limited_by))
        limit = self.slo.ttft_s
        if (
            limit is not None
            and wait is not None
            and there is not None
            and limit < ttft[self.share] < math.inf
        ):
            found.append(self._late_first_token(limit, ttft[self.share], wait, there, handovers, limited_by))
        if there is not None:
            found += self._slow_tokens(tpot)
        return found

    def _too_many(self, seats: int, limited_by: str) -> Shortfall:
        limit = limited_by if limited_by == "KV capacity" else "decode batch"
        if seats < 1:
            return Shortfall(
                limit,
                f"the KV cache of {self.profile.kv_tokens:,} tokens has no room for a request of "
                f"{self.context:,.0f} beside those that wait for their prompts",
            )
        step_s = self._step_s()(seats)
        most = self.pools.decode * seats / (self.mean_steps * step_s)
        return Shortfall(
            limit,
            f"{self.pools.decode} × {seats} requests at {step_s * 1e3:.1f} ms a step end {most:.2f} a second, "
            f"{self.workload.decode_rate:.2f} come",
        )

    def _late_first_token(
        self,
        limit: float,
        found_s: float,
        wait: Wait,
        there: Occupancy,
        handovers: Sequence[float],
        limited_by: str,
    ) -> Shortfall:
        """The largest of what a late first token waited for, unless reading alone is too slow."""
        reading = quantile_of(self.reading_s, self.share)
        waits = {
            "prefill queue": wait.quantile(self.share),
            "transfer": quantile_of(handovers, self.share),
            limited_by if limited_by == "KV capacity" else "decode batch": there.wait.quantile(self.share),
        }
        name = max(waits, key=lambda key: waits[key])
        text = f"TTFT p{self.share * 100:g} is {found_s:.3g} s, {limit:g} s asked: "
        if reading > limit:
            return Shortfall("prefill time", f"{text}reading the prompt alone takes {reading:.3g} s")
        return Shortfall(name, f"{text}{waits[name]:.3g} s of waiting, {reading:.3g} s of reading")

    def _slow_tokens(self, tpot: dict[float, float]) -> list[Shortfall]:
        limit, found_s = self.slo.tpot_s, tpot[self.share]
        if limit is None or found_s <= limit or not self.mean_steps:
            return []
        text = f"TPOT p{self.share * 100:g} is {found_s * 1e3:.3g} ms, {limit * 1e3:g} ms asked"
        alone = self.profile.step_s(1, self.context)
        if alone > limit:
            return [Shortfall("decode time", f"{text}: one request alone takes {alone * 1e3:.3g} ms")]
        return [Shortfall("decode batch", text)]


class _Unified(_Split):
    """Workers that do both. Here `pools.decode` of them."""

    def estimate(self) -> Estimate:
        workload, profile, workers = self.workload, self.profile, self.pools.decode
        rate = workload.prefill_rate / workers
        self.busy = rate * fmean(self.reading_s)  # the share of time that prompts take
        seats, limited_by = self._seats(0.0)
        there = wait = None
        ttft = tpot = _NO_TIME
        if self.busy < 1:
            there = occupancy(workers, seats, workload.decode_rate, self.mean_steps, self._step_s())
        if there is not None:
            beside = profile.step_s(max(there.mean / workers, 1.0), self.context) if there.mean > 0 else 0.0
            running = 1 - math.exp(-there.mean / workers)  # the chance that there is anything to step beside
            service = [
                seconds + running * beside * math.ceil(shape.new_tokens / profile.chunk_tokens)
                for seconds, shape in zip(self.reading_s, workload.shapes, strict=True)
            ]
            wait = mgc_wait(workers, workload.prefill_rate, *moments(service), workload.arrival_cv2)
            if wait is not None:
                ttft = quantiles(service, wait, there.wait, self.shares)
            tpot = self._tpot(there)
        return Estimate(
            pools=self.pools,
            ttft_s=ttft,
            tpot_s=tpot,
            prefill_utilization=self.busy,
            prefill_wait_s=math.inf if wait is None else wait.mean_s,
            handover_s=0.0,
            link_utilization=0.0,
            **self._decode_figures(there, seats, limited_by, 0.0),
            shortfalls=tuple(self._unified_shortfalls(ttft, tpot, wait, there, seats, limited_by)),
        )

    def _unified_shortfalls(
        self,
        ttft: dict[float, float],
        tpot: dict[float, float],
        wait: Wait | None,
        there: Occupancy | None,
        seats: int,
        limited_by: str,
    ) -> list[Shortfall]:
        if self.busy >= 1:
            return [
                Shortfall(
                    "prefill queue", f"reading prompts alone takes {self.busy:.0%} of the workers' time"
                )
            ]
        if there is None:
            return [self._too_many(seats, limited_by)]
        found = []
        if wait is None:
            found.append(
                Shortfall(
                    "prefill queue",
                    "prompts, read beside the running answers, come faster than they are read",
                )
            )
        elif self.slo.ttft_s is not None and ttft[self.share] > self.slo.ttft_s:
            found.append(
                self._late_first_token(self.slo.ttft_s, ttft[self.share], wait, there, [0.0], limited_by)
            )
        return found + self._slow_tokens(tpot)

    def _step_s(self) -> Callable[[float], float]:
        """Stretched by the prompts in between."""
        return lambda batch: self.profile.step_s(batch, self.context) / (1 - self.busy)

    def _tpot(self, there: Occupancy | None) -> dict[float, float]:
        """How many prompts fall into a request's life is chance too: the shorter the answer, the more."""
        if there is None:
            return _NO_TIME
        steady = super()._tpot(there)
        middle = steady[0.5]
        lasts = max(self.mean_steps, 1.0) * middle
        second = fmean(seconds**2 for seconds in self.reading_s)
        deviation = math.sqrt(self.workload.prefill_rate / there.workers * lasts * second)
        # A request that meets more of them stays longer, and meets more.
        deviation /= max(self.mean_steps, 1.0) * (1 - self.busy)
        found = {}
        for share, seconds in steady.items():
            chance = NormalDist().inv_cdf(share) * deviation
            found[share] = middle + math.copysign(math.hypot(seconds - middle, chance), chance or 1.0)
        return found


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the squared coefficient of variation."""
    mean = fmean(values)
    return mean, fmean((value - mean) ** 2 for value in values) / mean**2


def quantile_of(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def quantiles(
    service: Sequence[float], first: Wait, second: Wait, shares: Sequence[float]
) -> dict[float, float]:
    """Of a service that follows two independent waits; one of `service` is drawn evenly."""
    # The second wait is nearly always none: its distribution is taken at the middles of a few equal parts.
    parts = [second.quantile((index + 0.5) / 32) for index in range(32)] if second.chance > 1e-4 else [0.0]
    if second.chance > 1e-4:  # and its tail, which a p99 is made of
        parts[-1] = second.quantile(0.99)
    totals = sorted(seconds + part for seconds in service for part in parts)
    if first is NO_WAIT or first.chance == 0:
        return {share: quantile_of(totals, share) for share in shares}

    # P(service + first > t) in closed form over the sorted totals: those above t count whole, each s below by its tail
    # exp(−(t − s)/scale). `grown[i]` is the sum of exp(−(totals[i] − s)/scale) over the s up to totals[i].
    scale = first.scale_s
    grown = [1.0]
    for earlier, later in pairwise(totals):
        grown.append(grown[-1] * math.exp((earlier - later) / scale) + 1.0)

    def beyond(seconds: float) -> float:
        index = bisect_left(totals, seconds)
        tail = 0.0
        if index:
            tail = first.chance * grown[index - 1] * math.exp((totals[index - 1] - seconds) / scale)
        return (len(totals) - index + tail) / len(totals)

    found = {}
    for share in shares:
        low, high = 0.0, totals[-1] + scale
        while beyond(high) > 1 - share:
            high = 2 * high + scale
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if beyond(middle) > 1 - share else (low, middle)
        found[share] = high
    return found
