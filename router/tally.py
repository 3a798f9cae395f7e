"""Counters and histograms for what happens with every token: written by one thread, without locks, read by any.

prometheus_client's own take a lock, check names and walk the buckets, which is more than all else that a token costs
there. A reader may see a sum that is one observation ahead of the buckets.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Count:
    """One series of a counter."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, by: float = 1.0) -> None:
        self.value += by


class Distribution:
    """One series of a histogram."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # of each bucket alone; the last has no bound
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Counts(Collector):
    """A counter, by one label."""

    def __init__(self, name: str, text: str, label: str, registry: CollectorRegistry) -> None:
        self._name, self._text, self._label = name, text, label
        self._series: dict[str, Count] = {}
        registry.register(self)

    def labels(self, value: str) -> Count:
        return self._series.setdefault(value, Count())

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=[self._label])
        for label, count in list(self._series.items()):
            family.add_metric([label], count.value)
        yield family


class Distributions(Collector):
    """A histogram, by one label."""

    def __init__(
        self, name: str, text: str, label: str, bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name, self._text, self._label = name, text, label
        self._bounds = tuple(bounds)
        self._series: dict[str, Distribution] = {}
        registry.register(self)

    def labels(self, value: str) -> Distribution:
        return self._series.setdefault(value, Distribution(self._bounds))

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label])
        names = [*map(_bucket_name, self._bounds), "+Inf"]
        for label, series in list(self._series.items()):
            buckets, total = [], 0
            for name, count in zip(names, list(series.counts), strict=True):
                total += count
                buckets.append((name, total))
            family.add_metric([label], buckets, series.sum)
        yield family


def _bucket_name(bound: float) -> str:
    """As prometheus_client writes it, so that series go on when one kind of histogram takes another's place."""
    name: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
    return name
