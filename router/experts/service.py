"""Experts of a running cluster, in every router: reads what ranks count, shows it, and, where it leads, places anew.

All replicas of the router look; the one that holds the lease plans. When it dies another one takes the lease and goes
on from what the ranks say of themselves. Planning runs in a process of its own; streams do not wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping

from router.config import ExpertsConfig
from router.experts import rebalancer
from router.experts.board import Board
from router.experts.group import groups_of
from router.experts.metrics import ExpertMetrics, default_metrics
from router.experts.planning import PlanFailed, Planner, ask_of
from router.experts.rebalancer import Phase, Verdict
from router.experts.watched import Planned, Watched
from workers.protocol.expert_messages import ExpertPost
from workers.protocol.redis_client import TROUBLE

log = logging.getLogger(__name__)

_LEASE_LOOKS = 4  # looks that may fail before another router takes over
_FORGET_S = 600.0  # after which what a dead rank said of itself is deleted


class ExpertService:
    """Lives in one event loop. `alive`: worker_id -> epoch of the workers that hold a lease."""

    def __init__(
        self,
        config: ExpertsConfig,
        *,
        board: Board,
        router_id: str,
        alive: Callable[[], Mapping[str, int]],
        planner: Planner,
        metrics: ExpertMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.groups: dict[str, Watched] = {}
        self.leader = ""  # the router that plans, as far as this one knows
        self.trouble = ""  # why nothing can be read just now
        self.metrics = metrics or default_metrics()
        self._config = config
        self._board = board
        self._router_id = router_id
        self._alive = alive
        self._planner = planner
        self._clock = clock
        self._loop: asyncio.Task[None] | None = None
        self._plans: dict[str, asyncio.Task[None]] = {}
        self._gone: dict[str, float] = {}  # worker_id -> since when it holds no lease
        self._errors: set[str] = set()  # told already
        self._stopping = False

    @property
    def leads(self) -> bool:
        return self.leader == self._router_id

    async def start(self) -> None:
        self._loop = asyncio.create_task(self._run())
        self._loop.add_done_callback(self._ended)

    def _ended(self, loop: asyncio.Task[None]) -> None:
        """It goes on until it is stopped; if ever it does not, that is said, and seen in metrics."""
        if not loop.cancelled() and (error := loop.exception()) is not None:
            self.trouble, self.leader = f"rebalancing has ended: {error!r}", ""
            self.metrics.watching.set(0)
            log.error("experts: %s", self.trouble, exc_info=error)

    async def stop(self) -> None:
        self._stopping = True
        running = {task for task in (self._loop, *self._plans.values()) if task is not None}
        while running:
            # Once is not enough: on Python 3.11 redis-py's wait_for() can swallow a cancellation (bpo-42130).
            for task in running:
                task.cancel()
            _, running = await asyncio.wait(running, timeout=0.1)
        await self._board.close()

    async def _run(self) -> None:
        while not self._stopping:
            try:
                await self.look()
            except TROUBLE as error:
                if not self.trouble:
                    log.warning("experts: Redis is away, placements stay as they are: %s", error)
                self.trouble = f"Redis is away: {error}"
                self.leader = ""
                self.metrics.watching.set(0)
            else:
                if self.trouble:
                    log.info("experts: Redis is there")
                self.trouble = ""
                self.metrics.watching.set(1)
            await asyncio.sleep(self._config.interval_s * random.uniform(0.9, 1.1))

    async def look(self) -> None:
        """One look at all groups. Raises one of TROUBLE."""
        reports = await self._board.ranks()
        groups, errors = groups_of(reports, self._alive())
        self._tell({str(error) for error in errors})
        now = self._clock()
        for name in set(self.groups) - set(groups):
            self.metrics.forget(self.groups.pop(name))
        for name, group in groups.items():
            if name not in self.groups or not self.groups[name].fits(group):
                self.groups[name] = Watched(group, self._config)
        for counts in await self._board.counts(groups):
            self.groups[counts.group].take(counts, now)
        if groups and self._config.rebalance:
            self.leader = await self._board.lead(_LEASE_LOOKS * self._config.interval_s)
        for name, group in groups.items():
            watched = self.groups[name]
            verdict = watched.look(group, await self._board.post_of(name), now)
            if verdict.phase is Phase.PLANNING and self.leads and name not in self._plans:
                self._begin(name, watched, verdict)
            self.metrics.observe(watched, now)
        await self._tidy({report.worker_id for report in reports}, now)

    def _tell(self, errors: set[str]) -> None:
        for error in sorted(errors - self._errors):
            log.warning("experts: %s; the group is left alone", error)
        self._errors = errors

    async def _tidy(self, told: set[str], now: float) -> None:
        alive = self._alive()
        self._gone = {worker: self._gone.get(worker, now) for worker in told if worker not in alive}
        if self.leads:
            await self._board.forget(
                worker for worker, since in self._gone.items() if now - since > _FORGET_S
            )

    # --- a placement ------------------------------------------------------------------------------------------------

    def _begin(self, name: str, watched: Watched, verdict: Verdict) -> None:
        task = asyncio.create_task(self._place(watched, verdict))
        self._plans[name] = task
        watched.planning = True

        def ended(task: asyncio.Task[None]) -> None:
            self._plans.pop(name, None)
            watched.planning = False
            if not task.cancelled() and (error := task.exception()) is not None:
                self._failed(watched, f"planning failed: {error!r}")

        task.add_done_callback(ended)

    async def _place(self, watched: Watched, verdict: Verdict) -> None:
        """Plan, judge, post."""
        seen = watched.seen(self._clock())
        group = seen.group
        try:
            last = await self._board.version(group.name)
            version = max(rebalancer.next_version(group, watched.state), last + 1)
            answer = await self._planner.plan(ask_of(seen, version, self._config, urgent=verdict.urgent))
            answer.plan.validate(group.num_experts, group.topology().slots, group.num_layers)
        except (PlanFailed, ValueError) as error:  # ValueError: PlacementError
            self._failed(watched, str(error))
            return
        except TROUBLE as error:
            self._failed(watched, f"Redis is away: {error}")
            return
        judged = rebalancer.judge(seen, answer.rehearsal, answer.plan, self._config, urgent=verdict.urgent)
        now = self._clock()
        if not judged.worth:
            watched.state = rebalancer.in_vain(watched.state, verdict.most_to_gain, now)
            self._note(watched, "not worth it", judged.text)
            return
        if (watched.group.version, watched.group.members) != (group.version, group.members):
            self._note(watched, "overtaken", "the ranks have another placement by now; planned again")
            return
        why = f"{verdict.text}: {judged.text}" if verdict.urgent else judged.text
        post = ExpertPost(group.name, answer.plan, self._router_id, time.time(), why)
        try:
            done = await self._board.post(post)
        except TROUBLE as error:
            self._failed(watched, f"version {version} could not be posted: {error}")
            return
        if done != "posted":
            self._note(watched, "overtaken", f"version {version} was not posted: {done}")
            return
        watched.state = rebalancer.posted(watched.state, group, version, now)
        self.metrics.posts.labels(group.name).inc()
        self.metrics.moves.labels(group.name).inc(judged.num_moves)
        self._note(watched, "posted", why, version)

    def _failed(self, watched: Watched, reason: str) -> None:
        watched.state = rebalancer.failed(watched.state, watched.group, reason, self._clock())
        self._note(watched, "failed", reason)

    def _note(self, watched: Watched, outcome: str, text: str, version: int = 0) -> None:
        name = watched.group.name
        self.metrics.plans.labels(name, outcome).inc()
        level = logging.WARNING if outcome == "failed" else logging.INFO
        log.log(level, "experts of group %s: %s%s: %s", name, outcome, f" {version}" if version else "", text)
        watched.planned = Planned(time.time(), f"{outcome}: {text}", version)
