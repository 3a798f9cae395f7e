"""Where the planner's last decision can be read by every router: a key in Redis that ends with the planner."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from workers.protocol import redis_keys
from workers.protocol.messages import Planned

logger = logging.getLogger(__name__)

_TIMEOUT_S = 1.0
_LASTS_MS = 60_000


class PlannerBoard:
    def __init__(self, redis_url: str, cluster: str) -> None:
        from workers.protocol import redis_client
        from workers.protocol.redis_address import RedisAddress

        self._trouble = redis_client.TROUBLE
        self._address = RedisAddress.parse(redis_url)
        self._client: Any = None
        self._key = redis_keys.planner(cluster)

    def tell(self, planned: Planned) -> None:
        """A Redis that is away takes nothing but the status line."""
        try:
            if self._client is None:
                from workers.protocol.redis_client import connect

                self._client = connect(self._address, _TIMEOUT_S, _TIMEOUT_S)
            self._client.set(self._key, msgspec.json.encode(planned), px=_LASTS_MS)
        except self._trouble as error:
            logger.debug("the planner's decision could not be published: %s", error)
