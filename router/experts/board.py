"""What ranks and routers tell each other about experts, read from Redis and written there (protocol/expert_messages.py).

Every method raises one of redis_client.TROUBLE while Redis is away. What can't be decoded is told once and left out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal

import msgspec
import redis.asyncio

from workers.protocol import redis_keys
from workers.protocol.expert_messages import ExpertCounts, ExpertPost, ExpertRank
from workers.protocol.redis_address import RedisAddress
from workers.protocol.redis_client import TROUBLE, AsyncFunctions, connect_async, node_of

log = logging.getLogger(__name__)

_MESSAGES_PER_READ = 64
_RECENT_MS = 5_000
_TIMEOUT_S = 2.0

_decode_rank = msgspec.msgpack.Decoder(ExpertRank).decode
_decode_counts = msgspec.msgpack.Decoder(ExpertCounts).decode
_decode_post = msgspec.msgpack.Decoder(ExpertPost).decode

Posted = Literal["posted", "not leading", "not new"]


class Board:
    """Of one cluster, for the router `router_id`."""

    def __init__(self, redis_url: str, cluster: str, router_id: str) -> None:
        self._cluster = cluster
        self._router_id = router_id
        self._redis: Any = connect_async(RedisAddress.parse(redis_url), timeout_s=_TIMEOUT_S)
        self._functions = AsyncFunctions(self._redis)
        self._reports: dict[
            bytes, tuple[bytes, ExpertRank | None]
        ] = {}  # decoded once, while they stay the same
        self._positions: dict[str, bytes] = {}  # group -> how far its log was read
        self._posts: dict[str, ExpertPost] = {}

    async def ranks(self) -> list[ExpertRank]:
        """Of all groups, the dead ones included."""
        key = redis_keys.expert_ranks(self._cluster)
        raw: dict[bytes, bytes] = await self._run("HGETALL", key)
        reports = {name: self._report(name, value) for name, value in raw.items()}
        self._reports = {name: (raw[name], report) for name, report in reports.items()}
        return [report for report in reports.values() if report is not None]

    def _report(self, name: bytes, value: bytes) -> ExpertRank | None:
        known = self._reports.get(name)
        if known is not None and known[0] == value:
            return known[1]
        try:
            report = _decode_rank(value)
        except msgspec.MsgspecError as error:
            log.warning(
                "experts: what worker %s says can't be read: %s", name.decode(errors="replace"), error
            )
            return None
        if report.worker_id.encode() != name:
            log.warning("experts: worker %s reports under the name %s", report.worker_id, name.decode())
            return None
        return report

    async def counts(self, groups: Iterable[str]) -> list[ExpertCounts]:
        """What was counted since the last call; at the first one of a group, in the last seconds of its log."""
        found: list[ExpertCounts] = []
        wanted = list(groups)
        for group in wanted:
            if group not in self._positions:
                self._positions[group] = await self._beginning(group)
            found += await self._counts_of(group)
        self._positions = {group: self._positions[group] for group in wanted}
        return found

    async def _beginning(self, group: str) -> bytes:
        """Where to begin: counts of long ago would be taken for new ones. Ids in a log are Redis' own milliseconds."""
        key = redis_keys.expert_counts(self._cluster, group)
        last = await self._run("XREVRANGE", key, after=("+", "-", "COUNT", 1))
        if not last:
            return b"0-0"
        milliseconds = int(last[0][0].partition(b"-")[0])
        return b"%d-0" % max(milliseconds - _RECENT_MS, 0)

    async def _counts_of(self, group: str) -> list[ExpertCounts]:
        key = redis_keys.expert_counts(self._cluster, group)
        found: list[ExpertCounts] = []
        while True:
            answer = await self._run(
                "XREAD", key, before=("COUNT", _MESSAGES_PER_READ, "STREAMS"), after=(self._positions[group],)
            )
            entries = _entries(answer)
            for position, fields in entries:
                self._positions[group] = position
                try:
                    counts = _decode_counts(fields.get(b"c", b""))
                except msgspec.MsgspecError as error:
                    log.warning("experts: counts of group %s can't be read: %s", group, error)
                    continue
                if counts.group != group:
                    log.warning("experts: counts of group %s are in the log of %s", counts.group, group)
                    continue
                found.append(counts)
            if len(entries) < _MESSAGES_PER_READ:
                return found

    async def post_of(self, group: str) -> ExpertPost | None:
        """What was posted last."""
        raw = await self._run("GET", redis_keys.expert_version(self._cluster, group))
        known = self._posts.get(group)
        if raw is None or (known is not None and known.placement.version == int(raw)):
            return None if raw is None else known
        raw = await self._run("GET", redis_keys.expert_post(self._cluster, group))
        try:
            post = None if raw is None else _decode_post(raw)
        except msgspec.MsgspecError as error:
            log.warning("experts: the placement posted for group %s can't be read: %s", group, error)
            return None
        if post is not None:
            self._posts[group] = post
        return post

    async def lead(self, lease_s: float) -> str:
        """The router that plans: this one, if nobody else does."""
        key = redis_keys.expert_planner(self._cluster)
        holder: bytes = await self._functions.call("lead", [key], [self._router_id, int(lease_s * 1e3)])
        return holder.decode(errors="replace")

    async def post(self, post: ExpertPost) -> Posted:
        keys = [
            redis_keys.expert_planner(self._cluster),
            redis_keys.expert_version(self._cluster, post.group),
            redis_keys.expert_post(self._cluster, post.group),
        ]
        args = [self._router_id, post.placement.version, msgspec.msgpack.encode(post)]
        done = await self._functions.call("post", keys, args)
        if done == 1:
            self._posts[post.group] = post
        return "posted" if done == 1 else "not leading" if done == 0 else "not new"

    async def version(self, group: str) -> int:
        """The last that was posted; 0 when there was none, or Redis has lost it."""
        return int(await self._run("GET", redis_keys.expert_version(self._cluster, group)) or 0)

    async def forget(self, worker_ids: Iterable[str]) -> None:
        """Reports of workers that are gone for good."""
        names = list(worker_ids)
        if names:
            await self._run("HDEL", redis_keys.expert_ranks(self._cluster), after=names)

    async def close(self) -> None:
        """Gives the lease back, if it is this router's."""
        try:
            key = redis_keys.expert_planner(self._cluster)
            await self._functions.call("resign", [key], [self._router_id])
            await self._redis.aclose()
        except TROUBLE as error:
            log.debug("experts: closing the connection to Redis: %s", error)

    async def _run(
        self, command: str, key: str, before: Iterable[Any] = (), after: Iterable[Any] = ()
    ) -> Any:
        if isinstance(self._redis, redis.asyncio.RedisCluster):
            await self._redis.initialize()
        return await self._redis.execute_command(command, *before, key, *after, **node_of(self._redis, key))


def _entries(answer: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """What XREAD of one stream answers: a mapping or a list of pairs, depending on the protocol."""
    streams = list(answer.items() if isinstance(answer, dict) else answer or ())
    return [] if not streams else list(streams[0][1])
