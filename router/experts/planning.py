"""Planning in a process of its own: it takes up to a second of a core, and streams must not wait for it.

    python -m router.experts.planning < ask > answer        both msgpack

The process lives for one plan, so that a plan that hangs, or takes all memory, takes nothing else with it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Protocol

import msgspec
import numpy as np

from router.config import ExpertsConfig
from router.experts.placement import Options, plan
from router.experts.rebalancer import Seen
from router.experts.topology import Topology
from router.experts.windows import Array
from workers.protocol.experts import Placement, PlacementError

_NICENESS = 10
_REASON_BYTES = 2000


class PlanFailed(Exception):
    """There is no plan. The message says why."""


class PlanAsk(msgspec.Struct, frozen=True):
    halves: bytes  # float64 [2, layers, experts]
    num_layers: int
    num_experts: int
    previous: Placement
    topology: Topology
    version: int
    max_moves: int | None  # in all layers together
    move_cost: float  # share of a layer's time that a move has to save
    rehearse: bool  # plan on the first half alone, too


class PlanAnswer(msgspec.Struct, frozen=True):
    plan: Placement
    rehearsal: Placement  # made from the first half alone; the plan itself where none was asked for


class Planner(Protocol):
    async def plan(self, ask: PlanAsk) -> PlanAnswer:
        """Raises PlanFailed."""


def ask_of(seen: Seen, version: int, config: ExpertsConfig, *, urgent: bool) -> PlanAsk:
    """urgent: ranks have come or gone. Then it may move what it likes, and what it gains is not asked."""
    group, previous = seen.group, seen.group.placement()
    assert previous is not None, "look() plans only for ranks that agree"
    return PlanAsk(
        np.ascontiguousarray(seen.halves, np.float64).tobytes(),
        group.num_layers,
        group.num_experts,
        previous,
        group.topology(),
        version,
        None if urgent else config.max_moves,
        max(_move_cost(seen, config), Options().move_cost),
        not urgent,
    )


def _move_cost(seen: Seen, config: ExpertsConfig) -> float:
    """What a move has to save, so that in all it is worth the time of loading. Ranks load at the same time."""
    group = seen.group
    rate = min(rank.fetch_bytes_per_s or config.bytes_per_s for rank in group.alive)
    loading_s = group.expert_bytes / rate / len(group.alive)
    layer_s = config.horizon_s * (seen.expert_share or config.expert_share) / group.num_layers
    return loading_s / layer_s


def answer(ask: PlanAsk) -> PlanAnswer:
    """Raises PlacementError."""
    halves: Array = np.frombuffer(ask.halves).reshape(2, ask.num_layers, ask.num_experts)
    loads = halves.sum(axis=0)
    loads[~loads.any(axis=1)] = 1.0  # nothing is known of such a layer: take experts for equal
    made = _plan(loads, ask)
    return PlanAnswer(made, _plan(halves[0], ask) if ask.rehearse else made)


def _plan(loads: Array, ask: PlanAsk) -> Placement:
    options = Options(max_moves=ask.max_moves, move_cost=ask.move_cost)
    return plan(loads, ask.topology, ask.previous, options=options, version=ask.version).placement


class ProcessPlanner:
    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    async def plan(self, ask: PlanAsk) -> PlanAnswer:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "router.experts.planning",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # As a Ray job this process may have found its modules in ways of its own.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                out, said = await process.communicate(msgspec.msgpack.encode(ask))
        except TimeoutError:
            raise PlanFailed(
                f"planning took more than {self._timeout_s:g} s (router.experts.plan_timeout_s)"
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            reason = said.decode(errors="replace").strip()[-_REASON_BYTES:]
            raise PlanFailed(reason or f"the planning process ended with {process.returncode}")
        return msgspec.msgpack.decode(out, type=PlanAnswer)


def main() -> None:
    os.nice(_NICENESS)
    ask = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=PlanAsk)
    try:
        sys.stdout.buffer.write(msgspec.msgpack.encode(answer(ask)))
    except PlacementError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
