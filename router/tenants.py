"""Whom the router serves: a tenant is known by its API key, and what it may do is looked up here."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from router.admission.order import Share
from router.admission.quota import Quota
from router.config import RouterConfig, TenantConfig
from router.keys import ApiKeys
from router.refusal import Refusal

OPERATOR_PATHS = ("/metrics", "/cluster")
_CONTROL = b"headrace control key"


def control_key(secret: str) -> str:
    """The key of whoever has the cluster's secret: `headrace serve` asks with it whether the router is ready."""
    return hmac.digest(secret.encode(), _CONTROL, "sha256").hex()


def shares(config: RouterConfig) -> dict[str, Share]:
    """What admission's line has to know of the tenants."""
    return {tenant.name: Share(tenant.weight, tenant.max_queue) for tenant in config.all_tenants()}


class Tenant:
    """One tenant on one router replica."""

    def __init__(self, config: TenantConfig, replicas: int, secret: bytes) -> None:
        self.name = config.name
        self.operator = config.operator
        self.quota = Quota(config, replicas)
        self._priority = config.priority
        self._min_priority = config.priority if config.min_priority is None else config.min_priority
        # Whoever shares passes a client's salt on as it is. The others' salts nobody can make who lacks the secret.
        self._salt_key = (
            None if config.share_cache else hmac.digest(secret, b"cache " + config.name.encode(), "sha256")
        )

    def cache_salt(self, asked: str) -> str:
        """Of a request that asks for this salt ("": none). Equal salts share cached prefixes, others never do."""
        if self._salt_key is None:
            return asked
        return hmac.digest(self._salt_key, asked.encode(), hashlib.sha256).hex()

    def priority(self, asked: int | None) -> int:
        """Raises `Refusal` when the tenant may not ask for it."""
        if asked is None:
            return self._priority
        if asked < self._min_priority:
            raise Refusal(
                f"priority must be at least {self._min_priority} for tenant {self.name!r} (lower is more urgent), "
                f"got {asked}",
                "priority",
            )
        return asked


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, when it came (time.monotonic()), and the time-out that a header or the call named."""

    tenant: Tenant
    arrived: float
    timeout_s: float | None
    default_timeout_s: float | None  # of a request that names none

    def deadline(self, asked_s: float | None = None) -> float | None:
        """On the clock of `arrived`. The shorter of those named counts: the call's and, `asked_s`, the body's."""
        named = [seconds for seconds in (self.timeout_s, asked_s) if seconds is not None]
        timeout_s = min(named) if named else self.default_timeout_s
        return None if timeout_s is None else self.arrived + timeout_s


class Tenants:
    """All of them. Without configuration there is one, `default`, and it may do anything."""

    def __init__(self, config: RouterConfig | None = None, secret: str | None = None) -> None:
        """`secret`: the cluster's, the same on all replicas; None: one of this process. Raises OSError for key files."""
        config = config or RouterConfig()
        key = secrets.token_bytes(32) if secret is None else secret.encode()
        configured = config.all_tenants()
        self._tenants = {tenant.name: Tenant(tenant, config.replicas, key) for tenant in configured}
        self._default_timeout_s = config.admission.request_timeout_s
        files = [(tenant.name, tenant.api_keys_file) for tenant in configured]
        files += [("default", config.http.api_keys_file)]
        self._keys = ApiKeys(
            config.http.api_keys,
            of_tenants=[(tenant.name, tenant.api_keys) for tenant in configured],
            files=[(name, path) for name, path in files if path is not None],
        )
        self._control = None if secret is None else ApiKeys([control_key(secret)])
        self._controller = Tenant(TenantConfig(name="control", operator=True), 1, key)

    def of(self, authorization: bytes | str | None) -> Tenant | None:
        """None: the key is nobody's."""
        name = self._keys.tenant(authorization)
        if name is not None:
            return self._tenants[name]
        if self._control is not None and self._control.admits(authorization):
            return self._controller
        return None

    def caller(self, tenant: Tenant, arrived: float, timeout_s: float | None) -> Caller:
        return Caller(tenant, arrived, timeout_s, self._default_timeout_s)
