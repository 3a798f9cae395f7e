"""Redis, read: who is registered (polled), and what they cache (the index stream, tailed).

Two tasks. The poll hands the registry to the fleet and reads snapshots of workers that are new, lost batches, or were
not heard of since Redis was away. The tail applies the stream's batches as they come. A snapshot that is read after
the tail has its place in the stream can't miss anything: batches that it holds already are recognised by their number.

Redis away: nothing is taken down. Links and index stay as they are, and the index is approximate until every worker's
snapshot has been read again. A Redis that comes back empty has no snapshots; workers notice and publish theirs anew.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any, Literal, cast

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from router.dispatch_metrics import DispatchMetrics
from router.fleet import Fleet
from router.prefix_index import PrefixIndex
from workers.protocol import redis_keys
from workers.protocol.messages import IndexBatch, WorkerInfo
from workers.protocol.tiers import unpack_member

log = logging.getLogger(__name__)

# One worker's set of (hash, tier) and the number of the last batch in it, as of one moment.
_SNAPSHOT_SCRIPT = "return {redis.call('GET', KEYS[1]), redis.call('SMEMBERS', KEYS[2])}"

_BLOCK_MS = 1000
_BATCHES_PER_READ = 64
_TROUBLE = (RedisError, OSError, TimeoutError)

Entry = tuple[bytes, dict[bytes, bytes]]  # id and fields in the stream

_decode_info = msgspec.msgpack.Decoder(WorkerInfo).decode
_decode_batch = msgspec.msgpack.Decoder(IndexBatch).decode


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
        self._poll_redis = _connect(redis_url, timeout_s=2.0)
        self._tail_redis = _connect(redis_url, timeout_s=_BLOCK_MS / 1000 + 2.0)
        self._snapshot_script = self._poll_redis.register_script(_SNAPSHOT_SCRIPT)
        self._tail_snapshot_script = self._tail_redis.register_script(_SNAPSHOT_SCRIPT)
        self._infos: dict[str, tuple[bytes, WorkerInfo]] = {}  # decoded once, while the bytes stay the same
        self._synced: dict[str, int] = {}  # worker -> epoch whose entries are exact
        self._seen_seq: dict[str, int] = {}  # worker -> seq in Redis at the last poll
        self._tail_id: bytes | None = None  # None: the tail has no place in the stream yet
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._poll()), asyncio.create_task(self._tail())]

    async def stop(self) -> None:
        self._stopping = True
        running = set(self._tasks)
        while running:
            # Once is not enough: on Python 3.11 redis-py's wait_for() can swallow a cancellation (bpo-42130).
            for task in running:
                task.cancel()
            _, running = await asyncio.wait(running, timeout=0.1)
        for redis in (self._poll_redis, self._tail_redis):
            try:
                await redis.aclose()
            except _TROUBLE as error:
                log.debug("closing the connection to Redis: %s", error)

    def is_exact(self, worker_id: str, epoch: int) -> bool:
        """False: what this replica routes to the worker is worth noting (approximate mode)."""
        return self._synced.get(worker_id) == epoch

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
                await self._catch_up(positions)
            except _TROUBLE as error:
                self._went_away(error)
            self._metrics.observe_index(self._index, self.approximate)
            await asyncio.sleep(self._poll_s * self._rng.uniform(0.8, 1.2))

    async def _read_registry(self) -> tuple[dict[str, WorkerInfo], dict[str, int | None]]:
        """Workers whose lease is alive; for each, the seq of its snapshot (None: there is no snapshot)."""
        raw = cast(dict[bytes, bytes], await self._poll_redis.hgetall(redis_keys.workers(self._cluster)))
        infos = [info for key, value in raw.items() if (info := self._decode(key, value)) is not None]
        self._infos = {info.worker_id: self._infos[info.worker_id] for info in infos}
        if not infos:
            return {}, {}
        leases = [redis_keys.lease(self._cluster, info.worker_id) for info in infos]
        seqs = [redis_keys.index_seq(self._cluster, info.worker_id, info.epoch) for info in infos]
        values = await self._poll_redis.mget(leases + seqs)
        registered, positions = {}, {}
        for info, lease, seq in zip(infos, values[: len(infos)], values[len(infos) :], strict=True):
            if lease == b"%d" % info.epoch:
                registered[info.worker_id] = info
                positions[info.worker_id] = None if seq is None else int(seq)
        return registered, positions

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
        self._synced.clear()
        if self.redis == "ok":
            log.warning("Redis is away, routing goes on from what is known: %s", error)
            self.redis = "away"

    # --- the index --------------------------------------------------------------------------------------------------

    async def _catch_up(self, positions: dict[str, int | None]) -> None:
        """Read the snapshots that are missing or that the tail fell behind of."""
        members = {member.info.worker_id: member.info for member in self._fleet.members()}
        for worker_id in self._index.workers():
            if worker_id not in members:
                self._index.drop(worker_id)
                self._synced.pop(worker_id, None)
        if self._tail_id is None:
            return
        for worker_id, info in members.items():
            in_redis = positions.get(worker_id)
            if in_redis is None:
                self._synced.pop(worker_id, None)
                continue
            position = self._index.position(worker_id, info.epoch)
            # The tail may be a poll behind; more than that means that the log lost something at its end.
            lost = position is not None and position < min(self._seen_seq.get(worker_id, 0), in_redis)
            self._seen_seq[worker_id] = in_redis
            if lost or position is None or not self.is_exact(worker_id, info.epoch):
                await self._read_snapshot(worker_id, info.epoch, self._snapshot_script)

    async def _read_snapshot(self, worker_id: str, epoch: int, script: Any) -> None:
        keys = [
            redis_keys.index_seq(self._cluster, worker_id, epoch),
            redis_keys.index_blocks(self._cluster, worker_id, epoch),
        ]
        seq, members = await script(keys=keys)
        held = map(unpack_member, members)
        if seq is not None and self._index.load_snapshot(worker_id, epoch, int(seq), held):
            self._synced[worker_id] = epoch
            self._metrics.snapshots.inc()

    async def _tail(self) -> None:
        log_key = redis_keys.index_stream(self._cluster)
        while not self._stopping:
            try:
                if self._tail_id is None:
                    newest = cast(list[Entry], await self._tail_redis.xrevrange(log_key, count=1))
                    self._tail_id = newest[0][0] if newest else b"0-0"
                answer = await self._tail_redis.xread(
                    {log_key: self._tail_id}, count=_BATCHES_PER_READ, block=_BLOCK_MS
                )
                for _, entries in cast(list[tuple[bytes, list[Entry]]], answer):
                    await self._apply(entries)
            except _TROUBLE as error:
                # The stream may be another one when Redis is back: take a new place in it, then read snapshots.
                self._tail_id = None
                self._went_away(error)
                await asyncio.sleep(self._poll_s * self._rng.uniform(0.8, 1.2))

    async def _apply(self, entries: list[Entry]) -> None:
        gaps: dict[str, int] = {}
        for entry_id, fields in entries:
            try:
                batch = _decode_batch(fields.get(b"b", b""))
            except msgspec.MsgspecError as error:
                log.warning("index log: entry %r can't be read: %s", entry_id, error)
            else:
                if self._index.apply(batch):
                    gaps[batch.worker_id] = batch.epoch
            self._tail_id = entry_id
        for worker_id, epoch in gaps.items():
            self._metrics.gaps.inc()
            await self._read_snapshot(worker_id, epoch, self._tail_snapshot_script)


def _connect(url: str, timeout_s: float) -> Redis:
    """No retries inside the client: both tasks are loops already, and must notice at once."""
    return Redis.from_url(
        url, socket_timeout=timeout_s, socket_connect_timeout=2.0, retry=Retry(NoBackoff(), 0)
    )
