"""Settings of a router replica. Each field is validated; unknown keys are refused by name."""

from __future__ import annotations

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


class PolicyConfig(Section):
    """Weights of the cost of a worker, in tokens of work (router/policy.py)."""

    local_prefill_max: int = Field(
        64,
        ge=0,
        description="a prompt with at most this many uncached tokens is prefilled by the decode worker",
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
