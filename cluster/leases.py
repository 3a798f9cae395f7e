"""Who is alive according to Redis: the leases that workers renew with every heartbeat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from workers.protocol import redis_keys
from workers.protocol.redis_address import RedisAddress

logger = logging.getLogger(__name__)

_TIMEOUT_S = 1.0


class Leases:
    """Reads the leases of the workers that it was told to watch."""

    def __init__(self, redis_url: str, cluster: str, worker_ids: Iterable[str]) -> None:
        from workers.protocol import redis_client

        self._errors = redis_client.TROUBLE
        self._address = RedisAddress.parse(redis_url)
        self._partitions = redis_keys.all_partitions(cluster, self._address.partitions)
        self._cluster = cluster
        self._worker_ids = list(worker_ids)
        self._connect: Callable[[], Any] = lambda: redis_client.connect(self._address, _TIMEOUT_S, _TIMEOUT_S)
        self._connected: Any = None
        self._reachable = True

    @property
    def _client(self) -> Any:
        """A Redis Cluster can only be connected to while it is there."""
        if self._connected is None:
            self._connected = self._connect()
        return self._connected

    def check(self) -> None:
        """Raises ConnectionError when Redis does not answer: asked once, before workers are started."""
        try:
            self._client.ping()
        except (*self._errors, TypeError) as error:  # TypeError: an unknown option behind the URL's `?`
            raise ConnectionError(str(error)) from error

    def watch(self, worker_ids: Iterable[str]) -> None:
        """From now on it is these."""
        self._worker_ids = list(worker_ids)

    def registered(self) -> list[str]:
        """Everyone alive under this cluster's name, whoever started them. Raises ConnectionError."""
        try:
            names: list[str] = []
            for part in self._partitions:
                names += [name.decode() for name in self._client.hkeys(redis_keys.workers(part))]
            leases = self._leases_of(names)
        except self._errors as error:
            raise ConnectionError(str(error)) from error
        return sorted(name for name, lease in zip(names, leases, strict=True) if lease is not None)

    def read(self) -> dict[str, int] | None:
        """worker_id -> epoch of the lives that hold a lease; None while Redis does not answer."""
        try:
            values = self._leases_of(self._worker_ids)
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

    def _leases_of(self, names: list[str]) -> list[Any]:
        """In a Redis Cluster one command reads the keys of one partition."""
        found: dict[str, Any] = {}
        for part in self._partitions:
            mine = [n for n in names if redis_keys.partition(self._cluster, n, len(self._partitions)) == part]
            if mine:
                values = self._client.mget([redis_keys.lease(part, name) for name in mine])
                found |= dict(zip(mine, values, strict=True))
        return [found[name] for name in names]

    def close(self) -> None:
        if self._connected is not None:
            self._connected.close()
