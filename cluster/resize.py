"""More and fewer workers in a running cluster: their places in Ray, their threads, and who looks after them."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping

from cluster.leases import Leases
from cluster.planner.observe import Census
from cluster.pools import RayPools
from cluster.supervisor import Supervisor
from cluster.topology import ROLES, Plan, Replica, TopologyError
from workers.protocol.messages import Role

logger = logging.getLogger(__name__)


class Resizer:
    """Belongs on the supervisor's thread."""

    def __init__(
        self,
        plan: Plan,
        pools: RayPools,
        supervisor: Supervisor,
        leases: Leases,
        threads: dict[str, int],
        cores: Mapping[str, float],
        *,
        drain_timeout_s: float,
        check: Callable[[], None],
    ) -> None:
        """`threads`: of each worker, by its name, filled here for new ones; `check` raises TopologyError."""
        self._templates: dict[Role, Replica] = {role: plan.of(role)[0] for role in ROLES if plan.of(role)}
        self._pools = pools
        self._supervisor = supervisor
        self._leases = leases
        self._threads = threads
        self._cores = cores
        self._drain_timeout_s = drain_timeout_s
        self._check = check

    def census(self) -> dict[Role, Census]:
        """Of the pools that the cluster was started with."""
        return {
            role: Census(
                present=self._supervisor.count(role, ("starting", "running", "waiting")),
                draining=self._supervisor.count(role, ("draining",)),
            )
            for role in self._templates
        }

    def room(self, role: Role) -> int:
        """How many more workers of this pool Ray has a place for."""
        return self._pools.room(self._templates[role])

    def resize(self, role: Role, size: int) -> int:
        """Towards `size`, as far as there is room. Returns by how many workers the pool has changed."""
        present = self.census()[role].present
        if size < present:
            for worker_id in self._last(role)[: present - size]:
                logger.info("%s leaves: it takes nothing new and ends with its last stream", worker_id)
                self._supervisor.retire(worker_id, self._drain_timeout_s)
            return size - present
        grown = 0
        while present + grown < size and self._grow(role):
            grown += 1
        return grown

    def _grow(self, role: Role) -> bool:
        watched = self._supervisor.watched
        name = next(name for i in itertools.count() if (name := f"{role}-{i}") not in watched)
        replica = dataclasses.replace(self._templates[role], worker_id=name)
        if not self._pools.expand(replica):
            logger.warning("no place was found for %s", name)
            return False
        try:
            self._check()
        except TopologyError as error:
            logger.warning("%s can't be added: %s", name, error)
            self._pools.release(replica)
            return False
        host = self._pools.host_of[name]
        # Those that run keep their threads: a new one takes the part that it would have had.
        crowd = Counter(self._pools.host_of.values())[host]
        self._threads[name] = replica.engine.num_threads or max(1, int(self._cores[host]) // crowd)
        self._supervisor.add(replica)
        self._leases.watch(self._supervisor.watched)
        logger.info("%s is added", name)
        return True

    def _last(self, role: Role) -> list[str]:
        """Workers in the order in which they may leave: those whose place goes back to Ray, then the youngest."""
        present = [
            w for w in self._supervisor.watched.values() if w.replica.role == role and w.phase != "draining"
        ]
        present.sort(
            key=lambda w: (self._pools.is_extra(w.replica.worker_id), w.phase != "running", w.epoch),
            reverse=True,
        )
        return [w.replica.worker_id for w in present]
