"""Settings of a router replica. Each field is validated; unknown keys are refused by name."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, ByteSize, Field, model_validator

from workers.config import Section

DEFAULT_TENANT = "default"
HASHED_KEY = "sha256:"
_INT32 = 2**31


def checked_api_key(key: str) -> str:
    """Raises ValueError, which does not repeat the key."""
    if not key or key != key.strip():  # an empty one would let everybody in, the other nobody
        raise ValueError("must not be empty, nor begin or end with a space")
    if key.startswith(HASHED_KEY) and not re.fullmatch(r"[0-9a-f]{64}", key.removeprefix(HASHED_KEY)):
        raise ValueError(f"{HASHED_KEY} must be followed by 64 lower-case hexadecimal digits")
    return key


def key_digest(key: str) -> bytes:
    """SHA-256 of a key as the configuration has it, plain or hashed."""
    if key.startswith(HASHED_KEY):
        return bytes.fromhex(key.removeprefix(HASHED_KEY))
    return hashlib.sha256(key.encode()).digest()


def _tenant_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?", name):
        raise ValueError("must be 1 to 64 letters, digits and inner dots, hyphens and underscores")
    return name


ApiKey = Annotated[str, AfterValidator(checked_api_key)]


class HttpConfig(Section):
    host: str = Field("127.0.0.1", description="address the HTTP server binds")
    port: int = Field(8000, ge=0, le=65535, description="0: any free port")
    max_body: ByteSize = Field(ByteSize(4 * 1024**2), gt=0, description="largest request body, e.g. 4MiB")
    api_keys: list[ApiKey] = Field(
        default=[],
        repr=False,
        description="of the tenant `default`, or sha256:... of them; with any key set, every path but /health "
        "wants one as Bearer token",
    )
    api_keys_file: Path | None = Field(
        None, description="more of them, one a line; read again when it changes"
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
        0.8,
        ge=0,
        le=1,
        description="in another worker's KV cache, from which it can be fetched; less where that takes long",
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
    keep_decisions: int = Field(
        512, ge=0, description="requests that a router can explain (`headrace explain`), the last ones"
    )
    tolerance: float = Field(
        0.0,
        ge=0,
        description="costs that differ by no more than this share of the prompt count as equal; 0.4 is for many "
        "router replicas, which would all choose the same worker between two heartbeats",
    )
    host_bytes_per_s: float = Field(
        4e9, gt=0, description="rate of KV blocks between workers of one host, until it is measured"
    )
    network_bytes_per_s: float = Field(1e9, gt=0, description="the same between hosts")


class AdmissionConfig(Section):
    max_queue: int = Field(1024, ge=0, description="requests that may wait for room; beyond it 429")
    queue_timeout_s: float = Field(60.0, gt=0, description="seconds a request may wait for room before 503")
    ttft_goal_s: float | None = Field(
        None,
        gt=0,
        description="seconds to the first token that are worth serving: who would come later is refused at once; "
        "null: queue_timeout_s alone bounds the wait",
    )
    request_timeout_s: float | None = Field(
        None, gt=0, description="seconds a request may take in all when it names no timeout; null: no bound"
    )
    ageing_s: float = Field(
        10.0,
        ge=0,
        description="seconds of waiting after which a less urgent class gets one place of four",
    )
    stall_timeout_s: float = Field(
        300.0, gt=0, description="seconds a living worker may say nothing of a request it has taken"
    )
    max_attempts: int = Field(
        8, ge=1, description="placements tried for one request when workers die under it"
    )


class TenantConfig(Section):
    """Who asks, known by the API key. Rates and concurrency are shared out between the router replicas."""

    name: Annotated[str, AfterValidator(_tenant_name)] = Field(
        description="in messages, metrics and the cache's salt"
    )
    api_keys: list[ApiKey] = Field(default=[], repr=False, description="or sha256:... of them")
    api_keys_file: Path | None = Field(
        None, description="more of them, one a line; read again when it changes"
    )
    weight: float = Field(1.0, gt=0, le=1e6, description="share of the workers when many tenants wait")
    priority: int = Field(
        0, ge=-_INT32, lt=_INT32, description="of requests that name none; lower goes first"
    )
    min_priority: int | None = Field(
        None, ge=-_INT32, lt=_INT32, description="the most urgent a request may name; null: `priority`"
    )
    max_requests_per_minute: int | None = Field(None, ge=1, description="null: no limit")
    max_tokens_per_minute: int | None = Field(
        None, ge=1, description="of prompts and answers together; null: no limit"
    )
    max_concurrent: int | None = Field(
        None, ge=1, description="answers under way at once, n = 3 is three; null: no limit"
    )
    max_queue: int | None = Field(
        None, ge=0, description="of its answers that may wait for room; null: no limit"
    )
    share_cache: bool = Field(
        False, description="whether its cached prefixes and those of others who share are one"
    )
    operator: bool = Field(False, description="whether it may read /metrics and /cluster")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.min_priority is not None and self.min_priority > self.priority:
            raise ValueError(
                f"min_priority ({self.min_priority}) is above priority ({self.priority}): lower is more urgent"
            )
        return self


class ExpertsConfig(Section):
    """Where the experts of a MoE model are placed, for groups of workers that share them (docs/experts.md)."""

    rebalance: bool = Field(
        True, description="place experts anew while serving; off: their load is only shown"
    )
    interval_s: float = Field(2.0, gt=0, description="seconds between two looks at the load of experts")
    window_s: float = Field(
        3.0, gt=0, description="seconds of counts that are kept together, more where few tokens are served"
    )
    half_life_s: float = Field(30.0, gt=0, description="seconds after which a count weighs half as much")
    min_tokens: int = Field(
        20_000,
        ge=1,
        description="tokens, each counted once for every expert that it went to, that layers must have seen",
    )
    min_gain: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="share by which the fullest ranks must have less to do, on counts that were not planned with",
    )
    horizon_s: float = Field(
        300.0,
        gt=0,
        description="seconds for which it must pay: what is saved in them against loading experts",
    )
    pause_s: float = Field(
        10.0, ge=0, description="seconds between two placements, unless a rank died or came back"
    )
    max_moves: int | None = Field(
        None,
        ge=1,
        description="experts that may be loaded for one placement, over all layers; null: any number",
    )
    expert_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="part of a rank's time that its experts take, until ranks have measured it",
    )
    bytes_per_s: float = Field(
        2e9, gt=0, description="rate at which a rank loads experts, until ranks have measured it"
    )
    stall_s: float = Field(
        120.0, gt=0, description="seconds after which a placement that is not in use is told of, and replaced"
    )
    plan_timeout_s: float = Field(60.0, gt=0, description="seconds that planning may take")


class RouterConfig(Section):
    replicas: int = Field(1, ge=1, description="router replicas; on one node they share the ports")
    http: HttpConfig = HttpConfig()
    grpc: GrpcConfig = GrpcConfig()
    policy: PolicyConfig = PolicyConfig()
    admission: AdmissionConfig = AdmissionConfig()
    experts: ExpertsConfig = ExpertsConfig()
    tenants: list[TenantConfig] = Field(
        default=[], description="docs/tenants.md; without any, all keys are of the tenant `default`"
    )
    heartbeat_s: float = Field(0.5, gt=0, description="seconds between signs of life on worker connections")
    timeout_s: float = Field(3.0, gt=0, description="seconds of silence after which a worker counts as dead")

    @model_validator(mode="after")
    def _tenants_agree(self) -> Self:
        names: set[str] = set()
        owners = {key_digest(key): DEFAULT_TENANT for key in self.http.api_keys}
        for number, tenant in enumerate(self.tenants):
            if tenant.name in names:
                raise ValueError(f"tenants.{number}.name is {tenant.name!r}, and so is an earlier one")
            names.add(tenant.name)
            if tenant.name != DEFAULT_TENANT and not tenant.api_keys and tenant.api_keys_file is None:
                raise ValueError(
                    f"tenants.{number} ({tenant.name}) has neither api_keys nor api_keys_file: "
                    "nobody could be this tenant"
                )
            for at, key in enumerate(tenant.api_keys):
                owner = owners.setdefault(key_digest(key), tenant.name)
                if owner != tenant.name:
                    raise ValueError(
                        f"tenants.{number}.api_keys.{at} ({tenant.name}) is a key of {owner} already"
                    )
        return self

    def all_tenants(self) -> list[TenantConfig]:
        """Those configured, and `default`: of http.api_keys, or of everybody where there are no keys.

        Alone it may do as it likes. Beside others it has no right to more than they, unless it is configured.
        """
        if any(tenant.name == DEFAULT_TENANT for tenant in self.tenants):
            return self.tenants
        free = TenantConfig(
            name=DEFAULT_TENANT,
            share_cache=True,
            operator=True,
            min_priority=None if self.tenants else -_INT32,
        )
        return [free, *self.tenants]

    @property
    def wants_keys(self) -> bool:
        """Also while a file of keys is empty: then nobody has one."""
        sources: list[HttpConfig | TenantConfig] = [self.http, *self.tenants]
        return any(source.api_keys or source.api_keys_file is not None for source in sources)
