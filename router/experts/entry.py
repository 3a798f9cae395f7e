"""Experts, as the rest of the router knows them: nothing of them is loaded while no rank has told of itself.

Most models have no experts, and numpy takes memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from router.config import ExpertsConfig
from router.experts.board import Board
from workers.protocol.redis_client import TROUBLE

if TYPE_CHECKING:
    from router.experts.service import ExpertService

log = logging.getLogger(__name__)


class Experts:
    """Lives in one event loop. `alive`: worker_id -> epoch of the workers that hold a lease."""

    def __init__(
        self,
        config: ExpertsConfig,
        *,
        redis_url: str,
        cluster: str,
        router_id: str,
        alive: Callable[[], Mapping[str, int]],
    ) -> None:
        self.service: ExpertService | None = None
        self._config = config
        self._router_id = router_id
        self._alive = alive
        self._board = Board(redis_url, cluster, router_id)
        self._waiting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._waiting = asyncio.create_task(self._wait())

    async def stop(self) -> None:
        waiting = set() if self._waiting is None else {self._waiting}
        while waiting:  # as in ExpertService.stop
            for task in waiting:
                task.cancel()
            _, waiting = await asyncio.wait(waiting, timeout=0.1)
        if self.service is not None:
            await self.service.stop()
        else:
            await self._board.close()

    async def _wait(self) -> None:
        while self.service is None:
            try:
                if await self._board.ranks():
                    await self._begin()
                    return
            except TROUBLE as error:
                log.debug("experts: Redis is away: %s", error)
            await asyncio.sleep(self._config.interval_s)

    async def _begin(self) -> None:
        from router.experts.planning import ProcessPlanner
        from router.experts.service import ExpertService

        log.info("experts: the model's experts are spread over ranks; their load is watched from now on")
        self.service = ExpertService(
            self._config,
            board=self._board,
            router_id=self._router_id,
            alive=self._alive,
            planner=ProcessPlanner(self._config.plan_timeout_s),
        )
        await self.service.start()

    def status(self) -> list[dict[str, Any]]:
        """A few words on each group, for `headrace status`."""
        service = self.service
        if service is None:
            return []
        return [
            {
                "group": name,
                "version": watched.group.version,
                "phase": str(watched.verdict.phase),
                "text": service.trouble or watched.verdict.text,
                "trouble": bool(service.trouble) or watched.trouble,
            }
            for name, watched in sorted(service.groups.items())
        ]

    async def view(self) -> dict[str, Any]:
        """What `headrace experts --json` prints."""
        service = self.service
        told: dict[str, Any] = {"router": self._router_id, "rebalance": self._config.rebalance}
        if service is None:
            return told | {"planner": "", "trouble": "", "groups": []}
        from router.experts.view import view_of

        now = time.monotonic()
        groups = [await view_of(service.groups[name], now) for name in sorted(service.groups)]
        return told | {"planner": service.leader, "trouble": service.trouble, "groups": groups}
