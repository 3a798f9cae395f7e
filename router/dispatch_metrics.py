"""Names of the metrics of dispatch, discovery and the index."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from router.explain import Step
from router.prefix_index import PrefixIndex
from workers.protocol.messages import Planned

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class DispatchMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.queue_seconds = Histogram(
            "headrace_dispatch_queue_seconds",
            "Seconds from asking for a worker to having one.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.placements = Counter(
            "headrace_dispatch_placements",
            "Placements by how they ended: finished, cancelled, or the failure.",
            ["outcome"],
            registry=registry,
        )
        self.replacements = Counter(
            "headrace_dispatch_replacements",
            "Placements after the first of a request, because a worker or link failed under it.",
            registry=registry,
        )
        self.prefills = Counter(
            "headrace_dispatch_prefills",
            "Placements by where the prompt is computed: local (on the decode worker) or remote.",
            ["where"],
            registry=registry,
        )
        self._stage_seconds = Histogram(
            "headrace_dispatch_stage_seconds",
            "The way to a placement's first token, in stages: queue, choose, reserve and first_token follow each other; "
            "prefill_queue, prefill and transfer are parts of first_token. `where` the prompt is computed.",
            ["stage", "where"],
            buckets=(0.0001, 0.00025, 0.0005, *_SECONDS),
            registry=registry,
        )
        self.transfer_seconds = Histogram(
            "headrace_dispatch_transfer_seconds",
            "Seconds from the end of prefill to the last block acknowledged by the decode worker.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.transfer_bytes = Counter(
            "headrace_dispatch_transfer_bytes",
            "Bytes of KV blocks handed over.",
            ["channel"],
            registry=registry,
        )
        self.late_messages = Counter(
            "headrace_dispatch_late_messages",
            "Messages of workers for requests that had already gone elsewhere.",
            registry=registry,
        )
        self.waiting = Gauge("headrace_dispatch_waiting", "Requests that wait for room.", registry=registry)
        self._tenant_waiting = Gauge(
            "headrace_tenant_waiting", "Requests that wait for room.", ["tenant"], registry=registry
        )
        self._tenant_queue_seconds = Histogram(
            "headrace_tenant_queue_seconds",
            "Seconds in the line, of requests that were placed.",
            ["tenant"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("headrace_dispatch_in_flight", "Requests not yet ended.", registry=registry)
        self.index_blocks = Gauge(
            "headrace_index_blocks", "Distinct block hashes in the prefix index.", registry=registry
        )
        self.index_approximate = Gauge(
            "headrace_index_approximate",
            "1 while the index rests on what was known before Redis went away and on own placements.",
            registry=registry,
        )
        self.index_guesses = Gauge(
            "headrace_index_guesses",
            "Blocks that workers are only guessed to hold, in approximate mode.",
            registry=registry,
        )
        self.planner_replicas = Gauge(
            "headrace_planner_replicas",
            "Workers of each pool: wanted by the planner, present, draining.",
            ["pool", "kind"],
            registry=registry,
        )
        self.planner_apply = Gauge(
            "headrace_planner_apply", "1 where the planner resizes pools itself.", registry=registry
        )
        self.gaps = Counter(
            "headrace_index_gaps", "Lost batches noticed in the index log.", registry=registry
        )
        self.snapshots = Counter("headrace_index_snapshots", "Snapshots of workers read.", registry=registry)

    def waiting_of(self, tenant: str, count: Callable[[str], int]) -> None:
        """Tenants are those of the configuration: label values stay few."""
        self._tenant_waiting.labels(tenant).set_function(lambda: count(tenant))

    def waited(self, tenant: str, seconds: float) -> None:
        self._tenant_queue_seconds.labels(tenant).observe(seconds)

    def stages(self, step: Step) -> None:
        """Of a placement that came to its first token."""
        if step.times.first_token is not None:
            where = "local" if step.local else "remote"
            for stage, seconds in step.seconds():
                self._stage_seconds.labels(stage, where).observe(seconds)

    def observe_planned(self, planned: Planned | None) -> None:
        self.planner_apply.set(1 if planned is not None and planned.apply else 0)
        self.planner_replicas.clear()
        if planned is None:
            return
        for kind in ("sizes", "present", "draining"):
            for pool, count in getattr(planned, kind).items():
                self.planner_replicas.labels(pool, "wanted" if kind == "sizes" else kind).set(count)

    def observe_index(self, index: PrefixIndex, approximate: bool) -> None:
        self.index_blocks.set(len(index))
        self.index_approximate.set(1 if approximate else 0)
        self.index_guesses.set(sum(map(index.num_guesses, index.workers())))


@cache
def default_metrics() -> DispatchMetrics:
    """Those of this process, in prometheus_client's own registry."""
    return DispatchMetrics(REGISTRY)
