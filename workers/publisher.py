"""Tells the cluster that this worker is alive and what it has cached: registration, lease and index, in Redis.

A thread of its own, so that neither a slow nor a missing Redis is ever felt by the engine. What it keeps is bounded:
events are coalesced by hash, and while Redis is away none are kept at all, because the first thing it does when Redis
is back is to clear what is there and to publish everything anew. The same happens when Redis turns out to have lost
what was published (a flush, a restart): every write and every heartbeat checks the number of the last batch.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import msgspec

from workers.protocol import redis_keys
from workers.protocol.messages import IndexBatch, WorkerInfo
from workers.protocol.redis_address import RedisAddress
from workers.protocol.redis_client import TROUBLE, Client, Functions, connect
from workers.protocol.tiers import Removed, Stored, pack_member

log = logging.getLogger(__name__)

_HASHES_PER_BATCH = 1024
_LOG_LENGTH = 4096  # batches kept in the stream; a router that is further behind reads a snapshot
_MAX_PENDING = 65_536  # hashes; more than that and a snapshot is cheaper
_GATHER_S = 0.005  # seconds given to further events before a batch is sent
_MAX_BACKOFF_S = 1.0
_TIMEOUT_S = 2.0


class Publisher:
    """`publish` may be called from any one thread at a time; everything else happens on the publisher's own.

    `snapshot` answers (hash, parent, tier) of everything held. It is called on the publisher's thread, and `publish` must
    have been given every change that the answer reflects *before* it returns. With an engine: take the lock, publish
    what pool and tiers have to tell (`drain_events`), then list what it holds; and publish under the same lock elsewhere.
    Changes that are published once more after a snapshot do no harm, changes that never are would.
    """

    def __init__(
        self,
        info: WorkerInfo,
        redis_url: str,
        cluster: str,
        lease_s: float,
        snapshot: Callable[[], Sequence[Stored]],
    ) -> None:
        self._info = info
        self._lease_s = lease_s
        self._snapshot = snapshot
        self._address = RedisAddress.parse(redis_url)
        self._redis: Client | None = None
        self._functions: Functions | None = None
        cluster = redis_keys.partition(cluster, info.worker_id, self._address.partitions)
        blocks = redis_keys.index_blocks(cluster, info.worker_id, info.epoch)
        seq = redis_keys.index_seq(cluster, info.worker_id, info.epoch)
        self._publish_keys = [redis_keys.index_stream(cluster), blocks, seq]
        self._own_keys = [redis_keys.workers(cluster), redis_keys.lease(cluster, info.worker_id), blocks, seq]
        self._packed_info = msgspec.msgpack.encode(info)
        self._lease_ms = max(1, round(lease_s * 1000))
        self._ttl_ms = 3 * self._lease_ms  # of index keys: they outlive a short pause, not the worker
        self._changed = threading.Condition()
        # (hash, tier) -> parent when stored, None when removed: the last that happened
        self._pending: dict[Removed, bytes | None] = {}
        self._synced = False  # what Redis holds + pending = what the worker holds
        self._closing = False
        self._seq = 0
        self._superseded = False
        self._thread = threading.Thread(target=self._run, name="index-publisher", daemon=True)

    @property
    def superseded(self) -> bool:
        """A later life of this worker is registered: this one should end."""
        return self._superseded

    @property
    def synced(self) -> bool:
        """Redis holds the index of this worker, up to changes that are on their way."""
        return self._synced

    def start(self) -> None:
        self._thread.start()

    def publish(self, stored: Sequence[Stored], removed: Sequence[Removed]) -> None:
        """Take note of changes: `removed` happened before `stored`, and both after all earlier calls. Never blocks."""
        if not stored and not removed:
            return
        with self._changed:
            if not self._synced:
                return  # the snapshot will tell
            for gone in removed:
                self._pending[gone] = None
            for block_hash, parent, tier in stored:
                self._pending[block_hash, tier] = parent
            if len(self._pending) > _MAX_PENDING:
                self._forget_pending()
            self._changed.notify()

    def close(self, timeout_s: float = 3.0) -> None:
        """Leave the registry, give up the lease, delete the index keys. Idempotent; no error when Redis is away."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        try:
            self._call("leave", self._own_keys, [self._info.worker_id, self._info.epoch])
        except TROUBLE as error:
            log.info("left without telling Redis, the lease will run out: %s", error)
        if self._redis is not None:
            self._redis.close()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        beat_at = 0.0
        backoff_s = 0.05
        while not self._closing:
            try:
                if time.monotonic() >= beat_at:
                    self._beat()
                    beat_at = time.monotonic() + self._lease_s / 3
                if not self._synced:
                    self._publish_everything()
                else:
                    self._publish_pending()
                backoff_s = 0.05
            except TROUBLE as error:
                log.warning("Redis is away, the index will be published anew: %s", error)
                with self._changed:
                    self._forget_pending()
                    self._changed.wait_for(lambda: self._closing, backoff_s * random.uniform(0.5, 1.5))
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
                beat_at = 0.0
                continue
            with self._changed:
                if self._synced:
                    self._changed.wait_for(
                        lambda: self._closing or self._pending or not self._synced,
                        max(beat_at - time.monotonic(), 0.0),
                    )
                    self._changed.wait_for(lambda: self._closing, _GATHER_S)

    def _call(self, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """One of the functions in index.lua. Connects first where that has not been possible so far."""
        if self._functions is None:
            self._redis = connect(self._address, _TIMEOUT_S)
            self._functions = Functions(self._redis)
        return self._functions.call(name, keys, args)

    def _forget_pending(self) -> None:
        self._synced = False
        self._pending = {}

    def _beat(self) -> None:
        seq = self._call(
            "heartbeat",
            self._own_keys,
            [self._info.worker_id, self._info.epoch, self._packed_info, self._lease_ms, self._ttl_ms],
        )
        if seq == -2:
            if not self._superseded:
                log.error("a later life of worker %s is registered", self._info.worker_id)
            self._superseded = True
        elif seq != self._seq and self._synced:
            log.warning("Redis lost the index (batch %d is there, %d was the last)", seq, self._seq)
            with self._changed:
                self._forget_pending()

    def _publish_everything(self) -> None:
        with self._changed:
            self._synced = True  # from here on changes are kept, and replayed on top of the snapshot
        held = list(self._snapshot())
        if not self._send([], [], cleared=True):
            return
        rest = iter(held)
        while chunk := list(islice(rest, _HASHES_PER_BATCH)):
            if not self._send(chunk, [], cleared=False):
                return

    def _publish_pending(self) -> None:
        with self._changed:
            changes, self._pending = self._pending, {}
        rest = iter(changes.items())
        # Nothing is in two batches, so their order among each other does not matter; within one, removed go first.
        while chunk := list(islice(rest, _HASHES_PER_BATCH)):
            stored = [(h, parent, tier) for (h, tier), parent in chunk if parent is not None]
            removed = [gone for gone, parent in chunk if parent is None]
            if not self._send(stored, removed, cleared=False):
                return

    def _send(self, stored: list[Stored], removed: list[Removed], *, cleared: bool) -> bool:
        """False: Redis does not hold the batch before this one; everything has to be published anew."""
        # A number is used up even when the answer is lost: if Redis has taken the batch, routers know it by that number.
        seq = self._seq = self._seq + 1
        batch = IndexBatch(
            worker_id=self._info.worker_id,
            epoch=self._info.epoch,
            seq=seq,
            stored=stored,
            removed=removed,
            cleared=cleared,
        )
        taken = self._call(
            "publish",
            self._publish_keys,
            [
                msgspec.msgpack.encode(batch),
                seq,
                "1" if cleared else "0",
                b"".join(pack_member(block_hash, tier) for block_hash, tier in removed),
                b"".join(pack_member(block_hash, tier) for block_hash, _, tier in stored),
                self._ttl_ms,
                _LOG_LENGTH,
            ],
        )
        if taken:
            return True
        log.warning("Redis does not hold batch %d, the index is published anew", seq - 1)
        with self._changed:
            self._forget_pending()
        return False
