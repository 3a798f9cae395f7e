"""Starts a whole cluster in order, keeps it alive, and stops it in the reverse order."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import topology
from cluster.address import WILDCARDS, Address, address_of, ask_ready
from cluster.autoscale import Autoscaler, Router
from cluster.config import ClusterConfig
from cluster.leases import Leases
from cluster.parts import LaunchError, Parts, Prepared
from cluster.planner_board import PlannerBoard
from cluster.pools import RayPools
from cluster.ports import HeldPorts
from cluster.progress import Step, Steps
from cluster.ray_runtime import RayRuntime, machine
from cluster.resize import Resizer
from cluster.router_replica import RouterSettings
from cluster.routers import Routers
from cluster.supervisor import Died, Supervisor
from cluster.topology import Plan, Replica
from cluster.valkey import EmbeddedValkey, ValkeyError
from router.tenants import control_key
from workers.config import TensorRankConfig, WorkerConfig
from workers.models.checkpoint import read_json
from workers.models.errors import ModelError
from workers.models.sharding import check_shardable
from workers.models.spec import DecoderSpec

logger = logging.getLogger(__name__)

_TICK_S = 0.2
_READY_TIMEOUT_S = 60.0  # for the router to answer once all workers run
_WORKER_GOODBYE_S = 5.0


class Stopped(Exception):
    """Somebody asked to stop while things were still starting."""


class Cluster:
    """One running cluster. All methods belong on the main thread; `stopping` may be set from anywhere."""

    def __init__(self, config: ClusterConfig, parts: Parts | None = None) -> None:
        self.config = config
        self.stopping = threading.Event()
        self.interruptible = False  # a signal may break off what goes on: nothing has been started yet
        self.supervisor: Supervisor | None = None
        self.ray = RayRuntime(config)
        self._parts = parts or Parts()
        self._secret = config.security.cluster_secret or secrets.token_urlsafe(32)
        self._ports: HeldPorts | None = None
        self._valkey: EmbeddedValkey | None = None
        self._pools: RayPools | None = None
        self._routers: Routers | None = None
        self._leases: Leases | None = None
        self._autoscaler: Autoscaler | None = None

    # --- start -------------------------------------------------------------------------------------------------------

    def start(self, steps: Steps) -> Address:
        """Returns when a request would be served.

        Raises LaunchError, TopologyError, PortError, ValkeyError, RayError, or Stopped. `stop` must follow in any case.
        """
        plan = topology.plan(self.config, machine()) if self.ray.local else None
        self._ports = HeldPorts(self.config.router)
        model = self._prepare_model(steps)
        plan = self._start_ray(steps, plan)
        redis_url = self._redis_url = self._start_redis(steps)
        self._start_routers(model, redis_url)
        self._start_workers(plan, model, redis_url)
        address = self._await_ready(steps, plan, model)
        if self.config.planner.enabled:
            self._start_planner(plan, address)
        return address

    def _prepare_model(self, steps: Steps) -> Prepared:
        with steps.begin("model") as step:

            def say(text: str) -> None:
                step.note = text

            self.interruptible = True
            try:
                model = self._parts.prepare(self.config.model.name, say)
            finally:
                self.interruptible = False
            self._check_ranks(model)
            step.note = self.config.model.served_name or model.served_name
        self._heed_stop()
        return model

    def _check_ranks(self, model: Prepared) -> None:
        """Before anything is started for a model that its ranks could not share out. Raises LaunchError."""
        for role in topology.ROLES:
            pool = self.config.pool(role)
            if pool.tensor_parallel == 1 or not pool.replicas:
                continue
            try:
                check_shardable(
                    DecoderSpec.from_config(read_json(model.path / "config.json")), pool.tensor_parallel
                )
            except ModelError as error:
                raise LaunchError(
                    f"pools.{role}.tensor_parallel is {pool.tensor_parallel}: {error}"
                ) from error

    def _start_ray(self, steps: Steps, plan: Plan | None) -> Plan:
        with steps.begin("ray") as step:
            try:
                self.ray.start(
                    num_cpus=max(plan.num_cpus + topology.spare_cpus(self.config, plan), 1.0) if plan else 0,
                    num_gpus=machine().hosts[0].gpus if plan else 0,
                )
            except SystemExit as error:  # of Ray's own handler for SIGTERM, in force while Ray starts
                raise Stopped from error
            self._heed_stop()
            if plan is None:
                plan = topology.plan(self.config, self.ray.inventory())
            step.note = "local" if self.ray.local else f"joined {self.config.ray.address}"
        for note in plan.notes:
            logger.info("%s", note)
        self._pools = RayPools(
            plan,
            log_level=self.config.log_level,
            num_spares=self.config.supervisor.spares,
            worker_class=self._parts.worker_class,
        )
        self._pools.place(self.config.ray.placement_timeout_s, self._heed_stop)
        topology.check_reachable(self.config, self._pools.host_of, self.ray.node_id())
        return plan

    def _start_redis(self, steps: Steps) -> str:
        with steps.begin("redis") as step:
            if self.config.redis.embedded:
                host = self.config.redis.host
                self._valkey = EmbeddedValkey(
                    self.ray.node_address() if host == "node" else host, self.config.redis.port
                )
                self._valkey.start()
                redis_url = self._valkey.url
                step.note = "embedded Valkey"
            else:
                try:
                    redis_url = self.config.redis.address()
                except ValueError as error:
                    raise LaunchError(str(error)) from error
            worker_ids = list(self._pools.host_of) if self._pools else []
            self._leases = Leases(redis_url, self.config.cluster, worker_ids)
            try:
                self._leases.check()
                if not self.config.redis.embedded:
                    self._claim_name(self._leases)
            except ConnectionError as error:
                raise LaunchError(f"{self.config.redis.setting}: no Redis answers there: {error}") from error
        self._heed_stop()
        return redis_url

    def _claim_name(self, leases: Leases) -> None:
        """Two clusters of one name in one Redis would take each other's workers for their own, and end them.

        What a killed one left behind is gone when its leases have run out.
        """
        deadline = time.monotonic() + self.config.worker.timeout_s + 1.0
        while others := leases.registered():
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{self.config.redis.setting}: a cluster named {self.config.cluster!r} is alive in that Redis "
                    f"({', '.join(others)}); give this one another name with --cluster"
                )
            self._heed_stop()
            time.sleep(_TICK_S)

    def _start_routers(self, model: Prepared, redis_url: str) -> None:
        assert self._ports is not None
        self._routers = Routers(
            self.config.cluster,
            self.config.router.replicas,
            owns_serve=self.ray.local,
            router_class=self._parts.router_class,
        )
        self._routers.start(
            RouterSettings(
                cluster=self.config.cluster,
                secret=self._secret,
                redis_url=redis_url,
                model=str(self._model_path(model)),
                log_level=self.config.log_level,
                lease_s=self.config.transfer.lease_s,
                router=self._ports.config,
            )
        )

    def _start_workers(self, plan: Plan, model: Prepared, redis_url: str) -> None:
        assert self._pools is not None
        assert self._leases is not None
        cores = {host.name: host.cpus for host in self.ray.inventory().hosts}
        if self.ray.local:
            cores = dict.fromkeys(cores, machine().hosts[0].cpus)
        threads = self._threads = topology.threads_per_worker(plan, self._pools.host_of, cores)
        self._cores = cores

        def config_json(replica: Replica, epoch: int, rank: int) -> str:
            return self._worker_config(replica, epoch, rank, threads[replica.worker_id], model, redis_url)

        self._pools.configure(threads, config_json, self._leases.read)
        self.supervisor = Supervisor(
            plan.replicas, self._pools, self.config.supervisor, self.config.ray.start_timeout_s
        )
        self.supervisor.start_all()

    def _start_planner(self, plan: Plan, address: Address) -> None:
        assert self._pools is not None
        assert self._leases is not None
        assert self.supervisor is not None
        pools = self._pools
        resizer = Resizer(
            plan,
            pools,
            self.supervisor,
            self._leases,
            self._threads,
            self._cores,
            drain_timeout_s=self.config.planner.drain_timeout_s,
            check=lambda: topology.check_reachable(self.config, pools.host_of, self.ray.node_id()),
        )
        keys = self._keys()
        router = Router(address.url, keys[0] if keys else None)
        board = PlannerBoard(self._redis_url, self.config.cluster)
        self._autoscaler = Autoscaler(self.config.planner, router.look, resizer, board.tell)
        self._autoscaler.start()

    def _worker_config(
        self, replica: Replica, epoch: int, rank: int, num_threads: int, model: Prepared, redis_url: str
    ) -> str:
        size = replica.tensor_parallel
        return WorkerConfig(
            worker_id=replica.worker_id,
            epoch=epoch,
            role=replica.role,
            model_path=self._model_path(model),
            served_name=self.config.model.served_name or model.served_name,
            cluster=self.config.cluster,
            secret=self._secret,
            redis_url=redis_url,
            host=self.config.worker.host,
            heartbeat_s=self.config.worker.heartbeat_s,
            timeout_s=self.config.worker.timeout_s,
            engine=replica.engine.model_copy(update={"num_threads": num_threads}),
            transfer=self.config.transfer,
            experts=self.config.experts,
            expert_rank=replica.expert_rank,
            tensor_rank=TensorRankConfig(rank=rank, size=size) if size > 1 else None,
        ).model_dump_json()

    def _model_path(self, model: Prepared) -> Path:
        """Other hosts may keep the model elsewhere, or not have it yet: there each process prepares it by its name."""
        return model.path if self.ray.local else Path(self.config.model.name)

    def _await_ready(self, steps: Steps, plan: Plan, model: Prepared) -> Address:
        assert self.supervisor is not None
        workers, routers = steps.begin("workers"), steps.begin("router")
        self._await_workers(workers, len(plan.replicas))
        address = self._address(model)
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while True:
            answer = ask_ready(address, self._keys())
            if answer == "ready":
                break
            self._watch(0.05)
            if time.monotonic() > deadline:
                raise LaunchError(f"the router is not ready after {_READY_TIMEOUT_S:g} s: {answer}")
        routers.done(address.url)
        self.supervisor.launching = False
        return address

    def _keys(self) -> list[str]:
        """For our own questions to the router. Clients' keys may be known by their hashes only."""
        return [control_key(self._secret)] if self.config.router.wants_keys else []

    def _await_workers(self, step: Step, count: int) -> None:
        assert self.supervisor is not None
        while not self.supervisor.all_running():
            running = sum(watched.phase == "running" for watched in self.supervisor.watched.values())
            step.note = f"{running} of {count} have loaded the model"
            self._watch(_TICK_S)
        step.done(", ".join(self.supervisor.watched))

    def _watch(self, timeout_s: float) -> None:
        """One tick during the start, when a death ends it all instead of being mended."""
        assert self.supervisor is not None
        assert self._routers is not None
        self._heed_stop()
        for event in self.supervisor.tick(timeout_s):
            if isinstance(event, Died):
                raise LaunchError(f"{event.worker_id} could not start: {event.reason}")
        if reason := self._routers.failure():
            raise LaunchError(f"the router could not start: {reason}")

    def _address(self, model: Prepared) -> Address:
        assert self._ports is not None
        assert self._routers is not None
        config = self._ports.config
        anywhere = "127.0.0.1"
        if not self.ray.local and config.http.host in WILDCARDS:
            try:
                anywhere = self._routers.node_address(_READY_TIMEOUT_S)
            except RuntimeError as error:
                raise LaunchError(f"the router could not start: {error}") from error
        return address_of(config, self.config.model.served_name or model.served_name, anywhere)

    def _heed_stop(self) -> None:
        if self.stopping.is_set():
            raise Stopped

    # --- life --------------------------------------------------------------------------------------------------------

    def tend(self) -> None:
        """Keep everything alive until `stopping` is set."""
        assert self.supervisor is not None
        while not self.stopping.is_set():
            self.supervisor.tick(_TICK_S)
            if self._autoscaler is not None:
                self._autoscaler.tick()
            if self._valkey is not None and not self._valkey.alive():
                logger.warning("the embedded Valkey died; starting it again on the same port")
                try:
                    self._valkey.start()
                except ValkeyError as error:
                    logger.error("%s", error)
                    self.stopping.wait(1.0)

    # --- stop --------------------------------------------------------------------------------------------------------

    def stop(self) -> list[str]:
        """Idempotent. First the way in, then the workers, then what they stand on. Answers what went wrong."""
        troubles: list[str] = []

        def attempt(what: str, action: Callable[[], Any]) -> None:
            try:
                action()
            except Exception as error:
                logger.debug("stopping %s", what, exc_info=True)
                troubles.append(f"{what}: {error}")

        autoscaler, self._autoscaler = self._autoscaler, None
        routers, self._routers = self._routers, None
        pools, self._pools = self._pools, None
        leases, self._leases = self._leases, None
        valkey, self._valkey = self._valkey, None
        ports, self._ports = self._ports, None
        if autoscaler is not None:
            autoscaler.stop()
        if routers is not None:
            attempt("router", routers.stop)
        if pools is not None:
            attempt("workers", lambda: pools.stop(_WORKER_GOODBYE_S))
        if leases is not None:
            attempt("redis client", leases.close)
        attempt("ray", self.ray.stop)
        if valkey is not None:
            attempt("valkey", valkey.stop)
        if ports is not None:
            ports.release()
        return troubles
