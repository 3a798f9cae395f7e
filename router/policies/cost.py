"""`cost`: the cheapest pair of a decode worker D and a prefill worker P, in tokens of work (DESIGN §7).

    share of D  =  queued + prompt − credit + decode_weight · active_blocks
    share of P  =  queued + prompt − credit
    pair        =  share of D + share of P + distance(P, D);   share of D alone where D prefills by itself

* *Time, not only tokens.* Workers say how long a prompt token takes them. On one that is twice as slow as the fastest
  of its role, a token of queue or prompt counts twice; one that has not said anything yet counts as the fastest, so
  that it gets work and can measure.
* *Attention.* A token costs more the more it attends to: n tokens are `n · (1 + attention · n / 2)` of work, and the
  last u of them what they add to the others. What waits is counted the same way, and by what is left of it.
* *Credit* is what cached tokens save: by tier, and in part for what can be fetched from another worker. It never
  falls when more is cached.
* *Heat.* A popular prefix would draw every request to the worker that holds it, long after the queue there has eaten
  what the cache saves for all but the one request that is being placed. So the credit of a worker shrinks as its requests
  in flight (a time average, so that it does not flutter) exceed the mean of its pool, and is gone at `heat_limit` times
  the mean. Then an idle worker wins, computes or fetches the prefix, and holds it too. A worker with one request at a
  time is never hot: a lone conversation stays where its prefix is.
* *Distance* is the time to bring the blocks that D lacks from P to D, at the rate that P has measured on this way.
* *D prefills by itself* what is at most `local_prefill_max` tokens; more when it would be done before P could begin,
  as long as its own prompts hold up its running streams for no more than `local_prefill_stall_s`.

To find the cheapest without looking at a thousand workers, those with the best standing and those with the longest
prefixes are weighed in turn, until nobody who was not weighed can be cheaper (Fagin's threshold algorithm, PODS 2001).
Should that take longer than `_MAX_WEIGHED` the cheapest of these is taken.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import NamedTuple, TypeVar

from router.config import PolicyConfig
from router.policy import PREFILL_EVERYTHING, Choice, Demand, Score, WorkerView
from router.prefix_index import CachedPrefix
from router.roster import Listed, Pool, Ranked, Usable
from workers.protocol.messages import Role

T = TypeVar("T")

_NOTHING = CachedPrefix(0)
_blocks, _host, _disk = attrgetter("blocks"), attrgetter("host"), attrgetter("disk")
_MAX_WEIGHED = 64  # of one role
_ENOUGH_EQUALS = 8  # equals to draw from: replicas that see the same must not all go to the same worker
_WIDTH = 4  # of each role, that are paired with each other
_SHOWN = 8  # candidates of each role, in Choice.scores
_NEIGHBOURS = 1  # on the host of each of these
_WAYS = 8  # that a guess of another one looks at
# Requests in flight, on the time average, up to which a worker keeps its full credit, however idle the others are: a lone
# conversation stays where its prefix is. A prefill worker has more than one only when they queue.
_NEVER_HOT: dict[Role, float] = {"prefill": 0.25, "decode": 1.0}
_MAX_PACE = 8.0  # a measurement gone wrong must not shut a worker out for good
_NOMINAL_TOKEN_S = 1e-4  # until somebody has measured how long a prompt token takes


class _Weighed(NamedTuple):
    cost: float
    view: WorkerView
    cached: int
    queued: float
    prompt: float
    credit: float
    decode: float
    heat: float
    pace: float
    fetch: int

    def score(self, demand: Demand) -> Score:
        return Score(
            self.view.worker_id,
            self.view.role,
            self.view.queued_prefill_tokens,
            self.cached,
            demand.prompt_tokens - self.cached,
            self.view.active_blocks,
            self.cost,
            self.queued,
            self.prompt,
            self.credit,
            self.decode,
            self.heat,
            self.pace,
            self.fetch,
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    """A demand, and what follows from it for every worker alike."""

    demand: Demand
    holders: list[str]
    blocks: list[int]  # of these
    order: list[int]  # of these, longest prefix first
    longest: tuple[int, str]  # prefix in a KV cache, in tokens, and whose
    second: tuple[int, str]


class CostPolicy:
    def __init__(self, config: PolicyConfig, rng: random.Random) -> None:
        self._config = config
        self._rng = rng
        tier = config.tier_credit
        self._best_tier = max(tier.device, tier.host, tier.disk)
        self._above_remote = max(self._best_tier - tier.remote, 0.0)

    # --- what router.policy.Policy asks -----------------------------------------------------------------------------

    def choose(
        self, demand: Demand, views: Iterable[WorkerView], exclude: Collection[str] = ()
    ) -> Choice | None:
        workers, asked = self._ranked(views), self._asked(demand)
        prefills = self._cheapest("prefill", asked, workers, exclude)
        local = self._local_prefill(workers, prefills[0] if prefills else None)
        decodes = self._cheapest("decode", asked, workers, exclude, local)
        if not decodes:
            return None
        decode, prefill, distance = self._pair(asked, workers, exclude, decodes, prefills, local)
        maximum = local.maximum(decode.view)
        return Choice(
            decode=decode.score(demand),
            prefill=None if prefill is None else prefill.score(demand),
            local_prefill_max=maximum,
            scores=_shown(demand, decodes, decode) + _shown(demand, prefills, prefill),
            demand=demand,
            distance=distance,
        )

    def choose_prefill(
        self, demand: Demand, views: Iterable[WorkerView], exclude: Collection[str] = ()
    ) -> Score | None:
        workers = self._ranked(views)
        found = self._cheapest("prefill", self._asked(demand), workers, exclude)
        return (
            self._any(found, [weighed.cost for weighed in found], self._slack(demand)).score(demand)
            if found
            else None
        )

    def standing(self, view: WorkerView, pool: Pool) -> float:
        """The queue of a worker and what its running streams cost a new one."""
        standing = _queued(view, pool) * _pace(view.prefill_token_s, pool.prefill_token_s)
        if view.role == "decode":
            weight = self._config.decode_block_weight
            standing += weight * view.active_blocks * _pace(view.decode_step_s, pool.decode_step_s)
        return standing

    # --- candidates -------------------------------------------------------------------------------------------------

    def _ranked(self, views: Iterable[WorkerView]) -> Ranked:
        return views if isinstance(views, Listed | Usable) else Listed(views, self.standing, self._rng)

    def _asked(self, demand: Demand) -> _Asked:
        # A prefix that everybody has makes this the longest loop of all: what it costs per holder counts.
        names = list(demand.cached_blocks)
        prefixes = list(demand.cached_blocks.values())
        device = blocks = list(map(_blocks, prefixes))
        if sum(map(_host, prefixes)) or sum(map(_disk, prefixes)):
            device = [prefix.device for prefix in prefixes]
        order = sorted(range(len(names)), key=blocks.__getitem__, reverse=True)
        in_cache = order if device is blocks else sorted(order, key=device.__getitem__, reverse=True)
        longest = [
            (min(device[at] * demand.block_size, demand.prompt_tokens), names[at]) for at in in_cache[:2]
        ] + [(0, "")] * 2
        return _Asked(demand, names, blocks, order, longest[0], longest[1])

    def _cheapest(
        self,
        role: Role,
        asked: _Asked,
        workers: Ranked,
        exclude: Collection[str],
        local: _LocalPrefill | None = None,
    ) -> list[_Weighed]:
        """Of one role, cheapest first. `local`: for decode workers, what else the pair would cost."""
        demand, pool = asked.demand, workers.pool(role)
        found: dict[str, _Weighed] = {}
        lowest = float("inf")  # of those that were weighed
        slack = self._slack(demand)
        prompt = _work(demand.prompt_tokens, pool)

        def weigh(view: WorkerView) -> None:
            nonlocal lowest
            if view.worker_id not in found:
                weighed = found[view.worker_id] = self._weigh(asked, view, pool)
                uncached = demand.prompt_tokens - weighed.cached
                alone = local is None or uncached <= local.maximum(view)
                lowest = min(lowest, weighed.cost if alone or local is None else weighed.cost + local.saves)

        holders = self._usable_holders(role, asked, workers, exclude)
        holder = next(holders, None)
        for standing, view in workers.ranked(role):
            if view.worker_id in exclude:
                continue
            while holder is not None and holder[0].worker_id in found:
                holder = next(holders, None)
            cached = 0 if holder is None else min(holder[1] * demand.block_size, demand.prompt_tokens)
            least = standing + prompt - self._most_credit(asked, cached, pool)
            if local is not None and demand.prompt_tokens - cached > local.most:
                least += local.saves
            if lowest + slack < least or (lowest <= least and len(found) >= _ENOUGH_EQUALS):
                break
            if len(found) >= _MAX_WEIGHED:
                break
            weigh(view)
            if holder is not None:
                weigh(holder[0])
        return sorted(found.values(), key=lambda weighed: weighed.cost)

    @staticmethod
    def _usable_holders(
        role: Role, asked: _Asked, workers: Ranked, exclude: Collection[str]
    ) -> Iterator[tuple[WorkerView, int]]:
        for at in asked.order:
            worker_id = asked.holders[at]
            view = workers.get(worker_id, role)
            if view is not None and worker_id not in exclude:
                yield view, asked.blocks[at]

    # --- the cost of one --------------------------------------------------------------------------------------------

    def _weigh(self, asked: _Asked, view: WorkerView, pool: Pool) -> _Weighed:
        demand, config = asked.demand, self._config
        prefix = demand.cached_blocks.get(view.worker_id, _NOTHING)
        cached = min(prefix.blocks * demand.block_size, demand.prompt_tokens)
        pace = _pace(view.prefill_token_s, pool.prefill_token_s)
        heat = view.recent_requests / max(pool.recent_requests, _NEVER_HOT[view.role])
        queued = _queued(view, pool) * pace
        prompt = _work(demand.prompt_tokens, pool) * pace
        fetchable = self._fetchable(asked, view.worker_id)
        credit = self._saved(pool, prefix, cached, fetchable) * pace
        if heat > 1.0 and config.heat_limit is not None:
            credit *= max(1.0 - (heat - 1.0) / (config.heat_limit - 1.0), 0.0)
        decode = 0.0
        if view.role == "decode":
            slow = _pace(view.decode_step_s, pool.decode_step_s)
            own = (
                demand.prompt_tokens / demand.block_size * (slow - 1.0)
            )  # its own blocks, on a slower worker
            decode = config.decode_block_weight * (view.active_blocks * slow + own)
        cost = queued + prompt - credit + decode
        fetch = max(fetchable - cached, 0) if fetchable - cached >= config.fetch_min_tokens else 0
        return _Weighed(cost, view, cached, queued, prompt, credit, decode, heat, pace, fetch)

    @staticmethod
    def _fetchable(asked: _Asked, worker_id: str) -> int:
        """The longest prefix of another worker, in tokens."""
        tokens, _ = asked.longest if asked.longest[1] != worker_id else asked.second
        return tokens

    def _saved(self, pool: Pool, prefix: CachedPrefix, cached: int, fetchable: int) -> float:
        """Tokens of work. The larger of what it holds, and what it holds beside what it could fetch: so more is
        never worth less, wherever it lies."""
        credit = self._config.tier_credit
        if not cached:
            own = beside = 0.0
        else:
            block = _work(cached, pool) / prefix.blocks
            host, disk = prefix.host * block, prefix.disk * block
            device = (prefix.blocks - prefix.host - prefix.disk) * block
            own = device * credit.device + host * credit.host + disk * credit.disk
            beside = (
                device * max(credit.device - credit.remote, 0.0)
                + host * max(credit.host - credit.remote, 0.0)
                + disk * max(credit.disk - credit.remote, 0.0)
            )
        fetched = fetchable - self._config.fetch_min_tokens
        if fetched > 0:
            own = max(own, credit.remote * _work(fetched, pool) + beside)
        return own * self._config.cache_credit

    def _most_credit(self, asked: _Asked, cached: int, pool: Pool) -> float:
        """The most that `_saved` can be for a worker that holds at most `cached` tokens."""
        fetchable = max(asked.longest[0] - self._config.fetch_min_tokens, 0)
        held = _work(cached, pool)
        fetched = self._config.tier_credit.remote * _work(fetchable, pool) + self._above_remote * held
        return max(self._best_tier * held, fetched) * self._config.cache_credit

    # --- pairs ------------------------------------------------------------------------------------------------------

    def _pair(
        self,
        asked: _Asked,
        workers: Ranked,
        exclude: Collection[str],
        decodes: list[_Weighed],
        prefills: list[_Weighed],
        local: _LocalPrefill,
    ) -> tuple[_Weighed, _Weighed | None, float]:
        demand = asked.demand
        alone = [d for d in decodes if demand.prompt_tokens - d.cached <= local.maximum(d.view)]
        pairs: list[tuple[_Weighed, _Weighed | None, float]] = [(d, None, 0.0) for d in alone]
        if len(alone) < len(decodes):
            least = min((d.cost for d in alone), default=float("inf"))
            remote = [d for d in decodes if d not in alone] if alone else decodes
            if remote[0].cost + prefills[0].cost <= least:
                pairs += self._handed_over(asked, workers, exclude, remote, prefills, local)
        costs = [d.cost + (0.0 if p is None else p.cost + distance) for d, p, distance in pairs]
        return self._any(pairs, costs, self._slack(demand))

    def _handed_over(
        self,
        asked: _Asked,
        workers: Ranked,
        exclude: Collection[str],
        decodes: list[_Weighed],
        prefills: list[_Weighed],
        local: _LocalPrefill,
    ) -> list[tuple[_Weighed, _Weighed | None, float]]:
        """Each D with each P of the cheapest, with the neighbours of these, and with what lies between them."""
        demand = asked.demand
        if not demand.token_bytes:
            return [
                (
                    self._any(decodes, [d.cost for d in decodes], self._slack(demand)),
                    self._any(prefills, [p.cost for p in prefills], self._slack(demand)),
                    0.0,
                )
            ]
        ds, ps = _shortlist(decodes, self._rng), _shortlist(prefills, self._rng)
        near_ps = self._neighbours("prefill", ds, ps, asked, workers, exclude)
        near_ds = self._neighbours("decode", ps, ds, asked, workers, exclude)
        ds += [d for d in near_ds if demand.prompt_tokens - d.cached > local.maximum(d.view)]
        ps += near_ps
        token_s = workers.pool("prefill").prefill_token_s or _NOMINAL_TOKEN_S
        pairs: list[tuple[_Weighed, _Weighed | None, float]] = []
        lowest = float("inf")
        for d in ds:
            size = (demand.prompt_tokens - d.cached) * demand.token_bytes / token_s
            for p in ps:
                if d.cost + p.cost > lowest:
                    continue
                distance = size / self._rate(p.view, d.view)
                pairs.append((d, p, distance))
                lowest = min(lowest, d.cost + p.cost + distance)
        return pairs

    def _neighbours(
        self,
        role: Role,
        of: list[_Weighed],
        known: list[_Weighed],
        asked: _Asked,
        workers: Ranked,
        exclude: Collection[str],
    ) -> list[_Weighed]:
        """Workers of this role with the best standing on the hosts of those others."""
        pool, names = workers.pool(role), {weighed.view.worker_id for weighed in known}
        found = []
        for host in {weighed.view.host for weighed in of if weighed.view.host}:
            left = _NEIGHBOURS
            for _, view in workers.ranked(role, host):
                if view.worker_id in exclude:
                    continue
                if view.worker_id not in names:
                    found.append(self._weigh(asked, view, pool))
                left -= 1
                if not left:
                    break
        return found

    def _rate(self, prefill: WorkerView, decode: WorkerView) -> float:
        """Bytes per second on the way from P to D."""
        way = prefill.peers.get(decode.worker_id)
        if way is not None and way.bytes_per_s > 0:
            return way.bytes_per_s
        if prefill.host and prefill.host == decode.host:
            return self._config.host_bytes_per_s
        # As the slowest of those that this P knows: a guess that is far too low would keep it from finding out.
        known = [way.bytes_per_s for way in islice(prefill.peers.values(), _WAYS) if way.bytes_per_s > 0]
        return min(known, default=self._config.network_bytes_per_s)

    def _local_prefill(self, workers: Ranked, prefill: _Weighed | None) -> _LocalPrefill:
        if prefill is None:
            return _LocalPrefill(self._config, PREFILL_EVERYTHING, 0.0, 0.0, 0.0)
        known = workers.pool("decode").prefill_token_s or workers.pool("prefill").prefill_token_s
        token_s = prefill.view.prefill_token_s or workers.pool("prefill").prefill_token_s or known
        wait_s = _queued(prefill.view, workers.pool("prefill")) * token_s
        most = max(self._config.local_prefill_max, wait_s / known if known else 0.0)
        return _LocalPrefill(self._config, most, prefill.cost, wait_s, known)

    def _slack(self, demand: Demand) -> float:
        """Costs that differ by no more count as equal."""
        return self._config.tolerance * demand.prompt_tokens

    def _any(self, candidates: list[T], costs: list[float], slack: float = 0.0) -> T:
        """Of the cheapest, any."""
        enough = min(costs) + slack
        best = [candidate for candidate, cost in zip(candidates, costs, strict=True) if cost <= enough]
        return best[0] if len(best) == 1 else self._rng.choice(best)


@dataclass(frozen=True, slots=True)
class _LocalPrefill:
    """How many tokens a decode worker may compute by itself."""

    config: PolicyConfig
    most: float  # any decode worker
    saves: float  # the share of the cheapest prefill worker
    wait_s: float  # before the prefill worker could begin
    token_s: float  # of a decode worker that has not measured its own; 0: nobody has measured anything

    def maximum(self, view: WorkerView) -> int:
        if self.most == PREFILL_EVERYTHING:
            return PREFILL_EVERYTHING
        token_s = view.prefill_token_s or self.token_s
        if not self.wait_s or not token_s:
            return self.config.local_prefill_max
        until_s = (
            self.wait_s if not view.active_blocks else min(self.wait_s, self.config.local_prefill_stall_s)
        )
        return max(int(until_s / token_s) - view.queued_prefill_tokens, self.config.local_prefill_max)


def _work(tokens: int, pool: Pool) -> float:
    """Of a prompt, in tokens of work: each token attends to all before it."""
    return tokens * (1.0 + pool.attention * tokens / 2)


def _queued(view: WorkerView, pool: Pool) -> float:
    return view.queued_prefill_tokens + pool.attention * view.queued_prefill_pairs


def _shown(demand: Demand, weighed: list[_Weighed], chosen: _Weighed | None) -> tuple[Score, ...]:
    """The cheapest, and in any case the one that was chosen."""
    shown = weighed[:_SHOWN]
    if chosen is not None and not any(other.view is chosen.view for other in shown):
        shown = sorted([*shown, chosen], key=lambda one: one.cost)
    return tuple(one.score(demand) for one in shown)


def _shortlist(sorted_by_cost: list[_Weighed], rng: random.Random) -> list[_Weighed]:
    """The cheapest few; which of those that cost the same as the last of them, is left to chance."""
    if len(sorted_by_cost) <= _WIDTH:
        return list(sorted_by_cost)
    edge = sorted_by_cost[_WIDTH - 1].cost
    below = [weighed for weighed in sorted_by_cost[:_WIDTH] if weighed.cost < edge]
    equal = [weighed for weighed in sorted_by_cost if weighed.cost == edge]
    return below + rng.sample(equal, _WIDTH - len(below))


def _pace(own_s: float, fastest_s: float) -> float:
    """How many times slower than the fastest; who has not measured counts as one of these."""
    return min(max(own_s / fastest_s, 1.0), _MAX_PACE) if own_s and fastest_s else 1.0
