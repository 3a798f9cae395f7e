"""Every metric of the router's ways in, under its name. No other file of the router's front knows a metric's name.

`headrace_http_*` counts HTTP responses, `headrace_request_*` measures requests for generation, whichever way they came
in. Dashboards and gateways look for vLLM's names: those are the same numbers again, renamed when they are read.
Times are in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from router.admission.quota import Permit
from router.tally import Counts, Distributions

_TTFT_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
_E2E_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_PREPARE_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)

# Gauges of workers that gateways and dashboards know under vLLM's names, with the worker as `engine`.
VLLM_NAMES_OF_WORKERS = {
    "headrace_requests_running": "vllm:num_requests_running",
    "headrace_requests_waiting": "vllm:num_requests_waiting",
    "headrace_kv_usage_ratio": "vllm:kv_cache_usage_perc",
}

# Outcomes of a request that was answered in full, as vLLM counts them.
_SUCCESSES = ("stop", "length")


class RouterMetrics:
    """One per router process, with a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._series: dict[tuple[str, str], _Series] = {}
        self._responses = Counter(
            "headrace_http_responses", "HTTP responses", ["route", "status"], registry=registry
        )
        self._outcomes = Counter(
            "headrace_request_outcomes",
            "Requests by how they ended: stop, length, cancelled, or the kind of error",
            ["model_name", "api", "outcome"],
            registry=registry,
        )
        self._in_flight = Gauge(
            "headrace_request_in_flight", "Requests being served", ["model_name", "api"], registry=registry
        )
        self._e2e = _histogram(
            "e2e_seconds", "From the request's arrival to its last byte", _E2E_BUCKETS, registry
        )
        self._ttft = _histogram(
            "ttft_seconds", "From the request's arrival to its first token", _TTFT_BUCKETS, registry
        )
        self._itl = _histogram(
            "inter_token_seconds", "Between two chunks of tokens of a stream", _TOKEN_BUCKETS, registry
        )
        self._tpot = _histogram(
            "time_per_output_token_seconds",
            "Mean of a sequence after its first token",
            _TOKEN_BUCKETS,
            registry,
        )
        self._prepare = _histogram(
            "prepare_seconds",
            "In the router before dispatch: validation, template, tokenizer",
            _PREPARE_BUCKETS,
            registry,
        )
        self._prompt_tokens = _counter(
            "prompt_tokens", "Prompt tokens of requests that got a first token", registry
        )
        self._cached_tokens = _counter(
            "cached_tokens", "Prompt tokens that no worker had to compute", registry
        )
        self._generation_tokens = _counter("generation_tokens", "Tokens generated", registry)
        self._refusals = Counter(
            "headrace_tenant_refusals",
            "Requests turned away or given up by admission: the tenant's limits, the queue, deadlines",
            ["tenant", "reason"],
            registry=registry,
        )
        self._tenant_tokens = Counter(
            "headrace_tenant_tokens",
            "Tokens by tenant, as its limits count them",
            ["tenant", "kind"],
            registry=registry,
        )
        self._scrape_errors = Counter(
            "headrace_http_worker_metrics_errors", "Worker metrics that could not be read", registry=registry
        )
        for name, source in {
            "vllm:e2e_request_latency_seconds": self._e2e,
            "vllm:time_to_first_token_seconds": self._ttft,
            "vllm:inter_token_latency_seconds": self._itl,
            "vllm:request_time_per_output_token_seconds": self._tpot,
            "vllm:prompt_tokens": self._prompt_tokens,
            "vllm:generation_tokens": self._generation_tokens,
        }.items():
            registry.register(_Renamed(name, source))
        registry.register(_Successes("vllm:request_success", self._outcomes))

    def response(self, route: str, status: int) -> None:
        """`route` is a route's template, never a client's path: label values stay few."""
        self._responses.labels(route, str(status)).inc()

    def scrape_error(self) -> None:
        self._scrape_errors.inc()

    def refused(self, tenant: str, reason: str) -> None:
        """`tenant` is one of the configured, `reason` that of the error: label values stay few."""
        self._refusals.labels(tenant, reason).inc()

    def used(self, tenant: str, permit: Permit) -> None:
        """Of a request that was settled."""
        self._tenant_tokens.labels(tenant, "prompt").inc(permit.used_prompt_tokens)
        self._tenant_tokens.labels(tenant, "answer").inc(permit.used_answer_tokens)

    def request(self, model_name: str, api: str, arrived: float) -> RequestRecord:
        """`arrived`: time.perf_counter() when the request came in."""
        key = (model_name, api)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series(self, model_name, api)
        return RequestRecord(series, arrived)


class _Series:
    """The series of one model and API. Looking them up by label costs more than counting in them."""

    def __init__(self, metrics: RouterMetrics, model_name: str, api: str) -> None:
        self.in_flight = metrics._in_flight.labels(model_name, api)
        self.e2e = metrics._e2e.labels(model_name)
        self.ttft = metrics._ttft.labels(model_name)
        self.itl = metrics._itl.labels(model_name)
        self.tpot = metrics._tpot.labels(model_name)
        self.prepare = metrics._prepare.labels(model_name)
        self.prompt_tokens = metrics._prompt_tokens.labels(model_name)
        self.cached_tokens = metrics._cached_tokens.labels(model_name)
        self.generation_tokens = metrics._generation_tokens.labels(model_name)
        self._outcomes = metrics._outcomes
        self._labels = (model_name, api)

    def outcome(self, outcome: str) -> None:
        self._outcomes.labels(*self._labels, outcome).inc()


class RequestRecord:
    """Measures one request. `end` is called exactly once, whatever happens."""

    def __init__(self, series: _Series, arrived: float) -> None:
        self.series = series
        self.arrived = arrived
        self.has_token = False
        series.in_flight.inc()

    def prepared(self) -> None:
        """The request is handed to the dispatcher."""
        self.series.prepare.observe(time.perf_counter() - self.arrived)

    def sequence(self, prompt_tokens: int) -> SequenceRecord:
        """Of the sequences with one prompt, one carries `prompt_tokens`, the others 0: it is counted once."""
        return SequenceRecord(self, prompt_tokens)

    def end(self, outcome: str) -> None:
        self.series.in_flight.dec()
        self.series.outcome(outcome)
        self.series.e2e.observe(time.perf_counter() - self.arrived)


class SequenceRecord:
    """Measures the tokens of one sequence."""

    __slots__ = ("_first", "_last", "_num_tokens", "_prompt_tokens", "_request", "_series")

    def __init__(self, request: RequestRecord, prompt_tokens: int) -> None:
        self._request = request
        self._series = request.series
        self._prompt_tokens = prompt_tokens
        self._first = 0.0
        self._last = 0.0
        self._num_tokens = 0

    def tokens(self, count: int, cached_tokens: int) -> None:
        """A chunk has come."""
        if not count:
            return  # it only says how the sequence ended
        now = time.perf_counter()
        if self._num_tokens:
            self._series.itl.observe(now - self._last)
        else:
            self._first_tokens(now, cached_tokens)
        self._last = now
        self._num_tokens += count
        self._series.generation_tokens.inc(count)

    def end(self) -> None:
        if self._num_tokens > 1:
            self._series.tpot.observe((self._last - self._first) / (self._num_tokens - 1))

    def _first_tokens(self, now: float, cached_tokens: int) -> None:
        self._first = now
        if not self._request.has_token:
            self._request.has_token = True
            self._series.ttft.observe(now - self._request.arrived)
        if self._prompt_tokens:
            self._series.prompt_tokens.inc(self._prompt_tokens)
            self._series.cached_tokens.inc(cached_tokens)


def _histogram(
    name: str, text: str, buckets: tuple[float, ...], registry: CollectorRegistry
) -> Distributions:
    return Distributions(f"headrace_request_{name}", text, "model_name", buckets, registry)


def _counter(name: str, text: str, registry: CollectorRegistry) -> Counts:
    return Counts(f"headrace_request_{name}", text, "model_name", registry)


class _Renamed(Collector):
    """A metric again, under another name."""

    def __init__(self, name: str, source: Collector) -> None:
        self._name = name
        self._source = source

    def collect(self) -> Iterator[Metric]:
        for family in self._source.collect():
            renamed = Metric(self._name, family.documentation, family.type)
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    renamed.samples.append(
                        sample._replace(name=self._name + sample.name.removeprefix(family.name))
                    )
            yield renamed


class _Successes(Collector):
    """Outcomes of requests answered in full, over all APIs, as vLLM's counter by finished_reason."""

    def __init__(self, name: str, outcomes: Counter) -> None:
        self._name = name
        self._outcomes = outcomes

    def collect(self) -> Iterator[Metric]:
        totals: dict[tuple[str, str], float] = {}
        for family in self._outcomes.collect():
            for sample in family.samples:
                outcome = sample.labels["outcome"]
                if sample.name.endswith("_total") and outcome in _SUCCESSES:
                    key = (sample.labels["model_name"], outcome)
                    totals[key] = totals.get(key, 0.0) + sample.value
        family = CounterMetricFamily(
            self._name, "Requests answered in full", labels=["model_name", "finished_reason"]
        )
        for key, total in totals.items():
            family.add_metric(key, total)
        yield family
