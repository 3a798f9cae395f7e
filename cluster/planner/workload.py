"""What will be asked of the cluster: how often, and how long prompts and answers are. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from statistics import fmean, pvariance

from cluster.planner.trace import Trace

_SHAPES = 400  # of a trace that are looked at: enough for a p99 of their lengths


@dataclass(frozen=True, slots=True)
class Shape:
    """One request, or many alike."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int

    @property
    def new_tokens(self) -> int:
        return max(self.prompt_tokens - self.cached_tokens, 1)


@dataclass(frozen=True, slots=True)
class Workload:
    """`prefill_rate` and `decode_rate`: requests per second in the busiest time of each pool; `arrival_cv2`: squared
    deviation of the gaps between requests over their mean (1: Poisson). Shapes count equally."""

    shapes: tuple[Shape, ...]
    prefill_rate: float
    decode_rate: float
    arrival_cv2: float = 1.0
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.shapes:
            raise ValueError("a workload needs requests")
        for name in ("prefill_rate", "decode_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"rate is {getattr(self, name):g}, it must be above 0")
        if self.arrival_cv2 < 0:
            raise ValueError(f"arrival_cv2 is {self.arrival_cv2:g}, it must be at least 0")

    @classmethod
    def uniform(cls, rate: float, prompt_tokens: int, output_tokens: int, hit_rate: float = 0.0) -> Workload:
        """All alike. Raises ValueError."""
        if prompt_tokens < 1 or output_tokens < 1:
            raise ValueError(
                f"{prompt_tokens} prompt tokens and {output_tokens} output tokens: both must be 1 or more"
            )
        if not 0 <= hit_rate < 1:
            raise ValueError(f"prefix hit rate is {hit_rate:g}, it must be in 0 … 1 (1 excluded)")
        cached = int(prompt_tokens * hit_rate)
        return cls((Shape(prompt_tokens, cached, output_tokens),), rate, rate)


def of_trace(
    trace: Trace, *, window_s: float, cache_tokens: int | None = None, arrival_cv2: float | None = None
) -> Workload:
    """The busiest `window_s` of each pool. `cache_tokens`: that all prefix caches together hold; None: no limit."""
    cached = prefix_hits(trace, cache_tokens)
    shapes = [
        Shape(request.prompt_tokens, min(hit, request.prompt_tokens - 1), request.output_tokens)
        for request, hit in zip(trace.requests, cached, strict=True)
    ]
    at = [request.at_s for request in trace.requests]
    window_s = min(window_s, max(trace.seconds, 1e-3))
    prefill_rate, fullest = busiest(at, [shape.new_tokens for shape in shapes], window_s)
    decode_rate, _ = busiest(at, [shape.output_tokens for shape in shapes], window_s)
    mean_rate = len(shapes) / max(trace.seconds, 1e-3)
    notes = [
        f"{len(shapes)} requests in {trace.seconds:,.0f} s ({mean_rate:.2f}/s); busiest {window_s:g} s: prefill as at "
        f"{prefill_rate:.2f}/s, decode as at {decode_rate:.2f}/s; "
        f"{sum(cached) / sum(s.prompt_tokens for s in shapes):.1%} of prompt tokens hit"
    ]
    if arrival_cv2 is None:
        arrival_cv2, note = gaps_cv2(at[fullest])
        notes.append(note)
    by_work = sorted(shapes, key=lambda shape: (shape.new_tokens, shape.output_tokens))
    step = max(1, len(by_work) // _SHAPES)
    # Every step-th of a sorted list keeps the distribution; of the prompts exactly, of the answers nearly.
    return Workload(tuple(by_work[step // 2 :: step]), prefill_rate, decode_rate, arrival_cv2, tuple(notes))


def prefix_hits(trace: Trace, cache_tokens: int | None) -> list[int]:
    """Tokens of each request's prompt that earlier ones left behind, in one least-recently-used cache."""
    capacity = None if cache_tokens is None else cache_tokens // trace.block_tokens
    held: OrderedDict[int, None] = OrderedDict()
    hits = []
    for request in trace.requests:
        known = 0
        for block in request.blocks:
            if block not in held:
                break
            known += 1
        hits.append(min(known * trace.block_tokens, request.prompt_tokens))
        for block in reversed(request.blocks):  # the first block of a chain is the last to be evicted
            held[block] = None
            held.move_to_end(block)
        while capacity is not None and len(held) > capacity:
            held.popitem(last=False)
    return hits


def busiest(at_s: Sequence[float], work: Sequence[float], window_s: float) -> tuple[float, slice]:
    """The window that brought the most work: the rate of mean requests that would bring as much, and which came."""
    total = [0.0, *accumulate(work)]
    windows = [slice(first, bisect_right(at_s, start + window_s)) for first, start in enumerate(at_s)]
    fullest = max(windows, key=lambda window: total[window.stop] - total[window.start])
    return (total[fullest.stop] - total[fullest.start]) / window_s / fmean(work), fullest


def gaps_cv2(at_s: Sequence[float]) -> tuple[float, str]:
    """Squared coefficient of variation of the times between requests, at least 1; and what is to be said of it."""
    gaps = [later - earlier for earlier, later in pairwise(at_s)]
    if len(gaps) < 2 or not any(gaps):
        return 1.0, "too few moments to tell how requests clump: taken as Poisson"
    if len(set(at_s)) < len(at_s) / 2:
        return 1.0, "most requests share a time stamp: arrivals between the stamps are taken as Poisson"
    found = max(1.0, pvariance(gaps) / fmean(gaps) ** 2)
    return (
        found,
        f"gaps between requests have a coefficient of variation of {math.sqrt(found):.2g} in that time",
    )
