"""The policies that can be simulated: those of the router, and one that knows more than a router can.

`oracle` is shown every cache and every queue exactly and at once, and sends each request where the fewest tokens are to
be computed before its first one. By it capacity is measured, so that the loads of a comparison mean the same whatever
becomes of the router's policies.
"""

from __future__ import annotations

import random

from router.config import PolicyConfig
from router.policies import POLICIES, open_policy
from router.policies.baselines import PickEach
from router.policy import Demand, Policy, Score, WorkerView, plain_score

ORACLE = "oracle"
NAMES = (*POLICIES, ORACLE)


def oracle(config: PolicyConfig) -> PickEach:
    """Streams weigh a little: a token for each block."""

    def pick(demand: Demand, views: list[WorkerView]) -> Score:
        def work(view: WorkerView) -> float:
            prefix = demand.cached_blocks.get(view.worker_id)
            cached = 0 if prefix is None else prefix.blocks * demand.block_size
            return view.queued_prefill_tokens - cached + view.active_blocks

        return plain_score(demand, min(views, key=work))

    return PickEach(config.local_prefill_max, pick)


def make(name: str, config: PolicyConfig, rng: random.Random) -> Policy:
    """Raises ValueError for a name that is none."""
    if name == ORACLE:
        return oracle(config)
    if name not in POLICIES and ":" not in name:
        raise ValueError(
            f"policy {name!r} is not known: it must be one of {', '.join(NAMES)}, or module:Class"
        )
    return open_policy(config.model_copy(update={"name": name}), rng)
