"""Who is alive according to Redis: the leases that workers renew with every heartbeat."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from workers.protocol import redis_keys

logger = logging.getLogger(__name__)

_TIMEOUT_S = 1.0


class Leases:
    """Reads the leases of a fixed set of workers."""

    def __init__(self, redis_url: str, cluster: str, worker_ids: Iterable[str]) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._errors = (redis.RedisError, OSError)
        self._cluster = cluster
        self._worker_ids = list(worker_ids)
        self._keys = [redis_keys.lease(cluster, worker_id) for worker_id in self._worker_ids]
        self._client = redis.Redis.from_url(
            redis_url,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._reachable = True

    def check(self) -> None:
        """Raises ConnectionError when Redis does not answer: asked once, before workers are started."""
        try:
            self._client.ping()
        except (*self._errors, TypeError) as error:  # TypeError: an unknown option behind the URL's `?`
            raise ConnectionError(str(error)) from error

    def registered(self) -> list[str]:
        """Everyone alive under this cluster's name, whoever started them. Raises ConnectionError."""
        try:
            raw: Iterable[Any] = self._client.hkeys(redis_keys.workers(self._cluster))
            names = [name.decode() for name in raw]
            leases = (
                self._client.mget([redis_keys.lease(self._cluster, name) for name in names]) if names else []
            )
        except self._errors as error:
            raise ConnectionError(str(error)) from error
        return sorted(name for name, lease in zip(names, leases, strict=True) if lease is not None)

    def read(self) -> dict[str, int] | None:
        """worker_id -> epoch of the lives that hold a lease; None while Redis does not answer."""
        try:
            values = self._client.mget(self._keys)
        except self._errors as error:
            if self._reachable:
                logger.warning("Redis does not answer: %s", error)
                self._reachable = False
            return None
        if not self._reachable:
            logger.info("Redis answers again")
            self._reachable = True
        return {
            worker_id: int(value)
            for worker_id, value in zip(self._worker_ids, values, strict=True)
            if value is not None and value.isdigit()
        }

    def close(self) -> None:
        self._client.close()
