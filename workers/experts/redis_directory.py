"""Where ranks of a group find each other through Redis."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from workers.experts.messages import Member
from workers.protocol import redis_keys
from workers.protocol.redis_address import RedisAddress
from workers.protocol.redis_client import TROUBLE, Client, connect

logger = logging.getLogger(__name__)

_TIMEOUT_S = 2.0


class RedisDirectory:
    """Without Redis nobody new is found; those who know each other go on."""

    def __init__(self, redis_url: str, cluster: str, group: str) -> None:
        self._address = RedisAddress.parse(redis_url)
        self._key = redis_keys.expert_members(cluster, group)
        self._client: Client | None = None

    def enter(self, member: Member) -> None:
        try:
            self._redis().hset(self._key, str(member.rank), msgspec.msgpack.encode(member))
        except TROUBLE as error:
            logger.warning("Redis is away, other ranks will not find this one: %s", error)

    def read(self) -> list[Member]:
        try:
            entries: list[Any] = self._redis().hvals(self._key)  # bytes: nothing is decoded
        except TROUBLE as error:
            logger.debug("Redis is away: %s", error)
            return []
        return [msgspec.msgpack.decode(entry, type=Member) for entry in entries]

    def _redis(self) -> Client:
        if self._client is None:
            self._client = connect(self._address, _TIMEOUT_S)
        return self._client
