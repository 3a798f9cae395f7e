"""What a run amounts to. Nothing in it depends on the machine that simulated it, `measured` apart."""

from __future__ import annotations

import resource
import statistics
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.simulate.cluster import Cluster, ClusterConfig
from bench.simulate.jobs import Asked, Job
from bench.simulate.traces import endless_tokens
from bench.simulate.worker import Worker
from bench.spread import percentile
from router.prefix_index import PrefixIndex
from workers.protocol.hashes import HASH_BYTES
from workers.protocol.tiers import DEVICE

_DIGITS = 6


@dataclass(frozen=True)
class Slo:
    ttft_s: float = 5.0
    tpot_s: float = 0.2

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")

    def is_met(self, job: Job) -> bool:
        return job.outcome == "finished" and job.ttft_s <= self.ttft_s and job.tpot_s <= self.tpot_s


def summary(cluster: Cluster, slo: Slo) -> dict[str, Any]:
    """Ready for JSON."""
    config, jobs = cluster.config, cluster.jobs
    finished = [job for job in jobs if job.outcome == "finished"]
    outcomes: dict[str, int] = {}
    for job in jobs:
        outcomes[job.outcome] = outcomes.get(job.outcome, 0) + 1
    began = min(job.arrived_s for job in jobs)
    span_s = max(job.ended_s for job in jobs) - began
    prompt = sum(job.asked.prompt_tokens for job in finished)
    cached = sum(job.cached_tokens for job in finished)
    oracle = sum(job.oracle_tokens for job in finished)
    endless = sum(endless_tokens([job.asked for job in jobs], config.limits.block_size))
    lives = [*cluster.past, *cluster.workers]
    found = {
        "requests": outcomes,
        "seconds": span_s,
        "requests_per_s": len(finished) / span_s,
        "output_tokens_per_s": sum(job.asked.output_tokens for job in finished) / span_s,
        "ttft_s": _spread([job.ttft_s for job in finished]),
        "tpot_s": _spread([job.tpot_s for job in finished if job.asked.output_tokens > 1]),
        "e2e_s": _spread([job.e2e_s for job in finished]),
        "queue_s": _spread([job.placed_s - job.arrived_s for job in finished]),
        "slo": asdict(slo),
        "goodput_share": sum(map(slo.is_met, jobs)) / len(jobs),
        "goodput_per_s": sum(map(slo.is_met, jobs)) / span_s,
        "hits": {
            "share_of_prompt": cached / prompt if prompt else 0.0,
            "fetched_share_of_prompt": sum(j.fetched_tokens for j in finished) / prompt if prompt else 0.0,
            "oracle_share_of_prompt": oracle / prompt if prompt else 0.0,
            "share_of_oracle": cached / oracle if oracle else 1.0,
            "endless_share_of_prompt": endless / sum(job.asked.prompt_tokens for job in jobs),
        },
        "balance": {
            role: _balance(cluster, role, span_s) for role in ("prefill", "decode") if _has(cluster, role)
        },
        "computed_prompt_tokens": sum(worker.prompt_tokens for worker in lives),
        "sampled_tokens": sum(worker.output_tokens for worker in lives),
        "preemptions": sum(worker.preemptions for worker in lives),
        "replaced": sum(job.failures > 0 for job in jobs),
        "moved_bytes": cluster.network.num_bytes,
        "index": {
            "batches": sum(publisher.num_batches for publisher in cluster.publishers.values()),
            "snapshots": sum(router.num_snapshots for router in cluster.routers),
            "hashes": max(len(router.index) for router in cluster.routers),
        },
        "events": cluster.timeline.num_events,
        "over_time": {
            name: [getattr(sample, name) for sample in _thinned(cluster)]
            for name in ("at_s", "line", "waiting", "running", "used_blocks")
        },
    }
    return {key: _rounded(value) for key, value in found.items()}


def least_ttfts_s(trace: Sequence[Asked], config: ClusterConfig) -> list[float]:
    """Seconds to compute what one endless cache would leave of each prompt, on a worker with nothing else to do: no
    placement gives a shorter TTFT."""
    cost, chunk = config.cost, (config.prefill_limits or config.limits).max_num_batched_tokens
    found = []
    for asked, saved in zip(trace, endless_tokens(trace, config.limits.block_size), strict=True):
        seconds = 0.0
        for start in range(saved, asked.prompt_tokens, chunk):
            count = min(chunk, asked.prompt_tokens - start)
            seconds += cost.step_s(count, count * (start + count / 2), 0, 0)
        found.append(seconds)
    return found


def measured(cluster: Cluster, wall_s: float, cpu_s: float) -> dict[str, Any]:
    """What depends on this machine."""
    decisions = sorted(s for router in cluster.routers for s in router.decision_s)
    found = {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "decisions": len(decisions),
        "decision_us": {
            "p50": percentile(decisions, 0.5) * 1e6,
            "p99": percentile(decisions, 0.99) * 1e6,
            "mean": statistics.fmean(decisions) * 1e6,
        },
        "index_mib": index_bytes(cluster.workers) / 2**20,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    return {key: _rounded(value) for key, value in found.items()}


def index_bytes(workers: Sequence[Worker]) -> int:
    """Memory of an index of what these hold: one is made under a watch, the names of blocks counted beside."""
    caches = [(worker.worker_id, worker.pool.cached_hashes()) for worker in workers]
    tracemalloc.start()
    try:
        index = PrefixIndex()
        for worker_id, cache in caches:
            index.load_snapshot(worker_id, 1, 1, ((name, DEVICE) for name, _ in cache))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return held + len(index) * sys.getsizeof(bytes(HASH_BYTES))


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return (
        {"mean": statistics.fmean(ordered)}
        | {name: percentile(ordered, share) for name, share in shares.items()}
        | {"max": ordered[-1]}
    )


def _has(cluster: Cluster, role: str) -> bool:
    return any(worker.role == role for worker in cluster.workers)


def _balance(cluster: Cluster, role: str, span_s: float) -> dict[str, float]:
    """By worker, its lives together."""
    busy: dict[str, float] = {}
    for worker in (*cluster.past, *cluster.workers):
        if worker.role == role:
            busy[worker.worker_id] = busy.get(worker.worker_id, 0.0) + worker.busy_s
    mean = statistics.fmean(busy.values())
    return {
        "busy_share": mean / span_s,
        "max_over_mean": max(busy.values()) / mean if mean else 1.0,
    }


def _thinned(cluster: Cluster) -> Sequence[Any]:
    return cluster.samples[:: max(len(cluster.samples) // 150, 1)]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return value
