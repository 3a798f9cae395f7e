"""The policies that there are, by their name in `router.policy.name`. docs/routing.md shows how to add one."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from typing import Any

from router.config import PolicyConfig
from router.policies.baselines import anybody, least_loaded, power_of_two, prefix_only, round_robin
from router.policies.cost import CostPolicy
from router.policy import Policy

Make = Callable[[PolicyConfig, random.Random], Policy]

POLICIES: dict[str, Make] = {
    "cost": CostPolicy,
    "round_robin": round_robin,
    "random": anybody,
    "least_loaded": least_loaded,
    "power_of_two": power_of_two,
    "prefix_only": prefix_only,
}


def open_policy(config: PolicyConfig, rng: random.Random | None = None) -> Policy:
    """The policy that `config.name` means: one of `POLICIES`, or `module:Class`. Raises ValueError."""
    make: Any = POLICIES.get(config.name)
    if make is None:
        module, _, name = config.name.partition(":")
        try:
            make = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            known = ", ".join(POLICIES)
            raise ValueError(
                f"router.policy.name is {config.name!r}: {error}; there are {known}, or module:Class"
            ) from error
    policy: Policy = make(config, rng or random.Random())
    return policy
