"""What the records of a run amount to."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from bench.serve.drive import Run
from bench.serve.server import Record
from bench.spread import percentile
from cluster.planner.slo import Slo

_SHARES = (0.5, 0.9, 0.99)
_MOMENTS = 200  # of the curve of requests in flight


def figures(run: Run, slo: Slo | None, warmup_s: float) -> dict[str, Any]:
    """Seconds and counts. Requests due before `warmup_s` are left out of everything but `warmup_requests`.

    Rates are over the time from the first measured request's due time to the last one's end.
    """
    start = run.began + warmup_s
    measured = [record for record in run.records if record.started >= start]
    good = [record for record in measured if not record.error]
    seconds = max((r.ended for r in measured), default=start) - min(
        (r.started for r in measured), default=start
    )
    seconds = max(seconds, 1e-9)
    prompt = sum(r.asked_prompt_tokens if r.prompt_tokens is None else r.prompt_tokens for r in good)
    output = sum(r.tokens for r in good)
    found: dict[str, Any] = {
        "requests": len(measured),
        "warmup_requests": len(run.records) - len(measured),
        "errors": len(measured) - len(good),
        "errors_by_kind": dict(Counter(r.kind for r in measured if r.error)),
        "first_error": next((r.error for r in measured if r.error), ""),
        "skipped_turns": run.skipped_turns,
        "ended_early": sum(r.tokens < r.asked_output_tokens for r in good),
        "seconds": seconds,
        "offered_requests_per_s": _offered(measured),
        "requests_per_s": len(good) / seconds,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "prompt_tokens_per_s": prompt / seconds,
        "output_tokens_per_s": output / seconds,
        "ttft_s": spread([r.ttft for r in good]),
        "tpot_s": spread([r.tpot for r in good if r.tokens > 1]),
        "itl_s": spread([gap for r in good for gap in r.gaps]),
        "e2e_s": spread([r.ended - r.started for r in good]),
        "late_s": spread([r.late for r in measured if r.sent]),
        "connect_s": spread([r.written - r.sent for r in measured if r.written]),
        "in_flight": in_flight(run.records, run.began),
        "most_in_flight": run.most_in_flight,
        "generator": {
            "cpu_s": run.cpu_s,
            "cpu_share": run.cpu_s / max(run.ended - run.began, 1e-9),
            "cpu_s_per_request": run.cpu_s / max(len(run.records), 1),
        },
    }
    if slo is not None:
        met = sum(slo.met(r.ttft, r.tpot, r.ended - r.started) for r in good)
        found["slo"] = slo.shown()
        found["goodput_requests_per_s"] = met / seconds
        found["goodput_share"] = (
            met / len(measured) if measured else 0.0
        )  # a request that failed has not met it
    return found


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """mean, p50, p90, p99, max; None when there is no value."""
    if not values:
        return None
    ordered = sorted(values)
    named = {f"p{share * 100:.0f}": percentile(ordered, share) for share in _SHARES}
    return {"mean": statistics.fmean(ordered)} | named | {"max": ordered[-1]}


def _offered(records: Sequence[Record]) -> float | None:
    """Requests per second as they were due; None for fewer than two moments."""
    due = [record.started for record in records]
    if not due or max(due) == min(due):
        return None
    return (len(due) - 1) / (max(due) - min(due))


def in_flight(records: Sequence[Record], began: float) -> dict[str, list[float]]:
    """How many were due and not ended at each of at most 200 moments, seconds from the start."""
    if not records:
        return {"at_s": [], "requests": []}
    last = max(record.ended for record in records) - began
    step = max(last / _MOMENTS, 1e-6)
    change = [0] * (_MOMENTS + 2)
    for record in records:
        change[_slot(record.started - began, step)] += 1
        change[_slot(record.ended - began, step)] -= 1
    counts = list(accumulate(change))[: _MOMENTS + 1]
    return {
        "at_s": [round(index * step, 6) for index in range(_MOMENTS + 1)],
        "requests": [float(c) for c in counts],
    }


def _slot(at_s: float, step: float) -> int:
    """The first moment that is not before `at_s`."""
    return min(max(math.ceil(at_s / step), 0), _MOMENTS + 1)


def each(run: Run) -> list[dict[str, Any]]:
    """Every request; times in seconds from the start of the run."""
    return [
        {
            "due_s": record.started - run.began,
            "sent_s": record.sent - run.began if record.sent else None,
            "ended_s": record.ended - run.began,
            "turn": record.turn,
            "prompt_tokens": record.prompt_tokens,
            "asked_prompt_tokens": record.asked_prompt_tokens,
            "output_tokens": record.tokens,
            "asked_output_tokens": record.asked_output_tokens,
            "arrivals_s": [arrival - run.began for arrival in record.arrivals],
            "error": record.error,
            "error_kind": record.kind,
        }
        for record in run.records
    ]
