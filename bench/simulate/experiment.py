"""Every policy at every load on clusters of several sizes, in as many processes as wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from bench.simulate.capacity import capacity_per_s
from bench.simulate.cluster import Cluster, ClusterConfig
from bench.simulate.jobs import Asked
from bench.simulate.outcome import Slo, least_ttfts_s, summary
from bench.simulate.traces import rate_per_s
from bench.spread import percentile

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A cluster and a trace: all policies and loads share its capacity."""

    trace_name: str
    workers: int
    split: bool  # half of the workers read prompts for the other half; else all are unified
    seed: int
    trace: Callable[[], list[Asked]]  # in the process that needs it
    config: ClusterConfig


def run_cells(
    cells: Sequence[Cell], policies: Sequence[str], loads: Sequence[float], slo: Slo, processes: int
) -> Iterator[Row]:
    """Rows in the order of cells, loads and policies, each as soon as it and those before it are there."""
    with ProcessPoolExecutor(processes) as pool:
        capacities = list(pool.map(_capacity, cells))
        tasks = [
            (cell, capacity, policy, load, slo)
            for cell, capacity in zip(cells, capacities, strict=True)
            for load in loads
            for policy in policies
        ]
        yield from pool.map(_row, tasks)


def _capacity(cell: Cell) -> float:
    return capacity_per_s(cell.config, cell.trace())


def _row(task: tuple[Cell, float, str, float, Slo]) -> Row:
    cell, capacity, policy, load, slo = task
    trace = cell.trace()
    cluster = Cluster(dataclasses.replace(cell.config, policy=policy), trace)
    cluster.run(load * capacity / rate_per_s(trace))
    found = summary(cluster, slo)
    hits = found["hits"]
    oracle = hits["oracle_share_of_prompt"]
    own = hits["share_of_prompt"] - hits["fetched_share_of_prompt"]
    return {
        "trace": cell.trace_name,
        "workers": cell.workers,
        "split": cell.split,
        "seed": cell.seed,
        "requests": len(trace),
        "capacity_per_s": round(capacity, 4),
        "load": load,
        "policy": policy,
        "hits": hits["share_of_prompt"],
        "own_hits": round(own, 6),
        "endless_hits": hits["endless_share_of_prompt"],
        "of_oracle": hits["share_of_oracle"],
        "own_of_oracle": round(own / oracle, 6) if oracle else 1.0,
        "ttft_p50_s": found["ttft_s"]["p50"],
        "ttft_p99_s": found["ttft_s"]["p99"],
        "least_ttft_p99_s": round(percentile(sorted(least_ttfts_s(trace, cell.config)), 0.99), 6),
        "tpot_p50_s": found["tpot_s"].get("p50", 0.0),
        "tpot_p99_s": found["tpot_s"].get("p99", 0.0),
        "goodput": found["goodput_share"],
        "balance": {role: figures["max_over_mean"] for role, figures in found["balance"].items()},
        "busy": {role: figures["busy_share"] for role, figures in found["balance"].items()},
        "computed_prompt_tokens": found["computed_prompt_tokens"],
        "preemptions": found["preemptions"],
    }
