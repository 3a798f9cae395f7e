"""What workers cache, read from Redis into the index: the log as it comes, and snapshots where it has no beginning.

For each partition of the keys one task tails its log. One more task reads the snapshots that are wanted: of workers that
are new, lost batches, or were not heard of since Redis was away. A snapshot is read in pieces, and taken in a few
hundred blocks at a time, so that requests are served meanwhile; the log makes the pieces whole (SnapshotLoad). What
workers that went have left behind is taken out of the index in slices by a third kind of task.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple, cast

import msgspec
import redis.asyncio

from router.dispatch_metrics import DispatchMetrics
from router.prefix_index import PrefixIndex, SnapshotLoad
from workers.protocol import redis_keys
from workers.protocol.hashes import HASH_BYTES
from workers.protocol.messages import IndexBatch
from workers.protocol.redis_address import RedisAddress
from workers.protocol.redis_client import TROUBLE, AsyncFunctions, connect_async, node_of
from workers.protocol.tiers import MEMBER_BYTES, Removed, unpack_member

log = logging.getLogger(__name__)

_BLOCK_MS = 250  # also how soon a quiet log is known to have come to its end
_BATCHES_PER_READ = 64
_PIECE_BLOCKS = 4096  # asked of Redis at a time
_STEP_BLOCKS = 512  # taken in before others get their turn: half a millisecond
_CATCH_UP_S = 1.0  # for the log to come up to the snapshot that was read
_TIDY_PAUSE_S = 0.005

Entry = tuple[bytes, dict[bytes, bytes]]  # id and fields in the stream

_decode_batch = msgspec.msgpack.Decoder(IndexBatch).decode


class _Seen(NamedTuple):
    """What a poll found of a worker."""

    epoch: int
    seq: int
    ends: int  # how often the log had been read to its end by then


class IndexFeed:
    """`trouble` is told when Redis is away; what was exact is not any more then."""

    def __init__(
        self,
        address: RedisAddress,
        cluster: str,
        *,
        index: PrefixIndex,
        metrics: DispatchMetrics,
        trouble: Callable[[BaseException], None],
        pause_s: Callable[[], float],
    ) -> None:
        self._index = index
        self._metrics = metrics
        self._trouble = trouble
        self._pause_s = pause_s
        self._cluster = cluster
        self._num_partitions = address.partitions
        self._tail_redis = connect_async(address, timeout_s=_BLOCK_MS / 1000 + 2.0)
        self._redis = connect_async(address, timeout_s=2.0)
        self._functions = AsyncFunctions(self._redis)
        self._tail_ids: dict[str, bytes] = {}  # partition -> place in its log; absent: it has none yet
        self._synced: dict[str, int] = {}  # worker -> epoch whose entries are exact
        self._ends: dict[str, int] = {}  # partition -> how often its log was read to the end
        self._seen: dict[str, _Seen] = {}  # worker -> what Redis said, as yet unproven
        self._wanted: dict[str, int] = {}  # worker -> epoch whose snapshot is to be read
        self._wanting = asyncio.Event()
        self._stopping = False

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        partitions = redis_keys.all_partitions(self._cluster, self._num_partitions)
        return [*map(self._tail, partitions), self._read_snapshots(), self._tidy()]

    def stop(self) -> None:
        self._stopping = True

    async def close(self) -> None:
        for client in (self._redis, self._tail_redis):
            try:
                await client.aclose()
            except TROUBLE as error:
                log.debug("closing the connection to Redis: %s", error)

    # --- what is known ----------------------------------------------------------------------------------------------

    def is_exact(self, worker_id: str, epoch: int) -> bool:
        return self._synced.get(worker_id) == epoch

    def nothing_is_exact(self) -> None:
        self._synced.clear()
        self._seen.clear()

    def forget(self, worker_id: str) -> None:
        self._index.drop(worker_id)
        for known in (self._synced, self._seen, self._wanted):
            known.pop(worker_id, None)

    def compare(self, worker_id: str, epoch: int, in_redis: int | None) -> None:
        """`in_redis`: number of the last batch there; None: Redis has no snapshot of this life."""
        partition = self._partition(worker_id)
        if partition not in self._tail_ids:
            return
        if in_redis is None:
            self._synced.pop(worker_id, None)
            return
        position = self._index.position(worker_id, epoch)
        if (
            position is None
            or not self.is_exact(worker_id, epoch)
            or self._is_lost(worker_id, _Seen(epoch, in_redis, self._ends.get(partition, 0)), position)
        ):
            self._want(worker_id, epoch)

    def _is_lost(self, worker_id: str, now: _Seen, position: int) -> bool:
        """The log has been read to its end, by a read that began after Redis named a number, and did not bring it there.

        A tail that is merely behind is given its time: to read snapshots would put it further back.
        """
        seen = self._seen.get(worker_id)
        if seen is None or seen.epoch != now.epoch or position >= seen.seq or now.seq < seen.seq:
            self._seen[worker_id] = now
            return False
        if now.ends < seen.ends + 2:  # the first of them may have been under way already
            return False
        del self._seen[worker_id]
        return True

    def _want(self, worker_id: str, epoch: int) -> None:
        self._wanted[worker_id] = epoch
        self._wanting.set()

    def _partition(self, worker_id: str) -> str:
        return redis_keys.partition(self._cluster, worker_id, self._num_partitions)

    # --- the log ----------------------------------------------------------------------------------------------------

    async def _tail(self, partition: str) -> None:
        key = redis_keys.index_stream(partition)
        while not self._stopping:
            try:
                place = self._tail_ids.get(partition)
                if place is None:
                    newest = cast(list[Entry], await self._ask("XREVRANGE", key, "+", "-", "COUNT", 1))
                    place = self._tail_ids[partition] = newest[0][0] if newest else b"0-0"
                read = ("XREAD", "COUNT", _BATCHES_PER_READ, "BLOCK", _BLOCK_MS, "STREAMS")
                answer = await self._ask(*read, key, place, key=key)
                read_to_end = True
                for _, entries in _streams(answer):
                    read_to_end = len(entries) < _BATCHES_PER_READ
                    await self._apply(partition, entries)
                if read_to_end:
                    self._ends[partition] = self._ends.get(partition, 0) + 1
            except TROUBLE as error:
                # The stream may be another one when Redis is back: take a new place in it, then read snapshots.
                self._tail_ids.pop(partition, None)
                self._trouble(error)
                await asyncio.sleep(self._pause_s())

    async def _ask(self, *command: Any, key: str | None = None) -> Any:
        client: Any = self._tail_redis
        if isinstance(client, redis.asyncio.RedisCluster):
            await client.initialize()
        return await client.execute_command(*command, **node_of(client, key or command[1]))

    async def _apply(self, partition: str, entries: list[Entry]) -> None:
        taken = 0
        for entry_id, fields in entries:
            try:
                batch = _decode_batch(fields.get(b"b", b""))
                _check_widths(batch)
            except (msgspec.MsgspecError, ValueError) as error:
                log.warning("index log: entry %r can't be read: %s", entry_id, error)
            else:
                if self._index.apply(batch):
                    self._metrics.gaps.inc()
                    self._synced.pop(batch.worker_id, None)
                    self._want(batch.worker_id, batch.epoch)
                taken += len(batch.stored) + len(batch.removed)
            self._tail_ids[partition] = entry_id
            if taken > _STEP_BLOCKS:
                taken = 0
                await asyncio.sleep(0)

    # --- snapshots --------------------------------------------------------------------------------------------------

    async def _read_snapshots(self) -> None:
        while not self._stopping:
            await self._wanting.wait()
            while self._wanted:
                worker_id, epoch = next(iter(self._wanted.items()))
                del self._wanted[worker_id]
                try:
                    await self._read_snapshot(worker_id, epoch)
                except TROUBLE as error:
                    self._wanted.clear()  # who polls will want them again
                    self._trouble(error)
                    await asyncio.sleep(self._pause_s())
            self._wanting.clear()

    async def _read_snapshot(self, worker_id: str, epoch: int) -> None:
        partition = self._partition(worker_id)
        keys = [
            redis_keys.index_blocks(partition, worker_id, epoch),
            redis_keys.index_seq(partition, worker_id, epoch),
        ]
        load = self._index.begin_snapshot(worker_id, epoch)
        try:
            cursor: bytes | str = "0"
            while not load.over:
                seq, cursor, members = await self._functions.call("snapshot", keys, [cursor, _PIECE_BLOCKS])
                if seq < 0:
                    return  # Redis has lost it: the worker will notice, and publish everything anew
                await self._take(load, seq, members)
                if cursor in (b"0", "0"):
                    break
            await self._catch_up(load)
            if load.finish():
                self._synced[worker_id] = epoch
                self._wanted.pop(worker_id, None)  # gaps that were noticed meanwhile are mended
                self._metrics.snapshots.inc()
        except struct.error as error:
            log.warning("snapshot of %s:%d can't be read: %s", worker_id, epoch, error)
        finally:
            load.abandon()

    async def _take(self, load: SnapshotLoad, seq: int, members: bytes) -> None:
        load.add(seq, ())
        for start in range(0, len(members), _STEP_BLOCKS * MEMBER_BYTES):
            load.add(seq, unpack_members(members[start : start + _STEP_BLOCKS * MEMBER_BYTES]))
            await asyncio.sleep(0)

    async def _catch_up(self, load: SnapshotLoad) -> None:
        """Take what came while it was read, and wait for what is yet to come."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _CATCH_UP_S
        while not load.over:
            more = load.replay(limit=1)
            if not more and (not load.behind or loop.time() > deadline):
                return
            await asyncio.sleep(0 if more else _TIDY_PAUSE_S)

    # --- what was left behind ---------------------------------------------------------------------------------------

    async def _tidy(self) -> None:
        while not self._stopping:
            more = self._index.tidy()
            await asyncio.sleep(_TIDY_PAUSE_S if more else self._pause_s())


def unpack_members(members: bytes) -> Iterator[Removed]:
    """Members of a snapshot, concatenated."""
    return map(unpack_member, (member for (member,) in struct.iter_unpack(f"{MEMBER_BYTES}s", members)))


def _check_widths(batch: IndexBatch) -> None:
    """A hash of another width would be nobody's prefix, and one of no width has no place in the index."""
    for changes in (batch.stored, batch.removed):
        for change in changes:
            if len(change[0]) != HASH_BYTES:
                raise ValueError(f"a hash of {batch.worker_id} has {len(change[0])} bytes, not {HASH_BYTES}")


def _streams(answer: Any) -> list[tuple[bytes, list[Entry]]]:
    """What XREAD answers: a mapping or a list of pairs, depending on the protocol."""
    return list(answer.items() if isinstance(answer, dict) else answer or ())
