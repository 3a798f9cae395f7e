"""Redis, read: who is registered (polled), and through the feed what they cache.

The poll hands the registry to the fleet, and tells the feed how far each worker's index in Redis has come.

Redis away: nothing is taken down. Links and index stay as they are, and the index is approximate until every worker's
snapshot has been read again. A Redis that comes back empty has no snapshots; workers notice and publish theirs anew.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any, Literal

import msgspec
import redis.asyncio

from router.dispatch_metrics import DispatchMetrics
from router.fleet import Fleet
from router.index.feed import IndexFeed
from router.prefix_index import PrefixIndex
from workers.protocol import redis_keys
from workers.protocol.messages import Planned, WorkerInfo
from workers.protocol.redis_address import RedisAddress
from workers.protocol.redis_client import TROUBLE, connect_async, node_of

log = logging.getLogger(__name__)

_decode_planned = msgspec.json.Decoder(Planned).decode
_decode_info = msgspec.msgpack.Decoder(WorkerInfo).decode


class Discovery:
    def __init__(
        self,
        redis_url: str,
        cluster: str,
        *,
        fleet: Fleet,
        index: PrefixIndex,
        metrics: DispatchMetrics,
        poll_s: float = 0.25,
        rng: random.Random | None = None,
    ) -> None:
        self.redis: Literal["ok", "away"] = "away"
        self._cluster = cluster
        self._fleet = fleet
        self._index = index
        self._metrics = metrics
        self._poll_s = poll_s
        self._rng = rng or random.Random()
        address = RedisAddress.parse(redis_url)
        self.planned: Planned | None = None  # None: no planner is running
        self._num_partitions = address.partitions
        self._redis: Any = connect_async(address, timeout_s=2.0)
        self.feed = IndexFeed(
            address,
            cluster,
            index=index,
            metrics=metrics,
            trouble=self._went_away,
            pause_s=self._pause_s,
        )
        self._infos: dict[str, tuple[bytes, WorkerInfo]] = {}  # decoded once, while the bytes stay the same
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(task) for task in (self._poll(), *self.feed.tasks())]

    async def stop(self) -> None:
        self._stopping = True
        self.feed.stop()
        running = set(self._tasks)
        while running:
            # Once is not enough: on Python 3.11 redis-py's wait_for() can swallow a cancellation (bpo-42130).
            for task in running:
                task.cancel()
            _, running = await asyncio.wait(running, timeout=0.1)
        await self.feed.close()
        try:
            await self._redis.aclose()
        except TROUBLE as error:
            log.debug("closing the connection to Redis: %s", error)

    def is_exact(self, worker_id: str, epoch: int) -> bool:
        """False: what this replica routes to the worker is worth noting (approximate mode)."""
        return self.feed.is_exact(worker_id, epoch)

    @property
    def approximate(self) -> bool:
        if self.redis == "away":
            return True
        return not all(self.is_exact(m.info.worker_id, m.info.epoch) for m in self._fleet.members())

    # --- the registry -----------------------------------------------------------------------------------------------

    async def _poll(self) -> None:
        while not self._stopping:
            try:
                registered, positions = await self._read_registry()
                self._came_back()
                self._fleet.sync(registered)
                self._compare(positions)
                await self._read_planned()
            except TROUBLE as error:
                self._went_away(error)
            self._metrics.observe_index(self._index, self.approximate)
            await asyncio.sleep(self._pause_s())

    async def _read_planned(self) -> None:
        key = redis_keys.planner(self._cluster)
        raw = await self._redis.execute_command("GET", key, **node_of(self._redis, key))
        try:
            self.planned = None if raw is None else _decode_planned(raw)
        except msgspec.MsgspecError as error:
            log.warning("the planner's decision can't be read: %s", error)
            self.planned = None
        self._metrics.observe_planned(self.planned)

    def _pause_s(self) -> float:
        return self._poll_s * self._rng.uniform(0.8, 1.2)

    async def _read_registry(self) -> tuple[dict[str, WorkerInfo], dict[str, int | None]]:
        """Workers whose lease is alive; for each, the seq of its snapshot (None: there is no snapshot)."""
        if isinstance(self._redis, redis.asyncio.RedisCluster):
            await self._redis.initialize()
        registered: dict[str, WorkerInfo] = {}
        positions: dict[str, int | None] = {}
        infos: list[WorkerInfo] = []
        for partition in redis_keys.all_partitions(self._cluster, self._num_partitions):
            found = await self._read_partition(partition)
            infos += [info for info, _, _ in found]
            for info, lease, seq in found:
                if lease == b"%d" % info.epoch:
                    registered[info.worker_id] = info
                    positions[info.worker_id] = None if seq is None else int(seq)
        self._infos = {info.worker_id: self._infos[info.worker_id] for info in infos}
        return registered, positions

    async def _read_partition(self, partition: str) -> list[tuple[WorkerInfo, bytes | None, bytes | None]]:
        """Everyone in its registry, with lease and seq."""
        key = redis_keys.workers(partition)
        raw = await self._redis.execute_command("HGETALL", key, **node_of(self._redis, key))
        infos = [info for name, value in raw.items() if (info := self._decode(name, value)) is not None]
        if not infos:
            return []
        leases = [redis_keys.lease(partition, info.worker_id) for info in infos]
        seqs = [redis_keys.index_seq(partition, info.worker_id, info.epoch) for info in infos]
        values = await self._redis.execute_command("MGET", *leases, *seqs, **node_of(self._redis, key))
        return list(zip(infos, values[: len(infos)], values[len(infos) :], strict=True))

    def _decode(self, key: bytes, value: bytes) -> WorkerInfo | None:
        worker_id = key.decode(errors="replace")
        known = self._infos.get(worker_id)
        if known is not None and known[0] == value:
            return known[1]
        try:
            info = _decode_info(value)
        except msgspec.MsgspecError as error:
            log.warning("registry: worker %s has an entry that can't be read: %s", worker_id, error)
            return None
        if info.worker_id != worker_id:
            log.warning("registry: worker %s is registered under the name %s", info.worker_id, worker_id)
            return None
        self._infos[worker_id] = (value, info)
        return info

    def _came_back(self) -> None:
        if self.redis == "away":
            log.info("Redis is there")
            self.redis = "ok"

    def _went_away(self, error: BaseException) -> None:
        self.feed.nothing_is_exact()
        if self.redis == "ok":
            log.warning("Redis is away, routing goes on from what is known: %s", error)
            self.redis = "away"

    def _compare(self, positions: dict[str, int | None]) -> None:
        members = {member.info.worker_id: member.info for member in self._fleet.members()}
        for worker_id in self._index.workers():
            if worker_id not in members:
                self.feed.forget(worker_id)
        for worker_id, info in members.items():
            self.feed.compare(worker_id, info.epoch, positions.get(worker_id))
