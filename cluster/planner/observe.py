"""From what routers and workers tell of themselves to an Observation. Pure: texts in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from cluster.planner.decide import DecodeSeen, Observation, PrefillSeen
from workers.protocol.messages import Role

# What is counted since a worker's start, by its name in the metrics.
COUNTERS = (
    "headrace_step_seconds_sum",
    "headrace_step_seconds_count",
    "headrace_queue_seconds_sum",
    "headrace_queue_seconds_count",
    "headrace_prefill_seconds_sum",
    "headrace_prefill_seconds_count",
    "headrace_computed_prompt_tokens_total",
    "headrace_output_tokens_total",
)


@dataclass(frozen=True, slots=True)
class WorkerLook:
    """One worker at one moment."""

    role: Role
    epoch: int
    taking: bool  # it takes new work
    queued_prefill_tokens: int
    kv_used: int
    kv_total: int
    counted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Look:
    """The cluster at one moment."""

    at: float
    workers: Mapping[str, WorkerLook]
    queue: int  # requests that wait in the router for room


@dataclass(frozen=True, slots=True)
class Census:
    """Workers of a pool as the supervisor has them."""

    present: int  # running or starting
    draining: int = 0


def look(
    at: float, status: Mapping[str, Any], samples: Sequence[tuple[str, Mapping[str, str], float]]
) -> Look:
    """`status`: of GET /cluster; `samples`: (name, labels, value) of GET /metrics."""
    counted: dict[str, dict[str, float]] = {}
    for name, labels, value in samples:
        if name in COUNTERS and "worker" in labels:
            counted.setdefault(labels["worker"], {})[name] = value
    workers = {}
    for entry in status.get("workers") or ():
        name = str(entry["worker_id"])
        blocks = entry.get("blocks") or {}
        workers[name] = WorkerLook(
            role="prefill" if entry.get("role") == "prefill" else "decode",
            epoch=int(entry.get("epoch", 0)),
            taking=entry.get("state") == "up",
            queued_prefill_tokens=int(entry.get("queued_prefill_tokens", 0)),
            kv_used=int(blocks.get("used", 0)),
            kv_total=int(blocks.get("total", 0)),
            counted=counted.get(name, {}),
        )
    return Look(at, workers, int(status.get("queue", 0)))


def observe(looks: Sequence[Look], census: Mapping[Role, Census]) -> Observation | None:
    """What happened between the first look and the last. None: there is nothing to tell yet."""
    if len(looks) < 2 or looks[-1].at <= looks[0].at:
        return None
    seconds = looks[-1].at - looks[0].at
    decode = _Sums.of(looks, "decode")
    steps = decode.of_counter("headrace_step_seconds_count")
    blocks = [one for entry in looks for one in entry.workers.values() if one.role == "decode"]
    total = sum(one.kv_total for one in blocks)
    tokens = decode.of_counter("headrace_output_tokens_total")
    seen = DecodeSeen(
        workers=census["decode"].present,
        draining=census["decode"].draining,
        tokens_per_s=tokens / seconds,
        batch=tokens / steps if steps else 0.0,
        step_s=decode.of_counter("headrace_step_seconds_sum") / steps if steps else 0.0,
        kv_used=sum(one.kv_used for one in blocks) / total if total else 0.0,
        waiting=fmean(entry.queue for entry in looks),
    )
    prefill = None
    if "prefill" in census and census["prefill"].present:
        prefill = _prefill(looks, census["prefill"], seconds)
    return Observation(seen, prefill)


def _prefill(looks: Sequence[Look], census: Census, seconds: float) -> PrefillSeen:
    sums = _Sums.of(looks, "prefill")
    busy = sums.of_counter("headrace_step_seconds_sum")
    served = sums.of_counter("headrace_prefill_seconds_count")
    waited = sums.of_counter("headrace_queue_seconds_count")
    computed = sums.of_counter("headrace_computed_prompt_tokens_total")
    queued = sum(one.queued_prefill_tokens for one in looks[-1].workers.values() if one.role == "prefill")
    return PrefillSeen(
        workers=census.present,
        draining=census.draining,
        busy=busy / seconds,
        arrivals_per_s=served / seconds,
        # Computing time of a prompt: several may be in one step, so their own times overlap.
        service_s=busy / served if served else 0.0,
        wait_s=sums.of_counter("headrace_queue_seconds_sum") / waited if waited else 0.0,
        backlog_s=queued * busy / computed if computed else 0.0,
    )


@dataclass(frozen=True, slots=True)
class _Sums:
    """How far each counter of a pool went between the first look and the last; a new life counts from zero."""

    grown: Mapping[str, float]

    @classmethod
    def of(cls, looks: Sequence[Look], role: Role) -> _Sums:
        grown = dict.fromkeys(COUNTERS, 0.0)
        before: dict[str, WorkerLook] = {}
        for entry in looks:
            for name, worker in entry.workers.items():
                if worker.role != role or not worker.counted:
                    continue
                last = before.get(name)
                if last is not None:
                    same = last.epoch == worker.epoch
                    for counter, value in worker.counted.items():
                        grown[counter] += max(value - (last.counted.get(counter, 0.0) if same else 0.0), 0.0)
                elif name not in looks[0].workers:
                    for counter, value in worker.counted.items():  # it came after the first look
                        grown[counter] += value
                before[name] = worker
        return cls(grown)

    def of_counter(self, name: str) -> float:
        return self.grown[name]
