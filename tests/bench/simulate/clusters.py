"""Small simulated clusters for the tests."""

from __future__ import annotations

from typing import Any

from bench.simulate.cluster import Cluster, ClusterConfig
from bench.simulate.cost import StepCost
from bench.simulate.jobs import Asked
from bench.simulate.traces import SessionsShape, sessions
from bench.simulate.worker import Limits
from router.config import RouterConfig

BLOCK = 16
COST = StepCost(
    prompt=((16.0, 0.004), (128.0, 0.010)),
    pair_s=1e-7,
    decode_base_s=0.005,
    sequence_s=1e-4,
    context_s=1e-7,
    kv_token_bytes=1000.0,
    source="made up",
)
SHAPE = SessionsShape(
    sessions=40,
    turns=(1, 4),
    think_s=0.5,
    question_tokens=(8, 120),
    answer_tokens=(1, 60),
    system_prompts=4,
    system_tokens=(20, 200),
    per_s=20.0,
)


def unbounded(**policy: Any) -> RouterConfig:
    return RouterConfig.model_validate(
        {"admission": {"max_queue": 10**9, "queue_timeout_s": 1e9}, "policy": policy}
    )


def config(**changes: Any) -> ClusterConfig:
    limits = Limits(
        num_blocks=changes.pop("num_blocks", 400),
        block_size=BLOCK,
        max_num_seqs=16,
        max_num_batched_tokens=128,
    )
    given: dict[str, Any] = {"cost": COST, "limits": limits, "decode": 3, "router": unbounded()}
    return ClusterConfig(**(given | changes))


def trace(**changes: Any) -> list[Asked]:
    fields = {name: getattr(SHAPE, name) for name in SHAPE.__dataclass_fields__}
    return sessions(SessionsShape(**(fields | changes)), BLOCK)


def simulate(config: ClusterConfig, asked: list[Asked], speed: float = 1.0) -> Cluster:
    """Run, and hold everything that must be true at rest."""
    cluster = Cluster(config, asked)
    cluster.run(speed)
    cluster.settle()
    cluster.check_at_rest()
    return cluster
