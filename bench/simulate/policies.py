"""The policies that can be simulated: the router's own, and those that the simulator brings.

`oracle` is shown every cache and every queue exactly and at once, which no router can be, and sends each request where
the least is to be computed before its first token. By it capacity is measured, so that the loads of a comparison mean
the same whatever becomes of the router's policies.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Sequence

from router.config import PolicyConfig
from router.policy import PREFILL_EVERYTHING, Choice, Demand, Policy, Score, WorkerView


class RoundRobin:
    """One after the other."""

    def __init__(self, config: PolicyConfig, rng: random.Random) -> None:
        self._config = config
        self._turns = {"decode": 0, "prefill": 0}

    def choose(
        self, demand: Demand, views: Iterable[WorkerView], exclude: Collection[str] = ()
    ) -> Choice | None:
        able = [view for view in views if view.worker_id not in exclude]
        decodes = [view for view in able if view.role == "decode"]
        prefills = [view for view in able if view.role == "prefill"]
        if not decodes:
            return None
        decode = score_of(demand, self._pick(demand, decodes))
        local_max = self._config.local_prefill_max if prefills else PREFILL_EVERYTHING
        prefill = None
        if decode.uncached_tokens > local_max:
            prefill = score_of(demand, self._pick(demand, prefills))
        return Choice(decode, prefill, local_max, (), demand)

    def choose_prefill(
        self, demand: Demand, views: Iterable[WorkerView], exclude: Collection[str] = ()
    ) -> Score | None:
        able = [view for view in views if view.role == "prefill" and view.worker_id not in exclude]
        return score_of(demand, self._pick(demand, able)) if able else None

    def _pick(self, demand: Demand, views: Sequence[WorkerView]) -> WorkerView:
        role = views[0].role
        self._turns[role] += 1
        return views[self._turns[role] % len(views)]


class Random(RoundRobin):
    """Anybody."""

    def __init__(self, config: PolicyConfig, rng: random.Random) -> None:
        super().__init__(config, rng)
        self._rng = rng

    def _pick(self, demand: Demand, views: Sequence[WorkerView]) -> WorkerView:
        return self._rng.choice(views)


class Oracle(RoundRobin):
    """Where the fewest tokens are to be computed before its first one, streams weighing a little."""

    def _pick(self, demand: Demand, views: Sequence[WorkerView]) -> WorkerView:
        def work(view: WorkerView) -> float:
            prefix = demand.cached_blocks.get(view.worker_id)
            cached = 0 if prefix is None else prefix.blocks * demand.block_size
            return view.queued_prefill_tokens - cached + view.active_blocks

        return min(views, key=work)


def score_of(demand: Demand, view: WorkerView, cost: float = 0.0) -> Score:
    prefix = demand.cached_blocks.get(view.worker_id)
    cached = 0 if prefix is None else min(prefix.blocks * demand.block_size, demand.prompt_tokens)
    return Score(
        worker_id=view.worker_id,
        role=view.role,
        queued_prefill_tokens=view.queued_prefill_tokens,
        cached_tokens=cached,
        uncached_tokens=demand.prompt_tokens - cached,
        active_blocks=view.active_blocks,
        cost=cost,
    )


ORACLE = "oracle"
Make = Callable[[PolicyConfig, random.Random], "Policy | RoundRobin"]
POLICIES: dict[str, Make] = {
    "cost": Policy,
    "round_robin": RoundRobin,
    "random": Random,
    ORACLE: Oracle,
}


def make(name: str, config: PolicyConfig, rng: random.Random) -> Policy | RoundRobin:
    """Raises ValueError for a name that is none."""
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} is not known: it must be one of {', '.join(POLICIES)}")
    return POLICIES[name](config, rng)


def fetch_from(
    policy: Policy | RoundRobin, demand: Demand, worker_id: str, reachable: Callable[[str], bool]
) -> tuple[str, int] | None:
    """Who has a longer prefix than this worker; the dispatcher asks the same whatever the policy."""
    return policy.fetch_from(demand, worker_id, reachable) if isinstance(policy, Policy) else None
