"""A rank's side of Redis: what it holds and has counted, and the placements that routers post (protocol/expert_messages.py)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from workers.experts.group import GroupStatus
from workers.experts.plane import ExpertPlane
from workers.protocol import redis_keys
from workers.protocol.expert_messages import ExpertCounts, ExpertPost, ExpertRank
from workers.protocol.messages import Role
from workers.protocol.redis_address import RedisAddress
from workers.protocol.redis_client import TROUBLE, Client, connect, node_of

logger = logging.getLogger(__name__)

_TIMEOUT_S = 2.0
_LOG_LENGTH = 16  # messages kept for each rank: a router that comes reads no more
_MOST = 2**32 - 1  # a count; more in one message would take a rank minutes


class RankBoard:
    """A thread of its own: neither a slow nor a missing Redis is felt by the ranks, which go on as they are."""

    def __init__(
        self, plane: ExpertPlane, role: Role, redis_url: str, cluster: str, node: str, heartbeat_s: float
    ) -> None:
        """`node`: ranks with the same one are near each other."""
        self._plane, self._role, self._node = plane, role, node
        self._cluster, self._heartbeat_s = cluster, heartbeat_s
        self._address = RedisAddress.parse(redis_url)
        self._client: Client | None = None
        self._seq = 0
        self._log_length = _LOG_LENGTH * plane.place.size
        self._counted_at = time.monotonic()
        self._unsent: ExpertCounts | None = None  # as Redis may have got it and not said so
        self._seen = 0  # the version of the post that was read last
        self._away = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="experts-board", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Leaves no report behind, if Redis is there."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_TIMEOUT_S + 1)
        try:
            self._redis("HDEL", redis_keys.expert_ranks(self._cluster), self._plane.place.worker_id)
        except TROUBLE as error:
            logger.debug("Redis is away: %s", error)
        if self._client is not None:
            self._client.close()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self.beat()
            except TROUBLE as error:
                if not self._away:
                    logger.warning("Redis is away, experts stay where they are: %s", error)
                self._away = True
            else:
                self._away = False
            self._closing.wait(self._heartbeat_s)

    def beat(self) -> None:
        """Report, and look for a new placement. Raises one of TROUBLE."""
        group, status = self._plane.place.group, self._plane.group.status
        key = redis_keys.expert_ranks(self._cluster)
        self._redis("HSET", key, self._plane.place.worker_id, msgspec.msgpack.encode(self._report(status)))
        self._unsent = self._unsent or self._counts(status)
        if self._unsent is not None:
            key = redis_keys.expert_counts(self._cluster, group)
            packed = msgspec.msgpack.encode(self._unsent)
            self._redis("XADD", key, "MAXLEN", "~", self._log_length, "*", "c", packed)
            self._unsent = None  # until here it is sent again as it is: routers take a number once
        posted = int(self._redis("GET", redis_keys.expert_version(self._cluster, group)) or 0)
        if posted > self._seen:
            raw = self._redis("GET", redis_keys.expert_post(self._cluster, group))
            self._seen = posted
            if raw is not None:
                self._heed(raw)

    def _heed(self, raw: bytes) -> None:
        try:
            post = msgspec.msgpack.decode(raw, type=ExpertPost)
        except msgspec.MsgspecError as error:
            logger.warning("a posted placement can't be read: %s", error)
            return
        self._seen = post.placement.version
        self._plane.group.propose(post.placement)

    def _report(self, status: GroupStatus) -> ExpertRank:
        place, group = self._plane.place, self._plane.group
        return ExpertRank(
            group=place.group,
            rank=place.rank,
            worker_id=place.worker_id,
            epoch=place.epoch,
            role=self._role,
            num_ranks=place.size,
            num_layers=group.model.num_layers,
            num_experts=group.model.num_experts,
            expert_bytes=group.holdings.expert_bytes,
            slots=group.slots,
            version=status.version,
            experts=[list(experts) for experts in status.experts],
            shares=None if status.shares is None else [list(shares) for shares in status.shares],
            node=self._node,
            fetch_bytes_per_s=group.holdings.bytes_per_s,
            ready=max(status.ready, status.version),
            refused=status.refused,
            reason=status.lacking or status.reason,
            members=list(status.members),
        )

    def _counts(self, status: GroupStatus) -> ExpertCounts | None:
        """Since the last message. None: nothing was counted."""
        taken, now = self._plane.take_counts(), time.monotonic()
        if not taken.routed.any() and not taken.computed.any():
            return None
        place = self._plane.place
        self._seq += 1
        seconds, self._counted_at = now - self._counted_at, now
        return ExpertCounts(
            group=place.group,
            rank=place.rank,
            worker_id=place.worker_id,
            epoch=place.epoch,
            seq=self._seq,
            seconds=seconds,
            version=status.version,
            steps=taken.steps,
            routed=_packed(taken.routed),
            computed=_packed(taken.computed),
            expert_s=taken.expert_s,
        )

    def _redis(self, command: str, key: str, *arguments: Any) -> Any:
        if self._client is None:
            self._client = connect(self._address, _TIMEOUT_S)
        run: Callable[..., Any] = self._client.execute_command
        return run(command, key, *arguments, **node_of(self._client, key))


def _packed(counts: NDArray[np.int64]) -> bytes:
    return np.minimum(counts, _MOST).astype("<u4").tobytes()
