"""Counters and histograms of our own against prometheus_client's: the same text for the same observations."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from router.tally import Counts, Distributions

BOUNDS = (0.001, 0.5, 1, 2.5, 80)


def exposed(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", 'b"\\']), st.sampled_from([*BOUNDS, 0.0, 0.75, 81.0, -1.0])),
        max_size=30,
    )
)
def test_a_histogram_reads_like_prometheus_own(observed: list[tuple[str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    distributions = Distributions("x_seconds", "Some text", "model_name", BOUNDS, ours)
    histogram = Histogram("x_seconds", "Some text", ["model_name"], buckets=BOUNDS, registry=theirs)
    for label, value in observed:
        distributions.labels(label).observe(value)
        histogram.labels(label).observe(value)
    assert exposed(ours) == exposed(theirs)


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 1000)), max_size=30))
def test_a_counter_reads_like_prometheus_own(counted: list[tuple[str, int]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counts = Counts("x_tokens", "Some text", "model_name", ours)
    counter = Counter("x_tokens", "Some text", ["model_name"], registry=theirs)
    for label, count in counted:
        counts.labels(label).inc(count)
        counter.labels(label).inc(count)
    assert exposed(ours) == exposed(theirs)
