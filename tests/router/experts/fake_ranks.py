"""Ranks without a model: they draw tokens from a load, count them, and carry out what is posted, all through Redis."""

from __future__ import annotations

import asyncio

import msgspec
import numpy as np
import redis.asyncio

from router.experts.balance import rank_loads
from workers.protocol import redis_keys
from workers.protocol.expert_messages import ExpertCounts, ExpertPost, ExpertRank
from workers.protocol.experts import Placement, PlacementError, contiguous

STEP_S = 0.01
TOKENS = 2_000  # of each rank in each step, times experts per token


class FakeGroup:
    """One task plays all ranks. What they agree on is simply the same object here."""

    def __init__(self, url: str, cluster: str, loads: np.ndarray, ranks: int, slots: int) -> None:
        """loads: [layers, experts], in any unit."""
        self.loads = np.asarray(loads, dtype=float)
        self.ranks = ranks
        self.slots = slots
        self.dead: set[int] = set()
        self.stuck: set[int] = set()  # ranks that never get ready
        self.refusing: dict[int, str] = {}  # rank -> why it refuses whatever is posted
        self.posts: list[ExpertPost] = []  # that were seen
        self.placement = contiguous(*self.loads.shape, ranks)
        self.versions = [0]  # that were computed with, in order
        self.silent = False  # no counts
        self._url = url
        self._cluster = cluster
        self._epochs = dict.fromkeys(range(ranks), 1)
        self._seq = 0
        self._rng = np.random.default_rng(0)
        self._ready = dict.fromkeys(range(ranks), 0)
        self._refused: dict[int, tuple[int, str]] = {}
        self._task: asyncio.Task | None = None

    async def __aenter__(self) -> FakeGroup:
        self._redis = redis.asyncio.Redis.from_url(self._url)
        await self._report()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exc) -> None:
        await self.stop()
        await self._redis.aclose()
        if not self._task.cancelled():
            self._task.result()

    async def stop(self) -> None:
        """They say nothing any more, and do nothing."""
        while not self._task.done():  # once is not enough (bpo-42130)
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=0.1)

    def alive(self) -> dict[str, int]:
        """What discovery would say."""
        return {f"w{rank}": self._epochs[rank] for rank in self.members}

    @property
    def members(self) -> list[int]:
        return [rank for rank in range(self.ranks) if rank not in self.dead]

    def kill(self, rank: int) -> None:
        """The others give it up, and take over what only it had, wherever there is room."""
        self.dead.add(rank)
        layers = [[list(experts) for experts in layer] for layer in self.placement.layers]
        for layer in layers:
            layer[rank] = []
            for expert in set(range(self.loads.shape[1])) - {e for experts in layer for e in experts}:
                layer[min(self.members, key=lambda r: len(layer[r]))].append(expert)
        self.placement = Placement(
            self.placement.version, tuple(tuple(tuple(experts) for experts in layer) for layer in layers)
        )

    def revive(self, rank: int) -> None:
        self.dead.discard(rank)
        self._epochs[rank] += 1
        self._ready[rank] = 0

    def balancedness(self) -> float:
        """Of the true load."""
        loads = rank_loads(self.placement, self.loads)[:, self.members]
        return float(loads.mean(axis=1).sum() / loads.max(axis=1).sum())

    async def _run(self) -> None:
        while True:
            if not self.silent:
                await self._count()
            await self._carry_out()
            await self._report()
            await asyncio.sleep(STEP_S)

    async def _count(self) -> None:
        self._seq += 1
        key = redis_keys.expert_counts(self._cluster, "g")
        for rank in self.members:
            routed = np.stack([self._rng.multinomial(TOKENS, layer / layer.sum()) for layer in self.loads])
            computed = rank_loads(self.placement, routed * len(self.members))[:, [rank]]
            counts = ExpertCounts(
                "g",
                rank,
                f"w{rank}",
                self._epochs[rank],
                self._seq,
                STEP_S,
                self.placement.version,
                1,
                routed.astype("<u4").tobytes(),
                computed.astype("<u4").tobytes(),
            )
            await self._redis.xadd(key, {"c": msgspec.msgpack.encode(counts)}, maxlen=200)

    async def _carry_out(self) -> None:
        raw = await self._redis.get(redis_keys.expert_version(self._cluster, "g"))
        if raw is None or int(raw) <= self.placement.version:
            return
        post = msgspec.msgpack.decode(
            await self._redis.get(redis_keys.expert_post(self._cluster, "g")), type=ExpertPost
        )
        version = post.placement.version
        if not self.posts or self.posts[-1].placement.version != version:
            self.posts.append(post)
        for rank in self.members:
            if reason := self.refusing.get(rank) or self._wrong(post.placement):
                self._refused[rank] = (version, reason)
            elif rank not in self.stuck:
                self._ready[rank] = version
        if all(self._ready[rank] == version for rank in self.members):
            self.placement = post.placement
            self.versions.append(version)

    def _wrong(self, placement: Placement) -> str:
        slots = [self.slots if rank in self.members else 0 for rank in range(self.ranks)]
        try:
            placement.validate(self.loads.shape[1], slots, len(self.loads))
        except PlacementError as error:
            return str(error)
        return ""

    async def _report(self) -> None:
        key = redis_keys.expert_ranks(self._cluster)
        for rank in self.members:
            refused, reason = self._refused.get(rank, (0, ""))
            shares = self.placement.shares
            told = ExpertRank(
                group="g",
                rank=rank,
                worker_id=f"w{rank}",
                epoch=self._epochs[rank],
                role="decode",
                num_ranks=self.ranks,
                num_layers=len(self.loads),
                num_experts=self.loads.shape[1],
                expert_bytes=1_000,
                slots=self.slots,
                version=self.placement.version,
                experts=[list(layer[rank]) for layer in self.placement.layers],
                shares=None if shares is None else [list(layer[rank]) for layer in shares],
                ready=max(self._ready[rank], self.placement.version),
                refused=refused,
                reason=reason,
                members=self.members,
            )
            await self._redis.hset(key, f"w{rank}", msgspec.msgpack.encode(told))
