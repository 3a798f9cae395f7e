"""Where a request goes: the cost of each worker, and the cheapest pair of a decode and a prefill worker.

Pure: frozen inputs, an injected random source for ties, no clock. Costs are in tokens of work (DESIGN §7):

    decode share   = queued_prefill + prompt − credit·cached + decode_weight·active_blocks     of D
    prefill share  = queued_prefill + prompt − credit·cached                                   of P

`credit` is less where cached blocks lie in a slower tier and have to be loaded first (`policy.tier_credit`); whether
they are uncached, that is have to be computed, is another question: they are not. A prefix that is longer on another worker
can be fetched from there; how far that pays the worker judges, who has measured the way.

A pair costs the sum of both shares. A D that can prefill what it lacks by itself (at most `local_prefill_max`
tokens, or because there is no prefill worker) needs no P and costs only its own share.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from router.config import PolicyConfig
from router.prefix_index import CachedPrefix
from workers.protocol.messages import Role

_NOTHING = CachedPrefix(0)
PREFILL_EVERYTHING = 2**31 - 1  # as Reserve.local_prefill_max: there is no prefill worker


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What the policy sees of a worker. Both figures are of now (router/load.py: LoadBook)."""

    worker_id: str
    role: Role
    queued_prefill_tokens: int
    active_blocks: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What the policy must know of a request."""

    prompt_tokens: int  # to be in the KV cache before the next token; a resumed request's output included
    block_size: int
    cached_blocks: Mapping[str, CachedPrefix]  # worker -> longest cached prefix (PrefixIndex.match)


@dataclass(frozen=True, slots=True)
class Score:
    """One candidate and why it costs what it costs, in tokens of work."""

    worker_id: str
    role: Role
    queued_prefill_tokens: int
    cached_tokens: int  # in any tier
    uncached_tokens: int
    active_blocks: int
    cost: float


@dataclass(frozen=True, slots=True)
class Choice:
    """`prefill` is None when D prefills by itself. `scores` holds every candidate, cheapest first, D's before P's."""

    decode: Score
    prefill: Score | None
    local_prefill_max: int  # tokens; what to tell D in Reserve
    scores: tuple[Score, ...]
    demand: Demand


class Policy:
    def __init__(self, config: PolicyConfig, rng: random.Random) -> None:
        self._config = config
        self._rng = rng

    def choose(
        self, demand: Demand, views: Iterable[WorkerView], exclude: Collection[str] = ()
    ) -> Choice | None:
        """The cheapest pair. None: no decode worker is left to choose from."""
        longest = self._longest(demand)
        scores = [self._score(demand, view, longest) for view in views if view.worker_id not in exclude]
        decodes = [score for score in scores if score.role == "decode"]
        if not decodes:
            return None
        prefill = self._cheapest([score for score in scores if score.role == "prefill"])
        local_max = PREFILL_EVERYTHING if prefill is None else self._config.local_prefill_max
        prefill_cost = 0.0 if prefill is None else prefill.cost
        totals = [d.cost + (prefill_cost if d.uncached_tokens > local_max else 0.0) for d in decodes]
        decode = self._pick(decodes, totals)
        return Choice(
            decode=decode,
            prefill=prefill if decode.uncached_tokens > local_max else None,
            local_prefill_max=local_max,
            scores=tuple(sorted(scores, key=lambda score: (score.role, score.cost))),
            demand=demand,
        )

    def choose_prefill(
        self, demand: Demand, views: Iterable[WorkerView], exclude: Collection[str] = ()
    ) -> Score | None:
        """The cheapest prefill worker, for a D that turned out to need one. None: there is none."""
        longest = self._longest(demand)
        return self._cheapest(
            [
                self._score(demand, view, longest)
                for view in views
                if view.role == "prefill" and view.worker_id not in exclude
            ]
        )

    def fetch_from(
        self, demand: Demand, worker_id: str, reachable: Callable[[str], bool]
    ) -> tuple[str, int] | None:
        """Another worker whose cached prefix is much longer than this one's, and its length in blocks."""
        own = demand.cached_blocks.get(worker_id, _NOTHING).blocks
        others = [
            (prefix.device, other)
            for other, prefix in demand.cached_blocks.items()
            if other != worker_id and reachable(other)
        ]
        blocks, other = max(others, default=(0, ""))
        if (blocks - own) * demand.block_size < self._config.fetch_min_tokens:
            return None
        return other, blocks

    @staticmethod
    def _longest(demand: Demand) -> list[tuple[int, str]]:
        """The two longest prefixes in a KV cache: that of the second is what the first could fetch."""
        found = ((prefix.device, worker_id) for worker_id, prefix in demand.cached_blocks.items())
        return heapq.nlargest(2, found)

    def _score(self, demand: Demand, view: WorkerView, longest: list[tuple[int, str]]) -> Score:
        prefix = demand.cached_blocks.get(view.worker_id, _NOTHING)
        cached = min(prefix.blocks * demand.block_size, demand.prompt_tokens)
        saved = cached * self._config.cache_credit * self._worth(prefix)
        elsewhere = next((blocks for blocks, other in longest if other != view.worker_id), 0)
        fetchable = min(elsewhere * demand.block_size, demand.prompt_tokens) - cached
        if fetchable >= self._config.fetch_min_tokens:
            saved += fetchable * self._config.cache_credit * self._config.tier_credit.remote
        cost = view.queued_prefill_tokens + demand.prompt_tokens - saved
        if view.role == "decode":
            cost += self._config.decode_block_weight * view.active_blocks
        return Score(
            worker_id=view.worker_id,
            role=view.role,
            queued_prefill_tokens=view.queued_prefill_tokens,
            cached_tokens=cached,
            uncached_tokens=demand.prompt_tokens - cached,
            active_blocks=view.active_blocks,
            cost=cost,
        )

    def _worth(self, prefix: CachedPrefix) -> float:
        """Of a cached token, on the average over the tiers that the prefix lies in."""
        credit = self._config.tier_credit
        if prefix.device == prefix.blocks:
            return credit.device
        worth = credit.device * prefix.device + credit.host * prefix.host + credit.disk * prefix.disk
        return worth / prefix.blocks

    def _cheapest(self, scores: Sequence[Score]) -> Score | None:
        return self._pick(scores, [score.cost for score in scores]) if scores else None

    def _pick(self, scores: Sequence[Score], costs: Sequence[float]) -> Score:
        """Of the cheapest, any: replicas that see the same must not all go to the same worker."""
        lowest = min(costs)
        best = [score for score, cost in zip(scores, costs, strict=True) if cost == lowest]
        return best[0] if len(best) == 1 else self._rng.choice(best)
