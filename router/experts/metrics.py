"""Names of the metrics of experts. Labels are groups and ranks, never experts: those are many thousands."""

from __future__ import annotations

from collections import Counter as Tally
from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from router.experts.rebalancer import TROUBLE, Phase
from router.experts.watched import Watched


class ExpertMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._balancedness = Gauge(
            "headrace_expert_balancedness",
            "Mean over fullest of the ranks' time in experts, over all layers: 1 is even. As the ranks counted it.",
            ["pool", "group"],
            registry=registry,
        )
        self._tokens = Counter(
            "headrace_expert_tokens",
            "Tokens that a rank's experts computed, over all layers, once for each expert.",
            ["pool", "group", "rank"],
            registry=registry,
        )
        self._ranks = Gauge(
            "headrace_expert_ranks",
            "Ranks of a group: all, alive.",
            ["pool", "group", "kind"],
            registry=registry,
        )
        self._version = Gauge(
            "headrace_expert_placement_version",
            "Placement that the ranks compute with, and that was posted last.",
            ["pool", "group", "kind"],
            registry=registry,
        )
        self._trouble = Gauge(
            "headrace_expert_rebalancing_trouble",
            "1 while a placement is stalled, is refused, or can't be planned; `headrace experts` says why.",
            ["pool", "group", "phase"],
            registry=registry,
        )
        self.watching = Gauge(
            "headrace_expert_watching",
            "1 while this router reads what ranks count; 0 while Redis is away, or if it has ended.",
            registry=registry,
        )
        self._lost = Counter(
            "headrace_expert_counts_lost",
            "Messages with counts that were missed.",
            ["group"],
            registry=registry,
        )
        self.posts = Counter(
            "headrace_expert_placements_posted",
            "Placements that this router posted.",
            ["group"],
            registry=registry,
        )
        self.moves = Counter(
            "headrace_expert_moves",
            "Experts that ranks had to load for the placements that this router posted.",
            ["group"],
            registry=registry,
        )
        self._refusals = Counter(
            "headrace_expert_placements_refused",
            "Placements that a rank refused.",
            ["group"],
            registry=registry,
        )
        self.plans = Counter(
            "headrace_expert_plans",
            "Attempts of this router to plan, by what came of them: posted, not worth it, overtaken, failed.",
            ["group", "outcome"],
            registry=registry,
        )
        self._counted: dict[str, Tally[str]] = {}  # what counters have been told so far

    def observe(self, watched: Watched, now: float) -> None:
        group, state = watched.group, watched.state
        pool, name = group.role, group.name
        measured = watched.measured(now)
        if measured is not None:
            self._balancedness.labels(pool, name).set(measured.balancedness)
        self._ranks.labels(pool, name, "all").set(len(group.ranks))
        self._ranks.labels(pool, name, "alive").set(len(group.alive))
        self._version.labels(pool, name, "in use").set(group.version)
        self._version.labels(pool, name, "posted").set(max(state.posted, group.version))
        for phase in sorted(TROUBLE):
            self._trouble.labels(pool, name, str(phase)).set(watched.verdict.phase is Phase(phase))
        for rank, tokens in enumerate(watched.loads.tokens):
            self._count(self._tokens.labels(pool, name, str(rank)), watched, f"tokens {rank}", tokens)
        self._count(self._lost.labels(name), watched, "lost", watched.loads.lost)
        self._count(self._refusals.labels(name), watched, "refusals", watched.state.refused_ever)

    def forget(self, watched: Watched) -> None:
        """The group is gone: gauges must not go on telling of it."""
        name = watched.group.name
        for gauge in (self._balancedness, self._ranks, self._version, self._trouble):
            gauge.remove_by_labels({"pool": watched.group.role, "group": name})
        self._counted.pop(name, None)

    def _count(self, counter: Counter, watched: Watched, key: str, total: int) -> None:
        told = self._counted.setdefault(watched.group.name, Tally())
        if total < told[key]:  # a group of the same name that began anew
            told[key] = 0
        counter.inc(total - told[key])
        told[key] = total


@cache
def default_metrics() -> ExpertMetrics:
    """Those of this process, in prometheus_client's own registry."""
    return ExpertMetrics(REGISTRY)
