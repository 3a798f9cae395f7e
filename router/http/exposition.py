"""Joins Prometheus expositions: the router's own metrics and each worker's, one HELP and TYPE per name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from router.metrics import VLLM_NAMES_OF_WORKERS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def merge(
    registries: list[CollectorRegistry], expositions: list[bytes], unreadable: Callable[[], None]
) -> bytes:
    """`unreadable` is called for each exposition that cannot be parsed; the others are shown all the same."""
    parsed: list[Metric] = []
    for exposition in expositions:
        try:
            parsed += list(text_string_to_metric_families(exposition.decode()))
        except ValueError:  # not UTF-8, or not in Prometheus' format
            unreadable()
    families: dict[str, Metric] = {}
    for registry in registries:  # after `unreadable`, which counts in one of them
        _add(families, registry.collect())
    _add(families, parsed)
    _add(families, [_vllm_family(families[name]) for name in VLLM_NAMES_OF_WORKERS if name in families])
    return generate_latest(_Merged(families.values()))


def _add(families: dict[str, Metric], added: Iterable[Metric]) -> None:
    for family in added:
        known = families.get(family.name)
        if known is None:
            families[family.name] = known = Metric(family.name, family.documentation, family.type)
        known.samples.extend(family.samples)


def _vllm_family(family: Metric) -> Metric:
    name = VLLM_NAMES_OF_WORKERS[family.name]
    renamed = Metric(name, family.documentation, family.type)
    for sample in family.samples:
        labels = {
            "engine": sample.labels.get("worker", ""),
            "model_name": sample.labels.get("model_name", ""),
        }
        renamed.samples.append(sample._replace(name=name, labels=labels))
    return renamed


class _Merged(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            family.samples = _without_repeats(family)
            yield family


def _without_repeats(family: Metric) -> list[Sample]:
    """Prometheus refuses a series that comes twice. Counts are added up, of gauges the largest stays."""
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], Sample] = {}
    for sample in family.samples:
        key = (sample.name, tuple(sorted(sample.labels.items())))
        first = samples.get(key)
        if first is not None:
            gauge = family.type == "gauge"
            value = max(first.value, sample.value) if gauge else first.value + sample.value
            sample = first._replace(value=value)
        samples[key] = sample
    return list(samples.values())
