"""The whole tree of settings, composed of what each part owns, and how it is read from YAML and the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ByteSize, Field, ValidationError, model_validator

from cluster.config_errors import ConfigError, explain
from cluster.config_source import Source, merge_overrides, read_source
from router.config import RouterConfig
from workers.config import EngineConfig, Section, SpeculationConfig, TransferConfig
from workers.protocol.messages import Role

__all__ = ["ClusterConfig", "ConfigError", "PoolConfig", "load_config"]


def _cluster_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise ValueError("must be 1 to 40 lower-case letters, digits and inner hyphens")
    return name


def _redis_url(url: str | None) -> str | None:
    if url is not None and not re.match(r"(rediss?|unix)://.", url):
        raise ValueError("must begin with redis://, rediss:// or unix://")
    if url is not None:
        from redis.connection import parse_url

        parse_url(url)  # type: ignore[no-untyped-call]  # raises ValueError
    return url


def _ray_address(address: str | None) -> str | None:
    if address is not None and not re.fullmatch(r"auto|[^/\s]+:\d+", address):
        raise ValueError(
            "must be null, `auto` or host:port of the cluster's GCS (ray:// clients are not supported)"
        )
    return address


LogLevel = Literal["debug", "info", "warning", "error"]


class ModelConfig(Section):
    name: str = Field(
        "smollm2-135m-instruct",
        min_length=1,
        description="the default model, a directory, a GGUF file or a hub id",
    )
    served_name: str | None = Field(
        None, min_length=1, description="name clients use; null: derived from model.name"
    )


class SpeculationOverrides(SpeculationConfig):
    @model_validator(mode="after")
    def _whole(self) -> Self:
        return self


class EngineOverrides(EngineConfig):
    """Engine settings of one pool. Only the fields that were named count; the others come from `engine`.

    Rules between fields are those of the whole, see `ClusterConfig.pool_engine`.
    """

    speculation: SpeculationOverrides = SpeculationOverrides()

    @model_validator(mode="after")
    def _a_core_for_each(self) -> Self:
        return self

    @model_validator(mode="after")
    def _one_tier_below_the_other(self) -> Self:
        return self

    @model_validator(mode="after")
    def _a_token_for_each(self) -> Self:
        return self


class PoolConfig(Section):
    replicas: int = Field(1, ge=0, description="workers of this pool")
    engine: EngineOverrides = Field(
        EngineOverrides(), description="engine settings that differ in this pool, e.g. {max_num_seqs: 128}"
    )
    num_gpus: float | None = Field(
        None, ge=0, description="GPUs of one replica; null: one, or a fair share of those there are, or none"
    )
    num_cpus: float | None = Field(None, ge=0, description="CPUs Ray books for one replica; null: 1")


class PrefillPool(PoolConfig):
    replicas: int = Field(
        1, ge=0, description="workers that read prompts; 0: decode workers do it themselves"
    )


class DecodePool(PoolConfig):
    replicas: int = Field(1, ge=1, description="workers that write answers")


class PoolsConfig(Section):
    prefill: PrefillPool = PrefillPool()
    decode: DecodePool = DecodePool()


class WorkerSection(Section):
    """What every worker process shares."""

    host: str = Field(
        "127.0.0.1",
        description="address the token servers bind; `node`: the address of the Ray node they are on",
    )
    heartbeat_s: float = Field(0.5, gt=0, description="seconds between signs of life to routers and Redis")
    timeout_s: float = Field(
        5.0, gt=0, description="seconds without a sign of life before a peer counts as dead"
    )


class RedisConfig(Section):
    url: Annotated[str | None, AfterValidator(_redis_url)] = Field(
        None,
        repr=False,
        description="redis:// or rediss:// address; null: an embedded Valkey",
    )
    host: str = Field(
        "127.0.0.1", description="address the embedded Valkey binds; `node`: this node's address"
    )
    port: int = Field(0, ge=0, le=65535, description="port of the embedded Valkey; 0: any free port")


class RayConfig(Section):
    address: Annotated[str | None, AfterValidator(_ray_address)] = Field(
        None,
        description="null: start Ray here; `auto` or host:port: join a running cluster",
    )
    object_store_memory: ByteSize = Field(
        ByteSize(80 * 1024**2),
        ge=80 * 1024**2,
        description="Ray's object store (unused by requests), when started here",
    )
    placement_timeout_s: float = Field(
        60.0, gt=0, description="seconds until all replicas must have their places"
    )
    start_timeout_s: float = Field(600.0, gt=0, description="seconds a worker may take to load the model")


class SupervisorConfig(Section):
    backoff_initial_s: float = Field(
        0.5, ge=0, description="seconds before the second restart in a row; doubled each time"
    )
    backoff_max_s: float = Field(30.0, ge=0, description="longest pause between restarts")
    stable_after_s: float = Field(
        30.0, gt=0, description="seconds of life after which earlier deaths are forgotten"
    )
    hang_timeout_s: float = Field(
        3.0, gt=0, description="seconds without a lease in Redis after which a living process counts as hung"
    )
    spares: int = Field(
        1,
        ge=0,
        le=8,
        description="idle processes with all libraries loaded, kept on each node for quick restarts",
    )


class SecurityConfig(Section):
    cluster_secret: str | None = Field(
        None,
        min_length=16,
        repr=False,
        description="shared by workers and routers; null: generated at each start",
    )


class ClusterConfig(Section):
    """Everything `headrace serve` can be told."""

    cluster: Annotated[str, AfterValidator(_cluster_name)] = Field(
        "headrace",
        description="name of this cluster: in Redis keys, in Ray and for `headrace down`",
    )
    log_level: LogLevel = Field("info", description="of every process")
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = Field(
        EngineConfig(), description="of every worker, unless its pool says otherwise"
    )
    pools: PoolsConfig = PoolsConfig()
    worker: WorkerSection = WorkerSection()
    transfer: TransferConfig = TransferConfig()
    router: RouterConfig = RouterConfig()
    redis: RedisConfig = RedisConfig()
    ray: RayConfig = RayConfig()
    supervisor: SupervisorConfig = SupervisorConfig()
    security: SecurityConfig = SecurityConfig()

    def pool(self, role: Role) -> PrefillPool | DecodePool:
        return self.pools.prefill if role == "prefill" else self.pools.decode

    def pool_engine(self, role: Role) -> EngineConfig:
        """Engine settings of a pool: `engine` with the fields its pool names put over it. Raises ValueError."""
        fields, named = self.engine.model_dump(), self.pool(role).engine.model_dump(exclude_unset=True)
        speculation = fields["speculation"] | named.pop("speculation", {})
        try:
            return EngineConfig.model_validate(fields | named | {"speculation": speculation})
        except ValidationError as error:
            mistakes = [m.get("ctx", {}).get("error", m["msg"]) for m in error.errors(include_url=False)]
            raise ValueError(
                f"pools.{role}.engine, put over engine: {'; '.join(map(str, mistakes))}"
            ) from None

    @model_validator(mode="after")
    def _parts_agree(self) -> ClusterConfig:
        prefill, decode = self.pool_engine("prefill"), self.pool_engine("decode")
        if self.pools.prefill.replicas:
            for name in ("block_size", "dtype", "quantization", "kv_cache_dtype"):
                ours, theirs = getattr(prefill, name), getattr(decode, name)
                if ours != theirs:
                    raise ValueError(
                        f"engine.{name} is {ours!r} in pools.prefill and {theirs!r} in pools.decode: "
                        "KV blocks can only be handed over between equal ones"
                    )
        for beat, beat_s, limit, limit_s in (
            ("worker.heartbeat_s", self.worker.heartbeat_s, "worker.timeout_s", self.worker.timeout_s),
            ("worker.heartbeat_s", self.worker.heartbeat_s, "router.timeout_s", self.router.timeout_s),
            ("router.heartbeat_s", self.router.heartbeat_s, "worker.timeout_s", self.worker.timeout_s),
            ("router.heartbeat_s", self.router.heartbeat_s, "router.timeout_s", self.router.timeout_s),
        ):
            if limit_s < 2 * beat_s:
                raise ValueError(f"{limit} is {limit_s:g}: it must be at least twice {beat} ({beat_s:g})")
        http, grpc = self.router.http, self.router.grpc
        if grpc.enabled and http.port and http.port == grpc.port:
            raise ValueError(f"router.http.port and router.grpc.port are both {http.port}: they must differ")
        if self.supervisor.backoff_max_s < self.supervisor.backoff_initial_s:
            raise ValueError("supervisor.backoff_max_s must be at least supervisor.backoff_initial_s")
        return self


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> ClusterConfig:
    """Read the tree from a YAML file (or the defaults), then put `overrides` (dotted name -> value) over it.

    Raises ConfigError, whose message lists every mistake with its place, what came and what is allowed.
    """
    source = read_source(path) if path is not None else Source({}, {})
    source = merge_overrides(source, overrides or {})
    try:
        return ClusterConfig.model_validate(_without_empty_sections(source.data, ClusterConfig))
    except ValidationError as error:
        raise ConfigError(explain(error, ClusterConfig, source.where)) from None


def _without_empty_sections(data: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """`router:` with nothing below it is null in YAML, and means the defaults."""
    kept: dict[str, Any] = {}
    for name, value in data.items():
        field = model.model_fields.get(name)
        section = field.annotation if field is not None else None
        if isinstance(section, type) and issubclass(section, BaseModel):
            if value is None:
                continue
            if isinstance(value, dict):
                value = _without_empty_sections(value, section)
        kept[name] = value
    return kept
