"""Metrics of a worker process: the one place that knows their names. Routers gather the text over the token plane."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from workers.engine.request import Request
from workers.experts.group import GroupStatus
from workers.gpu.graphs import Captured
from workers.prefix_loader import Loaded
from workers.protocol.messages import Load, PrefillDone
from workers.tiers.stats import TierStats

_LABELS = ("worker", "role", "model_name")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class WorkerMetrics:
    def __init__(self, worker: str, role: str, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._values = (worker, role, model_name)
        self._queue = self._histogram("headrace_queue_seconds", "from arrival to the first scheduled token")
        self._prefill = self._histogram(
            "headrace_prefill_seconds", "from the first scheduled to the first new token"
        )
        self._transfer = self._histogram(
            "headrace_transfer_seconds", "prefill side: from the end of computing to the last acknowledgement"
        )
        self._ticket = self._histogram(
            "headrace_ticket_seconds",
            "decode side: from the ticket to its commit (queue, prefill and transfer)",
        )
        self._decode = self._histogram(
            "headrace_decode_seconds", "from the first token of a request to its last"
        )
        self._step = self._histogram("headrace_step_seconds", "one step of the engine")
        self._sent_bytes = self._counter("headrace_transfer_sent_bytes", "KV bytes sent and acknowledged")
        self._received_bytes = self._counter("headrace_transfer_received_bytes", "KV bytes committed")
        self._finished = Counter(
            "headrace_worker_requests",
            "requests that ended here, by how",
            (*_LABELS, "outcome"),
            registry=self.registry,
        )

        from_where = (*_LABELS, "source")
        self._load_seconds = Histogram(
            "headrace_prefix_load_seconds",
            "one read of prefix blocks from one place: host, disk, or another worker",
            from_where,
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._load_tokens = Counter(
            "headrace_prefix_load_tokens",
            "prompt tokens loaded instead of computed",
            from_where,
            registry=self.registry,
        )
        self._load_bytes = Counter(
            "headrace_prefix_load_bytes", "KV bytes loaded", from_where, registry=self.registry
        )
        self._load_failures = Counter(
            "headrace_prefix_load_failures", "reads that failed", from_where, registry=self.registry
        )

    def _histogram(self, name: str, text: str) -> Histogram:
        metric = Histogram(name, text, _LABELS, registry=self.registry, buckets=_SECONDS)
        return metric.labels(*self._values)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _LABELS, registry=self.registry).labels(*self._values)

    def watch(self, load: Callable[[], Load], num_blocks: int) -> None:
        """Gauges that are read when somebody asks for them."""
        self.registry.register(_LoadCollector(load, num_blocks, self._values))

    def watch_tiers(self, stats: Callable[[], Mapping[str, TierStats]], block_bytes: int) -> None:
        """The same for the tiers below the device."""
        self.registry.register(_TierCollector(stats, block_bytes, self._values))

    def watch_experts(self, status: Callable[[], GroupStatus]) -> None:
        """The same for the group of ranks among which experts are spread."""
        self.registry.register(_GroupCollector(status, self._values))

    def loaded(self, loaded: Loaded, num_tokens: int, num_bytes: int) -> None:
        values = (*self._values, loaded.source)
        self._load_seconds.labels(*values).observe(loaded.seconds)
        self._load_tokens.labels(*values).inc(num_tokens)
        self._load_bytes.labels(*values).inc(num_bytes)
        if loaded.failed:
            self._load_failures.labels(*values).inc()

    def engine(self, kernels: str, weights: str, kv_cache: str) -> None:
        """What computes, on what: "torch" on a CPU says that the native kernels could not be had."""
        info = Gauge(
            "headrace_engine_info",
            "1; the labels say what computes, and in which formats",
            (*_LABELS, "kernels", "weights", "kv_cache"),
            registry=self.registry,
        )
        info.labels(*self._values, kernels, weights, kv_cache).set(1)

    def graphs(self, captured: Captured) -> None:
        """CUDA graphs, made once."""
        for name, text, value in (
            ("headrace_cuda_graphs", "sizes of steps that are launched whole", len(captured.graphs)),
            ("headrace_cuda_graph_capture_seconds", "what it took to capture them", captured.seconds),
            ("headrace_cuda_graph_bytes", "GPU memory that they take", captured.num_bytes),
        ):
            Gauge(name, text, _LABELS, registry=self.registry).labels(*self._values).set(value)

    def step(self, seconds: float) -> None:
        self._step.observe(seconds)

    def prefilled(self, done: PrefillDone) -> None:
        self._queue.observe(done.queue_s)
        self._prefill.observe(done.prefill_s)
        self._transfer.observe(done.transfer_s)
        self._sent_bytes.inc(done.transfer_bytes)
        self._outcome("prefilled")

    def received(self, seconds: float, num_bytes: int) -> None:
        self._ticket.observe(seconds)
        self._received_bytes.inc(num_bytes)

    def finished(self, request: Request) -> None:
        times = request.times
        if times.scheduled < times.prefilled:  # prefilled here, not committed from a prefill worker
            self._queue.observe(times.scheduled - times.arrived)
            self._prefill.observe(times.prefilled - times.scheduled)
        self._decode.observe(times.last_token - times.prefilled)
        self._outcome(request.finish_reason or "unknown")

    def failed(self, code: str) -> None:
        self._outcome(code)

    def _outcome(self, outcome: str) -> None:
        self._finished.labels(*self._values, outcome).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _LoadCollector(Collector):
    def __init__(self, load: Callable[[], Load], num_blocks: int, values: tuple[str, ...]) -> None:
        self._load = load
        self._num_blocks = num_blocks
        self._values = values

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        gauges = {
            "headrace_requests_running": ("requests in the batch", load.running),
            "headrace_requests_waiting": ("requests that wait to be scheduled", load.waiting),
            "headrace_requests_reserved": ("tickets given and not committed", load.reserved),
            "headrace_requests_sending": ("hand-overs that are open", load.sending),
            "headrace_kv_blocks": ("KV blocks of the worker", self._num_blocks),
            "headrace_kv_blocks_used": ("KV blocks that a request holds", load.active_blocks),
            "headrace_kv_blocks_cached": ("distinct prefix blocks held", load.cached_blocks),
            "headrace_kv_usage_ratio": ("used share of the KV blocks", load.active_blocks / self._num_blocks),
        }
        counters = {
            "headrace_prefix_hit_tokens": ("prompt tokens found in the prefix cache", load.prefix_hit_tokens),
            "headrace_prefix_query_tokens": ("prompt tokens looked up", load.prefix_query_tokens),
            "headrace_computed_prompt_tokens": ("prompt tokens computed", load.prompt_tokens),
            "headrace_output_tokens": ("tokens sampled", load.output_tokens),
            "headrace_drafted_tokens": ("tokens guessed by speculation and verified", load.drafted_tokens),
            "headrace_accepted_tokens": ("guessed tokens that were right", load.accepted_tokens),
            "headrace_preemptions": ("requests whose blocks were taken away", load.preemptions),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            gauge.add_metric(self._values, value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            counter.add_metric(self._values, value)
            yield counter


class _GroupCollector(Collector):
    def __init__(self, status: Callable[[], GroupStatus], values: tuple[str, ...]) -> None:
        self._status, self._values = status, values

    def collect(self) -> Iterable[Metric]:
        status = self._status()
        gauges: dict[str, tuple[str, float]] = {
            "headrace_expert_group_members": (
                "ranks that this one computes with, itself included",
                len(status.members),
            ),
            "headrace_expert_group_view": ("grows when a rank is lost or comes", status.view),
            "headrace_expert_group_version": ("of the placement of experts in use", status.version),
            "headrace_expert_group_stranded": (
                "1: the ranks that are there can't hold all experts",
                status.lacking != "",
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            gauge.add_metric(self._values, value)
            yield gauge


class _TierCollector(Collector):
    def __init__(
        self, stats: Callable[[], Mapping[str, TierStats]], block_bytes: int, values: tuple[str, ...]
    ) -> None:
        self._stats = stats
        self._block_bytes = block_bytes
        self._values = values

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        gauges: dict[str, tuple[str, Callable[[TierStats], float]]] = {
            "headrace_tier_blocks": ("KV blocks held", lambda s: s.blocks),
            "headrace_tier_capacity_blocks": ("KV blocks that find place", lambda s: s.capacity_blocks),
            "headrace_tier_active": ("0: the tier has switched itself off", lambda s: float(s.active)),
        }
        counters: dict[str, tuple[str, Callable[[TierStats], float]]] = {
            "headrace_tier_stored_bytes": (
                "copied or written",
                lambda s: s.stored_blocks * self._block_bytes,
            ),
            "headrace_tier_dropped_blocks": (
                "not kept, for want of room or time",
                lambda s: s.dropped_blocks,
            ),
            "headrace_tier_errors": ("spoilt files and failures of the disk", lambda s: s.errors),
        }
        labels = (*_LABELS, "tier")
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=labels)
            for tier, of_tier in stats.items():
                gauge.add_metric((*self._values, tier), value(of_tier))
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=labels)
            for tier, of_tier in stats.items():
                counter.add_metric((*self._values, tier), value(of_tier))
            yield counter
