"""The cheapest pools that keep an SLO, and where smaller ones fall short. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.planner.estimate import Estimate, Pools, estimate
from cluster.planner.profile import Profile
from cluster.planner.slo import Slo
from cluster.planner.workload import Workload


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one worker of each kind, in any unit."""

    prefill: float = 1.0
    decode: float = 1.0
    unified: float = 1.0

    def of(self, pools: Pools) -> float:
        if pools.unified:
            return pools.decode * self.unified
        return pools.prefill * self.prefill + pools.decode * self.decode


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """`best` is the cheaper of `split` and `unified`; None: nothing up to `max_workers` keeps the SLO.

    `smaller`: one worker fewer in each pool of `best`, and what then falls short. Where nothing keeps the SLO, `smaller`
    is what the largest pools that were looked at lack.
    """

    best: Estimate | None
    split: Estimate | None
    unified: Estimate | None
    smaller: tuple[Estimate, ...]


def search(
    workload: Workload,
    profile: Profile,
    slo: Slo,
    *,
    share: float = 0.99,
    max_workers: int = 64,
    costs: Costs | None = None,
) -> PoolPlan:
    """`max_workers`: of each pool. Raises ValueError for an SLO that is not of TTFT or TPOT."""
    if slo.e2e_s is not None:
        raise ValueError("slo: e2e can't be planned for; give ttft and tpot")
    if not 0.5 <= share < 1:
        raise ValueError(f"share is {share:g}, it must be in 0.5 … 1 (1 excluded)")
    if max_workers < 1:
        raise ValueError(f"max workers is {max_workers}, it must be at least 1")
    prices = costs or Costs()
    seen: dict[Pools, Estimate] = {}

    def at(prefill: int, decode: int) -> Estimate:
        pools = Pools(prefill, decode)
        if pools not in seen:
            seen[pools] = estimate(workload, profile, pools, slo, share)
        return seen[pools]

    unified = _at_unified(at, max_workers)
    split = _cheapest_split(at, max_workers, prices)
    candidates = [found for found in (split, unified) if found is not None]
    if not candidates:
        return PoolPlan(None, None, None, (at(max_workers, max_workers), at(0, max_workers)))
    best = min(candidates, key=lambda found: prices.of(found.pools))
    return PoolPlan(best, split, unified, tuple(at(p, d) for p, d in _one_less(best.pools)))


def _one_less(pools: Pools) -> list[tuple[int, int]]:
    """As far as there is one to spare: no pool of a split cluster can be empty."""
    found = [(pools.prefill, pools.decode - 1)] if pools.decode > 1 else []
    return [(pools.prefill - 1, pools.decode), *found] if pools.prefill > 1 else found


def _at_unified(at: Callable[[int, int], Estimate], most: int) -> Estimate | None:
    count = _least(lambda workers: at(0, workers).ok, most)
    return None if count is None else at(0, count)


def _cheapest_split(at: Callable[[int, int], Estimate], most: int, prices: Costs) -> Estimate | None:
    """More decode workers can only spare prefill workers while those wait for seats: a few steps are looked at."""
    decode = _least(lambda workers: at(most, workers).ok, most)
    best: Estimate | None = None
    while decode is not None and decode <= most:
        prefill = _least_prefill(at, decode, most)
        if prefill is not None:
            found = at(prefill, decode)
            if best is None or prices.of(found.pools) < prices.of(best.pools):
                best = found
            elif prices.of(Pools(1, decode)) >= prices.of(best.pools) or prefill == best.pools.prefill:
                break
        decode += 1
    return best


def _least_prefill(at: Callable[[int, int], Estimate], decode: int, most: int) -> int | None:
    return _least(lambda prefill: at(prefill, decode).ok, most)


def _least(enough: Callable[[int], bool], most: int) -> int | None:
    """The smallest number that is enough, where every larger one is too."""
    if not enough(most):
        return None
    low, high = 0, most  # `high` is enough, `low` is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
