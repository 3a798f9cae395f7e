"""The pools in Ray: placement groups of worker actors."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.actors import WORKER_CLASS, death_reason, remote_worker
from cluster.spares import Spares
from cluster.supervisor import Died, Event, Started
from cluster.topology import ROLES, Plan, Replica, TopologyError
from workers.protocol.messages import Role

logger = logging.getLogger(__name__)

_EXPAND_S = 2.0  # for a place that Ray said was free
_PLACE_S = 0.5  # between two looks at whether somebody asked to stop

WorkerConfigJson = Callable[[Replica, int, int], str]  # epoch, rank
LeaseReader = Callable[[], Mapping[str, int] | None]


@dataclass(slots=True)
class _Rank:
    """One actor, from its creation to its end."""

    actor: Any
    pending: Any  # reference of start(), then of run()
    started: bool = False
    address: str = ""
    pid: int = 0


@dataclass(slots=True)
class _Life:
    """Of a worker: its ranks begin and end together."""

    replica: Replica
    epoch: int
    ranks: list[_Rank]

    @property
    def started(self) -> bool:
        return all(rank.started for rank in self.ranks)

    @property
    def first(self) -> _Rank:
        """The worker itself, which the others follow."""
        return self.ranks[0]


class RayPools:
    """The supervisor's `Hands` on a real Ray."""

    def __init__(
        self,
        plan: Plan,
        *,
        log_level: str,
        num_spares: int,
        worker_class: str = WORKER_CLASS,
    ) -> None:
        self._plan = plan
        self._log_level = log_level
        self._worker_class = worker_class
        self._spares = Spares(num_spares, log_level, worker_class)
        self._groups: dict[str, Any] = {}  # of replicas that are placed together
        self._bundle_of: dict[
            str, tuple[Any, int]
        ] = {}  # of the first rank; those of the others come behind it
        self.host_of: dict[str, str] = {}  # worker_id -> Ray node id
        self._threads: Mapping[str, int] = {}
        self._config_json: WorkerConfigJson | None = None
        self._leases: LeaseReader = lambda: None
        self._lives: dict[str, _Life] = {}
        self._gpus: dict[tuple[str, int], list[str]] = {}  # GPU ids that the bundle of each rank was given
        # Places of workers that left.
        self._left: dict[Role, list[tuple[Any, int]]] = {role: [] for role in ROLES}

    def place(self, timeout_s: float, heed_stop: Callable[[], None] = lambda: None) -> None:
        """Take the places of all replicas. Raises TopologyError when they can't be had in time.

        `heed_stop` is called while it waits, and may raise.
        """
        ray: Any = importlib.import_module("ray")
        from ray.util.placement_group import placement_group

        deadline = time.monotonic() + timeout_s
        together: dict[str, list[Replica]] = {}
        for replica in self._plan.replicas:
            together.setdefault(replica.together, []).append(replica)
        for name, replicas in together.items():
            bundles = [replica.bundle for replica in replicas for _ in range(replica.tensor_parallel)]
            # Ranks that compute together share memory; of others it is only better that they are near.
            strategy = "STRICT_PACK" if replicas[0].tensor_parallel > 1 else "PACK"
            self._groups[name] = placement_group(bundles, strategy=strategy)
        for name, group in self._groups.items():
            while not (placed := group.wait(_PLACE_S)) and time.monotonic() < deadline:
                heed_stop()
            if not placed:
                free: dict[str, float] = ray.available_resources()
                raise TopologyError(
                    f"{name} workers found no place within {timeout_s:g} s: they need "
                    f"{[replica.bundle for replica in together[name]]}, free are {free.get('CPU', 0):g} CPUs and "
                    f"{free.get('GPU', 0):g} GPUs; is another program using the Ray cluster?"
                )
            for index, replica in enumerate(together[name]):
                self._bundle_of[replica.worker_id] = (group, index)
                self._locate(replica.worker_id)

    def _locate(self, worker_id: str) -> None:
        """Ray moves a bundle when its host dies."""
        from ray.util.placement_group import placement_group_table

        group, index = self._bundle_of[worker_id]
        self.host_of[worker_id] = placement_group_table(group)["bundles_to_node_id"][index]

    def room(self, template: Replica) -> int:
        """How many more like this one would find a place now."""
        ray: Any = importlib.import_module("ray")

        free: dict[str, float] = ray.available_resources()
        fits = min(int(free.get(kind, 0.0) / amount + 1e-6) for kind, amount in template.bundle.items())
        return len(self._left[template.role]) + fits

    def expand(self, replica: Replica) -> bool:
        """Take a place for one more worker. False: there is none."""
        from ray.util.placement_group import placement_group, remove_placement_group

        if self._left[replica.role]:
            self._bundle_of[replica.worker_id] = self._left[replica.role].pop()
        else:
            group = placement_group([replica.bundle], strategy="PACK")
            if not group.wait(_EXPAND_S):
                remove_placement_group(group)
                return False
            self._bundle_of[replica.worker_id] = (group, 0)
        self._locate(replica.worker_id)
        return True

    def is_extra(self, worker_id: str) -> bool:
        """Its place was taken for it alone, so that it goes back to Ray when it leaves."""
        return self._bundle_of[worker_id][0] not in self._groups.values()

    def configure(
        self, threads: Mapping[str, int], config_json: WorkerConfigJson, leases: LeaseReader
    ) -> None:
        """What lives are started with: threads per worker, their configuration, and who is alive in Redis."""
        self._threads, self._config_json, self._leases = threads, config_json, leases

    # --- Hands ---------------------------------------------------------------------------------------------------

    def start(self, replica: Replica, epoch: int) -> None:
        assert self._config_json is not None, "configure() comes first"
        self._spares.hold_off()
        self._locate(replica.worker_id)
        ranks = [self._start_rank(replica, epoch, rank) for rank in range(replica.tensor_parallel)]
        self._lives[replica.worker_id] = _Life(replica, epoch, ranks)

    def _start_rank(self, replica: Replica, epoch: int, rank: int) -> _Rank:
        assert self._config_json is not None, "configure() comes first"
        config_json = self._config_json(replica, epoch, rank)
        gpus = self._gpus.get((replica.worker_id, rank))
        # Only the first life in a bundle learns from Ray which GPUs are the bundle's: no spare can stand in for that.
        can_use_spare = gpus is not None or not replica.num_gpus
        actor = self._spares.take(self.host_of[replica.worker_id]) if can_use_spare else None
        if actor is None:
            gpus = None
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            group, index = self._bundle_of[replica.worker_id]
            share = replica.tensor_parallel
            actor = remote_worker(replica.num_cpus / share, replica.num_gpus / share).options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=index + rank
                )
            )
            actor = actor.remote(self._threads[replica.worker_id], self._log_level, self._worker_class)
        return _Rank(actor, actor.start.remote(config_json, gpus))

    def kill(self, worker_id: str) -> None:
        life = self._lives.pop(worker_id, None)
        if life is None:
            return
        import ray

        here = self.host_of[worker_id] == ray.get_runtime_context().get_node_id()
        for rank in life.ranks:
            ray.kill(rank.actor, no_restart=True)
            if rank.pid and here:
                # Ray gives a process that does not answer five seconds; a new life need not wait beside the old one.
                try:
                    os.kill(rank.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass

    def drain(self, worker_id: str, timeout_s: float) -> None:
        self._lives[worker_id].first.actor.drain.remote(timeout_s)  # `run` returns when it has ended

    def release(self, replica: Replica) -> None:
        from ray.util.placement_group import remove_placement_group

        worker_id = replica.worker_id
        for rank in range(replica.tensor_parallel):
            self._gpus.pop((worker_id, rank), None)
        self.host_of.pop(worker_id, None)
        extra = self.is_extra(worker_id)
        place = self._bundle_of.pop(worker_id)
        if extra:
            remove_placement_group(place[0])
        else:
            self._left[replica.role].append(place)  # a place in a pool's group can't be given back alone

    def events(self, timeout_s: float) -> list[Event]:
        import ray

        if all(life.started for life in self._lives.values()):
            self._spares.tend({node: self._threads[worker] for worker, node in self.host_of.items()})
        pending = {rank.pending: (life, rank) for life in self._lives.values() for rank in life.ranks}
        if not pending:
            time.sleep(timeout_s)
            return []
        # One at a time is enough to wake up; whatever else is done is collected with it.
        done, _ = ray.wait(list(pending), num_returns=1, timeout=timeout_s)
        if done:
            done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
        return [event for reference in done if (event := self._outcome(*pending[reference])) is not None]

    def leases(self) -> Mapping[str, int] | None:
        return self._leases()

    # --- lives ---------------------------------------------------------------------------------------------------

    def _outcome(self, life: _Life, rank: _Rank) -> Event | None:
        import ray

        worker_id = life.replica.worker_id
        if self._lives.get(worker_id) is not life:
            return None  # another of its ranks has ended it
        index = life.ranks.index(rank)
        try:
            answer = ray.get(rank.pending)
        except ray.exceptions.ActorDiedError as error:
            reason = death_reason(error)
            rank.pid = 0  # nothing of it is left to kill
        except ray.exceptions.RayError as error:
            reason = death_reason(error)
        else:
            if not rank.started:
                rank.started, rank.pid, rank.address = True, answer["pid"], answer["address"]
                if answer["gpus"]:
                    self._gpus[worker_id, index] = answer["gpus"]
                rank.pending = rank.actor.run.remote()
                self._spares.hold_off()
                if not life.started:
                    return None
                return Started(worker_id, life.epoch, life.first.address, life.first.pid)
            reason = "it ended without being asked to"
        self.kill(worker_id)
        return Died(worker_id, life.epoch, f"rank {index}: {reason}" if index else reason)

    # --- end -----------------------------------------------------------------------------------------------------

    def stop(self, timeout_s: float) -> None:
        """End every worker in order, those that do not answer by force, and give the places back."""
        import ray
        from ray.util.placement_group import remove_placement_group

        goodbyes = [life.first.actor.stop.remote() for life in self._lives.values() if life.started]
        if goodbyes:
            ray.wait(goodbyes, num_returns=len(goodbyes), timeout=timeout_s)
        for worker_id in list(self._lives):
            self.kill(worker_id)
        self._spares.stop()
        extra = [group for worker_id, (group, _) in self._bundle_of.items() if self.is_extra(worker_id)]
        for group in [*self._groups.values(), *extra]:
            remove_placement_group(group)
        self._groups.clear()
        self._bundle_of.clear()
