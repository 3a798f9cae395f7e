"""The whole tree of settings, composed of what each part owns, and how it is read from YAML and the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ByteSize, Field, ValidationError, model_validator

from cluster.config_errors import ConfigError, explain
from cluster.config_source import Source, merge_overrides, read_source
from router.config import RouterConfig
from workers.config import EngineConfig, ExpertsConfig, Section, SpeculationConfig, TransferConfig
from workers.protocol.messages import Role
from workers.protocol.redis_address import MAX_PARTITIONS, RedisAddress, parse_node, with_credentials

__all__ = ["ClusterConfig", "ConfigError", "PoolConfig", "load_config"]


def _cluster_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise ValueError("must be 1 to 40 lower-case letters, digits and inner hyphens")
    return name


def _redis_url(url: str | None) -> str | None:
    if url is not None:
        address = RedisAddress.parse(url)
        if address.kind == "plain":
            from redis.connection import parse_url

            parse_url(address.url)  # type: ignore[no-untyped-call]  # raises ValueError
    return url


def _redis_nodes(nodes: list[str]) -> list[str]:
    for node in nodes:
        parse_node(node, 1)
    return nodes


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
        None,
        ge=0,
        description="GPUs of one replica; null: one for each rank, or a fair share of those there are, or none",
    )
    num_cpus: float | None = Field(
        None, ge=0, description="CPUs Ray books for one replica; null: 1 for each rank"
    )
    tensor_parallel: Literal[1, 2, 4, 8] = Field(
        1,
        description="processes of one host, each with a GPU, that compute every step of a replica together, with a part "
        "of its weights and KV heads each",
    )
    expert_parallel: int = Field(
        1,
        ge=1,
        le=1024,
        description="workers among which the experts of a MoE model are spread (docs/experts.md); 1: each has all of them",
    )

    @model_validator(mode="after")
    def _one_kind_of_ranks(self) -> Self:
        if self.tensor_parallel > 1 and self.expert_parallel > 1:
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel}, expert_parallel is {self.expert_parallel}: "
                "a worker has ranks of one kind; set one of them to 1"
            )
        return self

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.replicas % self.expert_parallel:
            raise ValueError(
                f"replicas is {self.replicas}, expert_parallel is {self.expert_parallel}: "
                "it must divide the number of workers"
            )
        return self


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
    """One server (`url`), Sentinel (`sentinels` and `master`) or a Redis Cluster (`nodes`); none of them: an embedded Valkey."""

    url: Annotated[str | None, AfterValidator(_redis_url)] = Field(
        None,
        repr=False,
        description="redis://, rediss:// or unix:// address; null: an embedded Valkey",
    )
    sentinels: Annotated[list[str], AfterValidator(_redis_nodes)] = Field(
        [], description="host:port of each sentinel, instead of url"
    )
    master: str | None = Field(None, min_length=1, description="name of the master behind the sentinels")
    nodes: Annotated[list[str], AfterValidator(_redis_nodes)] = Field(
        [], description="host:port of some nodes of a Redis Cluster, instead of url"
    )
    partitions: int | None = Field(
        None,
        ge=1,
        le=MAX_PARTITIONS,
        description="hash slots that the keys are in; null: 16 in a Redis Cluster, otherwise 1",
    )
    db: int = Field(0, ge=0, description="database (sentinels)")
    username: str | None = Field(None, min_length=1, description="ACL user")
    password: str | None = Field(
        None, min_length=1, repr=False, description="or password_env, or password_file"
    )
    password_env: str | None = Field(
        None, min_length=1, description="environment variable with the password, read where `serve` starts"
    )
    password_file: Path | None = Field(None, description="file with the password, read where `serve` starts")
    sentinel_username: str | None = Field(None, min_length=1, description="ACL user at the sentinels")
    sentinel_password: str | None = Field(None, min_length=1, repr=False, description="and its password")
    tls: bool = Field(False, description="with sentinels or nodes; with url write rediss://")
    ca_file: Path | None = Field(
        None,
        description="certificates that the server's must lead to; null: the system's. Same path on each host",
    )
    cert_file: Path | None = Field(None, description="client certificate, where the server asks for one")
    key_file: Path | None = Field(None, description="and its key")
    host: str = Field(
        "127.0.0.1", description="address the embedded Valkey binds; `node`: this node's address"
    )
    port: int = Field(0, ge=0, le=65535, description="port of the embedded Valkey; 0: any free port")

    @property
    def embedded(self) -> bool:
        return self.url is None and not self.sentinels and not self.nodes

    @property
    def setting(self) -> str:
        """The one that says where Redis is, for messages."""
        return "redis.sentinels" if self.sentinels else "redis.nodes" if self.nodes else "redis.url"

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        given = [name for name in ("url", "sentinels", "nodes") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"redis.{given[0]} and redis.{given[1]} are both set: Redis is in one place")
        if bool(self.sentinels) != (self.master is not None):
            raise ValueError("redis.sentinels and redis.master belong together: one of them is missing")
        secrets = [n for n in ("password", "password_env", "password_file") if getattr(self, n) is not None]
        if len(secrets) > 1:
            raise ValueError(
                f"redis.{secrets[0]} and redis.{secrets[1]} are both set: the password is one of them"
            )
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("redis.cert_file and redis.key_file belong together: one of them is missing")
        if self.embedded:
            names = ("username", *secrets, "tls", "ca_file", "cert_file", "partitions", "db")
            if wrong := [name for name in names if getattr(self, name)]:
                raise ValueError(
                    f"redis.{wrong[0]} is set, but the embedded Valkey takes none: set redis.url"
                )
        if self.db and not self.sentinels:
            raise ValueError(
                "redis.db counts with redis.sentinels only: with redis.url write it behind the address"
            )
        if (self.sentinel_username or self.sentinel_password) and not self.sentinels:
            raise ValueError("redis.sentinel_username and redis.sentinel_password need redis.sentinels")
        if self.url is not None:
            address = RedisAddress.parse(self.url)
            if self.tls and not address.tls:
                raise ValueError("redis.tls is set, but redis.url does not begin with rediss://")
            if (self.username or secrets) and "@" in self.url.partition("?")[0]:
                raise ValueError("redis.url holds credentials, and redis.username or a password is set too")
            if (self.username or secrets) and address.kind != "plain":
                raise ValueError("redis.url of this kind holds its credentials itself")
        if (self.ca_file or self.cert_file) and not (self.tls or (self.url or "").startswith("rediss")):
            raise ValueError("redis.ca_file and redis.cert_file need TLS: rediss:// or redis.tls")
        return self

    def address(self) -> str:
        """Everything in one line (workers.protocol.redis_address), the password included. Raises ValueError."""
        if self.embedded:
            raise ValueError("the embedded Valkey has its address when it runs")
        password = self._password()
        files = {"ssl_ca_certs": self.ca_file, "ssl_certfile": self.cert_file, "ssl_keyfile": self.key_file}
        tls_files = tuple((name, str(path)) for name, path in files.items() if path is not None)
        if self.url is not None:
            known = RedisAddress.parse(self.url)
            url = with_credentials(known.url, self.username, password) if known.kind == "plain" else ""
            partitions = self.partitions or known.partitions
            return replace(
                known, url=url, tls_files=known.tls_files + tls_files, partitions=partitions
            ).text()
        return RedisAddress(
            kind="sentinel" if self.sentinels else "cluster",
            tls=self.tls,
            nodes=tuple(
                parse_node(n, 26379 if self.sentinels else 6379) for n in self.sentinels or self.nodes
            ),
            master=self.master or "",
            db=self.db,
            username=self.username,
            password=password,
            sentinel_username=self.sentinel_username,
            sentinel_password=self.sentinel_password,
            tls_files=tls_files,
            partitions=self.partitions or (16 if self.nodes else 1),
        ).text()

    def _password(self) -> str | None:
        if self.password_env is not None:
            if not (password := os.environ.get(self.password_env)):
                raise ValueError(f"redis.password_env: the environment has no variable {self.password_env}")
            return password
        if self.password_file is not None:
            try:
                return self.password_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "not UTF-8 text"
                raise ValueError(f"redis.password_file: {self.password_file}: {reason}") from None
        return self.password


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


class PoolBounds(Section):
    min: int = Field(1, ge=1, description="workers that stay, whatever the load")
    max: int | None = Field(
        None,
        ge=1,
        description="workers at most; null: as many as are configured, or as a joined Ray cluster has room for",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self


class PlannerConfig(Section):
    """Pool sizes from measured load. Without `apply` they are only suggested."""

    enabled: bool = Field(
        True, description="measure the load and suggest sizes, in `headrace status` and metrics"
    )
    apply: bool = Field(False, description="start and drain workers accordingly")
    interval_s: float = Field(5.0, gt=0, description="seconds between two looks at the load")
    window_s: float = Field(30.0, gt=0, description="seconds over which the load is measured")
    ttft_s: float = Field(1.0, gt=0, description="to be kept by 90% of requests: queue wait and prefill")
    tpot_s: float = Field(0.1, gt=0, description="to be kept on the average: seconds per output token")
    headroom: float = Field(0.85, gt=0, lt=1, description="most of a pool's capacity that may be in use")
    up_after_s: float = Field(10.0, ge=0, description="seconds a pool must be too small before it grows")
    down_after_s: float = Field(
        300.0, ge=0, description="seconds one worker fewer must suffice before one leaves"
    )
    calm: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="one worker fewer must keep this share of each limit: what it grows at is 1",
    )
    pause_s: float = Field(
        60.0, ge=0, description="seconds between two changes of a pool, unless it must grow"
    )
    drain_timeout_s: float = Field(
        300.0, gt=0, description="seconds a leaving worker has for its streams; then they go on elsewhere"
    )
    prefill: PoolBounds = PoolBounds()
    decode: PoolBounds = PoolBounds()

    @model_validator(mode="after")
    def _looks_often_enough(self) -> Self:
        if self.window_s < self.interval_s:
            raise ValueError(
                f"window_s is {self.window_s:g}: it must be at least interval_s ({self.interval_s:g})"
            )
        return self

    def bounds(self, role: Role) -> PoolBounds:
        return self.prefill if role == "prefill" else self.decode


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
    experts: ExpertsConfig = ExpertsConfig()
    router: RouterConfig = RouterConfig()
    redis: RedisConfig = RedisConfig()
    ray: RayConfig = RayConfig()
    supervisor: SupervisorConfig = SupervisorConfig()
    planner: PlannerConfig = PlannerConfig()
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
        roles: tuple[Role, ...] = ("prefill", "decode")
        for role in roles:
            bounds, replicas = self.planner.bounds(role), self.pool(role).replicas
            for kind in ("expert_parallel", "tensor_parallel"):
                if self.planner.apply and (size := getattr(self.pool(role), kind)) > 1:
                    raise ValueError(
                        f"pools.{role}.{kind} is {size}: the planner can't start and end such workers; "
                        "set planner.apply to false"
                    )
            if self.planner.apply and replicas and not bounds.min <= replicas <= (bounds.max or replicas):
                raise ValueError(
                    f"pools.{role}.replicas is {replicas}: it must lie in planner.{role}.min … max "
                    f"({bounds.min} … {bounds.max}) where planner.apply is on"
                )
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
