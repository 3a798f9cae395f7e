"""What a cluster can do: the rate at which it ends requests while some always wait, placed by the oracle.

Loads are shares of this, so that 0.9 means the same for every policy. A policy that hits less than the oracle can do
less, and 0.9 of the oracle's capacity may be more than it can bear.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bench.simulate.cluster import Cluster, ClusterConfig
from bench.simulate.jobs import Asked
from bench.simulate.policies import ORACLE

_MIDDLE = (0.15, 0.85)  # of the ends: neither the filling of empty caches nor the last stragglers


def capacity_per_s(config: ClusterConfig, trace: Sequence[Asked]) -> float:
    """Requests a second."""
    unbounded = config.router.admission.model_copy(update={"max_queue": 10**9, "queue_timeout_s": 1e9})
    saturated = dataclasses.replace(
        config,
        policy=ORACLE,
        routers=1,
        faults=(),
        router=config.router.model_copy(update={"admission": unbounded}),
    )
    cluster = Cluster(saturated, trace)
    cluster.run_saturated(waiting=2 * (config.prefill + config.decode))
    ends = sorted(job.ended_s for job in cluster.jobs)
    first, last = (int(share * (len(ends) - 1)) for share in _MIDDLE)
    if ends[last] <= ends[first]:
        raise ValueError(f"{len(trace)} requests are too few to measure a capacity by; use --rate")
    return (last - first) / (ends[last] - ends[first])
