"""Which replica gets what: pure arithmetic over the configuration and what the machine or Ray cluster has.

An impossible demand ends here, in words, and not in a placement group that hangs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.config import ClusterConfig
from workers.config import EngineConfig, ExpertRankConfig
from workers.protocol.messages import Role

ROLES: tuple[Role, ...] = ("prefill", "decode")
_LOOPBACK = ("127.", "localhost", "::1")


class TopologyError(Exception):
    """The cluster can't hold what the configuration asks for."""


@dataclass(frozen=True, slots=True)
class Host:
    """One machine as Ray knows it."""

    name: str  # Ray's node id, or "local"
    address: str
    cpus: float
    gpus: float = 0


@dataclass(frozen=True, slots=True)
class Inventory:
    """What there is. `local`: Ray is started by us on this machine, so the CPU slots it counts are ours to define."""

    hosts: tuple[Host, ...]
    local: bool = True


@dataclass(frozen=True, slots=True)
class Replica:
    """One worker to be: its name and what Ray books for it, of which each of its ranks gets an equal part."""

    worker_id: str
    role: Role
    num_cpus: float
    num_gpus: float
    engine: EngineConfig  # device is decided
    expert_rank: ExpertRankConfig | None = None  # its place among workers that share experts
    tensor_parallel: int = 1  # ranks, each a process of the same host

    @property
    def together(self) -> str:
        """Replicas with the same one are placed together."""
        if self.tensor_parallel > 1:
            return self.worker_id
        return self.role if self.expert_rank is None else self.expert_rank.group

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of the place of one rank in a placement group. Ray wants at least one entry."""
        ranks = self.tensor_parallel
        amounts = {"CPU": self.num_cpus / ranks, "GPU": self.num_gpus / ranks}
        return {name: amount for name, amount in amounts.items() if amount} or {"CPU": 0.001}


@dataclass(frozen=True, slots=True)
class Plan:
    replicas: tuple[Replica, ...]
    notes: tuple[str, ...] = ()  # decisions a person should hear of

    def of(self, role: Role) -> tuple[Replica, ...]:
        return tuple(replica for replica in self.replicas if replica.role == role)

    @property
    def num_cpus(self) -> float:
        return sum(replica.num_cpus for replica in self.replicas)


def plan(config: ClusterConfig, inventory: Inventory) -> Plan:
    """Decide device and resources of every replica. Raises TopologyError when they can't all be placed."""
    total_gpus = sum(host.gpus for host in inventory.hosts)
    engines = {role: config.pool_engine(role) for role in ROLES}
    notes: list[str] = []
    for role, engine in engines.items():
        asked = config.pool(role).num_gpus
        if config.pool(role).replicas and engine.device == "cuda" and total_gpus == 0:
            raise TopologyError(
                f"pools.{role} wants device cuda, but there is no GPU here; set engine.device to cpu"
            )
        if engine.device == "cpu" and asked:
            raise TopologyError(
                f"pools.{role}.num_gpus is {asked:g}, but its device is cpu; remove one of the two"
            )
    share = _gpu_share(config, engines, total_gpus, notes)
    replicas: list[Replica] = []
    for role in ROLES:
        pool = config.pool(role)
        ranks = pool.tensor_parallel
        num_gpus = pool.num_gpus if pool.num_gpus is not None else share * ranks
        if engines[role].device == "cpu":
            num_gpus = 0.0
        engine = engines[role].model_copy(update={"device": "cuda" if num_gpus else "cpu"})
        if pool.replicas and num_gpus == 0 and engines[role].device == "cuda":
            raise TopologyError(
                f"pools.{role}.num_gpus is 0, but its device is cuda; give it a share of a GPU"
            )
        if ranks > 1 and num_gpus not in (0, ranks):
            raise TopologyError(
                f"pools.{role}.tensor_parallel is {ranks}, num_gpus is {num_gpus:g}: each of its ranks needs a GPU of its "
                f"own; set num_gpus to {ranks}, or to 0 for CPUs"
            )
        num_cpus = float(ranks) if pool.num_cpus is None else pool.num_cpus
        size = pool.expert_parallel
        if size > 1 and 0 < num_gpus < 1 and config.experts.exchange in ("auto", "nccl"):
            raise TopologyError(
                f"pools.{role}.expert_parallel is {size}, and its workers would share GPUs: NCCL needs one for each; "
                "set experts.exchange to gloo, or num_gpus to 1"
            )
        replicas += [
            Replica(
                f"{role}-{index}", role, num_cpus, num_gpus, engine, _expert_rank(role, index, size), ranks
            )
            for index in range(pool.replicas)
        ]
    _check_fits(replicas, inventory)
    return Plan(tuple(replicas), tuple(notes))


def _expert_rank(role: Role, index: int, size: int) -> ExpertRankConfig | None:
    if size == 1:
        return None
    group, rank = divmod(index, size)
    return ExpertRankConfig(group=f"{role}-ep{group}", rank=rank, size=size)


def _gpu_share(
    config: ClusterConfig, engines: Mapping[Role, EngineConfig], total_gpus: float, notes: list[str]
) -> float:
    """GPUs of a rank of a replica that names no number: a whole one, or an equal part when there are too few."""
    claimants = [
        role for role in ROLES if config.pool(role).num_gpus is None and engines[role].device != "cpu"
    ]
    claims = sum(config.pool(role).replicas * config.pool(role).tensor_parallel for role in claimants)
    left = total_gpus - sum(config.pool(role).replicas * (config.pool(role).num_gpus or 0) for role in ROLES)
    left = math.floor(left)
    if claims == 0 or left < 1:
        return 0.0
    sharing = math.ceil(claims / left)
    for role in claimants:
        if sharing > 1 and (ranks := config.pool(role).tensor_parallel) > 1 and config.pool(role).replicas:
            raise TopologyError(
                f"pools.{role}.tensor_parallel is {ranks}: each of its ranks needs a GPU of its own; {claims} GPUs are "
                f"claimed, {left} are there"
            )
    if sharing > 1:
        notes.append(f"{claims} workers share {left} GPU{'s' if left > 1 else ''}")
    # Ray counts GPUs in ten-thousandths: round down so that the parts fit.
    return 1.0 if sharing == 1 else math.floor(10_000 / sharing) / 10_000


def spare_cpus(config: ClusterConfig, plan: Plan) -> float:
    """CPU slots that a Ray of our own needs besides, so that the planner may add workers."""
    if not (config.planner.enabled and config.planner.apply):
        return 0.0
    most = {role: config.planner.bounds(role).max or 0 for role in ROLES}
    return sum(
        max(most[role] - len(replicas), 0) * replicas[0].num_cpus
        for role in ROLES
        if (replicas := plan.of(role))
    )


def _check_fits(replicas: Sequence[Replica], inventory: Inventory) -> None:
    """First-fit decreasing: exact for equal replicas, and what Ray's packing can do too."""
    needs = {"GPU": sum(replica.num_gpus for replica in replicas)}
    has = {"GPU": sum(host.gpus for host in inventory.hosts)}
    if not inventory.local:
        needs["CPU"] = sum(replica.num_cpus for replica in replicas)
        has["CPU"] = sum(host.cpus for host in inventory.hosts)
    where = "this machine" if inventory.local else "the Ray cluster"
    counts = ", ".join(f"{count} {role}" for role, count in Counter(r.role for r in replicas).items())
    for kind, needed in needs.items():
        if needed > has[kind] + 1e-6:
            raise TopologyError(f"{counts} replicas need {needed:g} {kind}s, {where} has {has[kind]:g}")
    free = [[host.gpus, math.inf if inventory.local else host.cpus] for host in inventory.hosts]
    for replica in sorted(replicas, key=lambda replica: (-replica.num_gpus, -replica.num_cpus)):
        for room in free:
            if replica.num_gpus <= room[0] + 1e-6 and replica.num_cpus <= room[1] + 1e-6:
                room[0] -= replica.num_gpus
                room[1] -= replica.num_cpus
                break
        else:
            raise TopologyError(
                f"no host of {where} has {replica.num_gpus:g} GPUs and {replica.num_cpus:g} CPUs left for "
                f"{replica.worker_id}; {counts} replicas do not fit on {len(free)} host{'s' if len(free) > 1 else ''}"
            )


def threads_per_worker(plan: Plan, host_of: Mapping[str, str], cores: Mapping[str, float]) -> dict[str, int]:
    """CPU threads of each worker, and rank: what its engine says, else an equal part of the cores of its host."""
    crowd = Counter(
        host_of[replica.worker_id] for replica in plan.replicas for _ in range(replica.tensor_parallel)
    )
    return {
        replica.worker_id: replica.engine.num_threads
        or max(1, int(cores[host_of[replica.worker_id]]) // crowd[host_of[replica.worker_id]])
        for replica in plan.replicas
    }


def check_reachable(config: ClusterConfig, host_of: Mapping[str, str], driver_host: str) -> None:
    """Raise TopologyError when parts on several hosts would only listen on loopback."""
    hosts = set(host_of.values()) | {driver_host}
    if len(hosts) < 2:
        return
    listeners = {
        "worker.host": config.worker.host,
        "transfer.host": config.transfer.host,
        "router.http.host": config.router.http.host,
    }
    if config.redis.embedded:
        listeners["redis.host"] = config.redis.host
    loopback = [name for name, address in listeners.items() if address.startswith(_LOOPBACK)]
    if loopback:
        raise TopologyError(
            f"the cluster spans {len(hosts)} hosts, but {', '.join(loopback)} "
            f"{'is' if len(loopback) == 1 else 'are'} loopback; set hosts of routers to 0.0.0.0, the others to `node`"
        )
