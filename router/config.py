"""Settings of a router replica. Each field is validated; unknown keys are refused by name."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, ByteSize, Field

from workers.config import Section


def _api_key(key: str) -> str:
    if not key or key != key.strip():  # an empty one would let everybody in, the other nobody
        raise ValueError("must not be empty, nor begin or end with a space")
    return key


class HttpConfig(Section):
    host: str = Field("127.0.0.1", description="address the HTTP server binds")
    port: int = Field(8000, ge=0, le=65535, description="0: any free port")
    max_body: ByteSize = Field(ByteSize(4 * 1024**2), gt=0, description="largest request body, e.g. 4MiB")
    api_keys: list[Annotated[str, AfterValidator(_api_key)]] = Field(
        default=[], repr=False, description="when not empty, every path but /health wants one as Bearer token"
    )


class GrpcConfig(Section):
    enabled: bool = True
    host: str = Field("127.0.0.1", description="address the gRPC server binds")
    port: int = Field(9000, ge=0, le=65535, description="0: any free port")


class TierCredit(Section):
    """What a cached token is worth by the place from which a worker would take it."""

    device: float = Field(1.0, ge=0, le=1, description="in the KV cache")
    host: float = Field(
        0.75, ge=0, le=1, description="in the worker's host memory (engine.host_cache_memory)"
    )
    disk: float = Field(0.25, ge=0, le=1, description="on the worker's disk (engine.disk_cache_memory)")
    remote: float = Field(
        0.5, ge=0, le=1, description="in another worker's KV cache, from which it can be fetched"
    )


POLICY_NAMES = ("cost", "round_robin", "random", "least_loaded", "power_of_two", "prefix_only")


def _policy_name(name: str) -> str:
    if name not in POLICY_NAMES and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise ValueError(f"must be one of {', '.join(POLICY_NAMES)}, or module:Class of your own")
    return name


class PolicyConfig(Section):
    """Which policy chooses workers, and the weights of `cost`, in tokens of work (router/policies/cost.py)."""

    name: Annotated[str, AfterValidator(_policy_name)] = Field(
        "cost",
        description="cost, round_robin, random, least_loaded, power_of_two, prefix_only, or module:Class",
    )
    local_prefill_max: int = Field(
        64,
        ge=0,
        description="a prompt with at most this many uncached tokens is prefilled by the decode worker",
    )
    local_prefill_stall_s: float = Field(
        0.1,
        ge=0,
        description="when prefill workers are behind, a decode worker reads longer prompts itself, "
        "as long as that holds up its running streams by no more than this many seconds",
    )
    cache_credit: float = Field(1.0, ge=0, le=1, description="how much a cached token lowers the cost")
    tier_credit: TierCredit = TierCredit()
    fetch_min_tokens: int = Field(
        128,
        ge=1,
        description="a worker is told of a longer cached prefix elsewhere when it is this much longer",
    )
    decode_block_weight: float = Field(
        1.0, ge=0, description="cost of one KV block in use on a decode worker"
    )
    heat_limit: float | None = Field(
        2.0,
        gt=1,
        description="a worker with this many times the mean requests of its pool gets no credit for what it has "
        "cached; null: credit does not depend on load",
    )
    heat_window_s: float = Field(10.0, gt=0, description="seconds over which these requests are averaged")
    host_bytes_per_s: float = Field(
        4e9, gt=0, description="rate of KV blocks between workers of one host, until it is measured"
    )
    network_bytes_per_s: float = Field(1e9, gt=0, description="the same between hosts")


class AdmissionConfig(Section):
    max_queue: int = Field(1024, ge=0, description="requests that may wait for room; beyond it 429")
    queue_timeout_s: float = Field(60.0, gt=0, description="seconds a request may wait for room before 503")
    stall_timeout_s: float = Field(
        300.0, gt=0, description="seconds a living worker may say nothing of a request it has taken"
    )
    max_attempts: int = Field(
        8, ge=1, description="placements tried for one request when workers die under it"
    )


class RouterConfig(Section):
    replicas: int = Field(1, ge=1, description="router replicas; on one node they share the ports")
    http: HttpConfig = HttpConfig()
    grpc: GrpcConfig = GrpcConfig()
    policy: PolicyConfig = PolicyConfig()
    admission: AdmissionConfig = AdmissionConfig()
    heartbeat_s: float = Field(0.5, gt=0, description="seconds between signs of life on worker connections")
    timeout_s: float = Field(3.0, gt=0, description="seconds of silence after which a worker counts as dead")
