"""Idle processes with all libraries loaded, so that a dead worker is back in the time its weights take to load."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.actors import death_reason, remote_worker

logger = logging.getLogger(__name__)

_CALM_S = 3.0  # a spare is made when nothing has been starting for this long
_AFTER_FAILURE_S = 60.0


@dataclass(slots=True)
class _Spare:
    actor: Any
    warm: Any  # reference of warm()
    ready: bool = False


class Spares:
    """At most `count` on each host. They hold no CPU and no GPU of Ray's: they take over a dead worker's bundle."""

    def __init__(self, count: int, log_level: str, worker_class: str) -> None:
        self._count = count
        self._log_level = log_level
        self._worker_class = worker_class
        self._on_host: dict[str, list[_Spare]] = defaultdict(list)
        self._not_before = 0.0
        self.hold_off()

    def hold_off(self, seconds: float = _CALM_S) -> None:
        """Something needs the cores: make no spare for a while."""
        self._not_before = time.monotonic() + seconds

    def take(self, node_id: str) -> Any | None:
        """A warm actor on that host, now the caller's; None when there is none."""
        for spare in self._on_host[node_id]:
            if spare.ready:
                self._on_host[node_id].remove(spare)
                return spare.actor
        return None

    def tend(self, threads_on: Mapping[str, int]) -> None:
        """Notice which are warm and make those that are missing. `threads_on`: node id -> threads per worker."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for spares in self._on_host.values():
            for spare in [spare for spare in spares if not spare.ready]:
                if ray.wait([spare.warm], timeout=0)[0]:
                    try:
                        ray.get(spare.warm)
                        spare.ready = True
                    except ray.exceptions.RayError as error:
                        logger.warning("a spare process failed: %s", death_reason(error))
                        spares.remove(spare)
                        self.hold_off(_AFTER_FAILURE_S)
        if time.monotonic() < self._not_before:
            return
        for node_id, threads in threads_on.items():
            if len(self._on_host[node_id]) < self._count:
                here = NodeAffinitySchedulingStrategy(node_id, soft=False)
                actor = remote_worker(0, 0).options(scheduling_strategy=here)
                actor = actor.remote(threads, self._log_level, self._worker_class)
                self._on_host[node_id].append(_Spare(actor, actor.warm.remote()))

    def stop(self) -> None:
        import ray

        for spares in self._on_host.values():
            while spares:
                ray.kill(spares.pop().actor, no_restart=True)
