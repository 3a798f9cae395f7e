"""Who decides where experts live: nobody, EPLB at fixed intervals, or Headrace's own code."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bench.experts.simulate.machine import Array, StepCost
from router.config import ExpertsConfig
from router.experts import rebalancer
from router.experts.balance import rank_loads
from router.experts.baselines import eplb_global, placement_of
from router.experts.group import Group, groups_of
from router.experts.planning import answer, ask_of
from router.experts.rebalancer import Phase
from router.experts.watched import Watched
from workers.protocol.expert_messages import ExpertCounts, ExpertPost, ExpertRank
from workers.protocol.experts import Placement, PlacementError, contiguous, moves

BACKGROUND = 0.1  # of the network, for experts that are loaded while tokens are served


@dataclass(frozen=True)
class Pool:
    cost: StepCost
    slots: int  # experts of a layer that a rank has memory for

    @property
    def first(self) -> Placement:
        model, ranks = self.cost.model, self.cost.work.ranks
        return contiguous(model.drawn, model.experts, ranks)

    def load_s(self, old: Placement, new: Placement, share: float) -> float:
        """Until the rank that lacks most has it, with this share of its network."""
        lacks = np.zeros(self.cost.work.ranks)
        for move in moves(old, new):
            lacks[move.rank] += self.move_bytes
        return float(lacks.max()) / (self.cost.machine.network_bytes_per_s * share)

    @property
    def move_bytes(self) -> int:
        """Of one expert in a drawn layer and in those that it stands for."""
        return round(self.cost.model.expert_bytes * self.cost.model.each_stands_for)


@dataclass(frozen=True)
class Change:
    placement: Placement
    stall_s: float  # in which no token is computed
    load_s: float  # in which a part of the network is taken, until it is in use
    moves: int


class Policy(Protocol):
    name: str
    even: bool  # all ranks have the same to do, by magic

    def after(self, now: float, steps: float, counts: Array) -> Change | None:
        """At the end of a stretch of time: steps made in it, tokens counted in it [layers, experts]."""


class Static:
    """As the ranks start: experts in order, no copies."""

    even = False
    name = "static"

    def after(self, now: float, steps: float, counts: Array) -> Change | None:
        return None


class Even(Static):
    """The most that any placement could reach: the expected load of all ranks is equal."""

    even = True
    name = "even (bound)"


class Eplb:
    """EPLB's global policy over the last `window` steps, every `interval` steps: vLLM's defaults (EPLBConfig in 0.32).

    `background`: weights are moved while tokens are served, as in vLLM since its asynchronous form; otherwise serving
    stops for it, at the full rate of the network, which is the least it can take. Planning takes no time here.
    """

    even = False

    def __init__(
        self,
        pool: Pool,
        *,
        interval: int = 3000,
        window: int = 1000,
        once: bool = False,
        background: bool = False,
    ) -> None:
        self.name = (
            "EPLB once"
            if once
            else f"EPLB every {interval} steps{', in the background' if background else ''}"
        )
        self._pool = pool
        self._interval = interval
        self._window = window
        self._once = once
        self._background = background
        self._placement = pool.first
        self._steps = 0.0
        self._due = float(window if once else interval)
        self._recent: deque[tuple[float, Array]] = deque()

    def after(self, now: float, steps: float, counts: Array) -> Change | None:
        self._steps += steps
        self._recent.append((self._steps, counts))
        while self._recent[0][0] <= self._steps - self._window:
            self._recent.popleft()
        if self._steps < self._due:
            return None
        self._due = float("inf") if self._once else self._due + self._interval
        loads = np.sum([counted for _, counted in self._recent], axis=0)
        ranks = self._pool.cost.work.ranks
        physical = eplb_global(loads, self._pool.slots * ranks, ranks)
        old, self._placement = self._placement, placement_of(physical, ranks)
        share = BACKGROUND if self._background else 1.0
        load_s = self._pool.load_s(old, self._placement, share)
        number = sum(1 for _ in moves(old, self._placement))
        return Change(
            self._placement, 0.0 if self._background else load_s, load_s if self._background else 0.0, number
        )


class Live:
    """router/experts as it runs in a router: messages of ranks in, windows, look, plan, judge, post."""

    even = False

    def __init__(self, pool: Pool, config: ExpertsConfig) -> None:
        self.name = "Headrace, live"
        rate = pool.cost.machine.network_bytes_per_s * BACKGROUND
        self._pool = pool
        self._config = config.model_copy(update={"bytes_per_s": rate})
        self._placement = pool.first
        self._watched: Watched | None = None
        self._coming: tuple[float, ExpertPost] | None = None  # loaded at, what
        self._looked_at = -1e9
        self._seq = 0
        self.said: list[tuple[float, str]] = []

    def after(self, now: float, steps: float, counts: Array) -> Change | None:
        if self._coming is not None and now >= self._coming[0]:
            self._placement, self._coming = self._coming[1].placement, None
        group = self._group()
        if self._watched is None:
            self._watched = Watched(group, self._config)
        for message in self._messages(steps, counts):
            self._watched.take(message, now)
        if now - self._looked_at < self._config.interval_s:
            return None
        self._looked_at = now
        verdict = self._watched.look(group, self._post, now)
        if verdict.phase is not Phase.PLANNING:
            return None
        return self._place(verdict, now)

    def _place(self, verdict: rebalancer.Verdict, now: float) -> Change | None:
        watched = self._watched
        assert watched is not None
        seen = watched.seen(now)
        version = rebalancer.next_version(seen.group, watched.state)
        try:
            made = answer(ask_of(seen, version, self._config, urgent=verdict.urgent))
        except PlacementError as error:  # as the router does: said, and tried again after a pause
            self.said.append((now, f"failed: {error}"))
            watched.state = rebalancer.failed(watched.state, seen.group, str(error), now)
            return None
        judged = rebalancer.judge(seen, made.rehearsal, made.plan, self._config, urgent=verdict.urgent)
        self.said.append((now, judged.text))
        if not judged.worth:
            watched.state = rebalancer.in_vain(watched.state, verdict.most_to_gain, now)
            return None
        watched.state = rebalancer.posted(watched.state, seen.group, version, now)
        load_s = self._pool.load_s(self._placement, made.plan, BACKGROUND)
        self._coming = now + load_s, ExpertPost(seen.group.name, made.plan, "simulated", now, judged.text)
        return Change(made.plan, 0.0, load_s, judged.num_moves)

    @property
    def _post(self) -> ExpertPost | None:
        return None if self._coming is None else self._coming[1]

    def _group(self) -> Group:
        model, ranks = self._pool.cost.model, self._pool.cost.work.ranks
        placement = self._placement
        reports = [
            ExpertRank(
                group="pool",
                rank=rank,
                worker_id=f"w{rank}",
                epoch=1,
                role="decode",
                num_ranks=ranks,
                num_layers=model.drawn,
                num_experts=model.experts,
                expert_bytes=self._pool.move_bytes,
                slots=self._pool.slots,
                version=placement.version,
                experts=[list(layer[rank]) for layer in placement.layers],
                shares=None
                if placement.shares is None
                else [list(layer[rank]) for layer in placement.shares],
            )
            for rank in range(ranks)
        ]
        found, errors = groups_of(reports, {report.worker_id: 1 for report in reports})
        assert not errors
        return found["pool"]

    def _messages(self, steps: float, counts: Array) -> Iterator[ExpertCounts]:
        """Each rank counts the tokens of its own requests; these are a random part of all."""
        self._seq += 1
        ranks = self._pool.cost.work.ranks
        share, rest = np.divmod(counts.astype(np.int64), ranks)
        computed = rank_loads(self._placement, counts)
        for rank in range(ranks):
            routed = share + ((rest + self._seq + rank) % ranks < rest)
            yield ExpertCounts(
                "pool",
                rank,
                f"w{rank}",
                1,
                self._seq,
                1.0,
                self._placement.version,
                max(int(steps), 1),
                routed.astype("<u4").tobytes(),
                computed[:, [rank]].astype("<u4").tobytes(),
            )
