"""What other routers do, to compare with: each policy here looks at one thing, or at nothing.

All of them pick a decode worker, and a prefill worker unless D lacks at most `local_prefill_max` tokens.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterable

from router.config import PolicyConfig
from router.policy import PREFILL_EVERYTHING, Choice, Demand, Score, WorkerView, plain_score

Pick = Callable[[Demand, list[WorkerView]], Score]


class PickEach:
    """A policy out of a way to pick one worker among those of a role; never called with none."""

    def __init__(self, local_prefill_max: int, pick: Pick) -> None:
        self._local_prefill_max = local_prefill_max
        self._pick = pick

    def choose(
        self, demand: Demand, views: Iterable[WorkerView], exclude: Collection[str] = ()
    ) -> Choice | None:
        left = [view for view in views if view.worker_id not in exclude]
        decodes = [view for view in left if view.role == "decode"]
        prefills = [view for view in left if view.role == "prefill"]
        if not decodes:
            return None
        decode = self._pick(demand, decodes)
        maximum = self._local_prefill_max if prefills else PREFILL_EVERYTHING
        prefill = self._pick(demand, prefills) if decode.uncached_tokens > maximum else None
        scores = (decode,) if prefill is None else (decode, prefill)
        return Choice(decode, prefill, maximum, scores, demand)

    def choose_prefill(
        self, demand: Demand, views: Iterable[WorkerView], exclude: Collection[str] = ()
    ) -> Score | None:
        prefills = [view for view in views if view.role == "prefill" and view.worker_id not in exclude]
        return self._pick(demand, prefills) if prefills else None


def round_robin(config: PolicyConfig, rng: random.Random) -> PickEach:
    """One after the other."""
    turns = {"prefill": itertools.count(), "decode": itertools.count()}

    def pick(demand: Demand, views: list[WorkerView]) -> Score:
        turn = next(turns[views[0].role])
        view = sorted(views, key=lambda view: view.worker_id)[turn % len(views)]
        return plain_score(demand, view)

    return PickEach(config.local_prefill_max, pick)


def anybody(config: PolicyConfig, rng: random.Random) -> PickEach:
    """`random`."""
    return PickEach(config.local_prefill_max, lambda demand, views: plain_score(demand, rng.choice(views)))


def least_loaded(config: PolicyConfig, rng: random.Random) -> PickEach:
    """The least load; what is cached does not matter."""
    return PickEach(
        config.local_prefill_max,
        lambda demand, views: _cheapest(rng, [plain_score(demand, view, _load(view)) for view in views]),
    )


def power_of_two(config: PolicyConfig, rng: random.Random) -> PickEach:
    """The less loaded of two at random (Mitzenmacher, 2001): nearly as good, and replicas do not all agree."""

    def pick(demand: Demand, views: list[WorkerView]) -> Score:
        two = views if len(views) < 2 else rng.sample(views, 2)
        return _cheapest(rng, [plain_score(demand, view, _load(view)) for view in two])

    return PickEach(config.local_prefill_max, pick)


def prefix_only(config: PolicyConfig, rng: random.Random) -> PickEach:
    """The longest cached prefix, whatever waits there."""

    def pick(demand: Demand, views: list[WorkerView]) -> Score:
        scores = [plain_score(demand, view) for view in views]
        most = max(score.cached_tokens for score in scores)
        return rng.choice([score for score in scores if score.cached_tokens == most])

    return PickEach(config.local_prefill_max, pick)


def _load(view: WorkerView) -> float:
    """Blocks and tokens weigh the same here: within a role one of the two decides."""
    return view.queued_prefill_tokens + view.active_blocks


def _cheapest(rng: random.Random, scores: list[Score]) -> Score:
    lowest = min(score.cost for score in scores)
    return rng.choice([score for score in scores if score.cost == lowest])
