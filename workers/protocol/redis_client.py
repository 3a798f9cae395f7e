"""Connections to Redis, however it is run, and calls of the functions in index.lua and experts.lua.

No retries inside the clients: everybody who uses them is a loop already, and must notice at once. The functions are
loaded when a server turns out not to have them: at the first call, after a restart, on a node that is new in a cluster.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.cluster import ClusterNode as AsyncClusterNode
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.exceptions import (
    NoPermissionError,
    NoScriptError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.retry import Retry
from redis.sentinel import Sentinel

from workers.protocol.redis_address import RedisAddress
from workers.protocol.tiers import MEMBER_BYTES

log = logging.getLogger(__name__)

# What talking to a Redis that is away, changing its master or not ready raises.
TROUBLE = (RedisError, RedisClusterException, OSError, TimeoutError)

_SOURCE = f"local WIDTH = {MEMBER_BYTES}\n" + "".join(
    (Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("index.lua", "experts.lua")
)
NAMES = ("publish", "heartbeat", "leave", "snapshot", "lead", "post", "resign")
# The name says which text it is: versions that run side by side don't take each other's functions.
LIBRARY = f"headrace_{hashlib.sha256(_SOURCE.encode()).hexdigest()[:8]}"
LIBRARY_SOURCE = f"#!lua name={LIBRARY}\n{_SOURCE}" + "".join(
    f"redis.register_function('{LIBRARY}_{name}', {name})\n" for name in NAMES
)
_SCRIPTS = {name: f"{_SOURCE}return {name}(KEYS, ARGV)\n" for name in NAMES}
_SHAS = {
    name: hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest() for name, text in _SCRIPTS.items()
}

Client = redis.Redis | redis.RedisCluster
AsyncClient = redis.asyncio.Redis | redis.asyncio.RedisCluster


def connect(address: RedisAddress, timeout_s: float, connect_timeout_s: float = 2.0) -> Client:
    """A cluster is asked for its nodes at once and raises one of TROUBLE when it is away; the others connect when used."""
    common: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": connect_timeout_s}
    if address.kind == "plain":
        return redis.Redis.from_url(address.url, retry=Retry(NoBackoff(), 0), **common, **_tls(address))
    common |= _entry(address)
    if address.kind == "cluster":
        new_node: Any = ClusterNode  # redis-py has no types here
        nodes = [new_node(host, port) for host, port in address.nodes]
        return redis.RedisCluster(startup_nodes=nodes, retry=Retry(NoBackoff(), 0), **common)
    new_sentinel: Any = Sentinel
    sentinel = new_sentinel(
        address.nodes, sentinel_kwargs=_sentinel_entry(address, common), db=address.db, **common
    )
    client: redis.Redis = sentinel.master_for(address.master, retry=Retry(NoBackoff(), 0))
    return client


def connect_async(address: RedisAddress, timeout_s: float, connect_timeout_s: float = 2.0) -> AsyncClient:
    """Connects when used."""
    common: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": connect_timeout_s}
    retry = AsyncRetry(NoBackoff(), 0)
    if address.kind == "plain":
        return redis.asyncio.Redis.from_url(address.url, retry=retry, **common, **_tls(address))
    common |= _entry(address)
    if address.kind == "cluster":
        nodes = [AsyncClusterNode(host, port) for host, port in address.nodes]
        return redis.asyncio.RedisCluster(startup_nodes=nodes, retry=retry, **common)
    new_sentinel: Any = AsyncSentinel
    sentinel = new_sentinel(
        address.nodes, sentinel_kwargs=_sentinel_entry(address, common), db=address.db, **common
    )
    client: redis.asyncio.Redis = sentinel.master_for(address.master, retry=retry)
    return client


def _tls(address: RedisAddress) -> dict[str, Any]:
    return dict(address.tls_files)


def _entry(address: RedisAddress) -> dict[str, Any]:
    entry: dict[str, Any] = {"username": address.username, "password": address.password}
    return entry | ({"ssl": True} | _tls(address) if address.tls else {})


def _sentinel_entry(address: RedisAddress, common: dict[str, Any]) -> dict[str, Any]:
    entry = {name: value for name, value in common.items() if name not in ("username", "password")}
    return entry | {"username": address.sentinel_username, "password": address.sentinel_password}


def node_of(client: Any, key: str) -> dict[str, Any]:
    """Options of `execute_command` that send it to where the key is. Spares a cluster client the question which keys a command has."""
    if isinstance(client, redis.RedisCluster | redis.asyncio.RedisCluster):
        return {"target_nodes": client.get_node_from_key(key)}
    return {}


class _Functions:
    """Which way the server takes: functions, or scripts where it refuses them."""

    def __init__(self) -> None:
        self.as_scripts = False

    def _refused(self, error: ResponseError) -> None:
        """Raises the error unless it means that there are no functions for us."""
        unknown = "unknown command" in str(error).lower()
        if not isinstance(error, NoPermissionError) and not unknown:
            raise error
        self.as_scripts = True
        log.warning("Redis refuses functions, the same is sent as scripts: %s", error)


def _is_missing(error: ResponseError) -> bool:
    return "function not found" in str(error).lower()


def _arguments(keys: Sequence[str], args: Sequence[Any]) -> list[Any]:
    return [len(keys), *keys, *args]


class Functions(_Functions):
    def __init__(self, client: Client) -> None:
        super().__init__()
        self._client = client

    def call(self, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """All `keys` have one hash tag. Raises one of TROUBLE."""
        run: Any = self._client.execute_command
        where = node_of(self._client, keys[0])
        rest = _arguments(keys, args)
        if not self.as_scripts:
            try:
                try:
                    return run("FCALL", f"{LIBRARY}_{name}", *rest, **where)
                except ResponseError as error:
                    if not _is_missing(error):
                        raise
                run("FUNCTION LOAD", "REPLACE", LIBRARY_SOURCE, **where)
                return run("FCALL", f"{LIBRARY}_{name}", *rest, **where)
            except ResponseError as error:
                self._refused(error)
        try:
            return run("EVALSHA", _SHAS[name], *rest, **where)
        except NoScriptError:
            return run("EVAL", _SCRIPTS[name], *rest, **where)


class AsyncFunctions(_Functions):
    def __init__(self, client: AsyncClient) -> None:
        super().__init__()
        self._client = client

    async def call(self, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """All `keys` have one hash tag. Raises one of TROUBLE."""
        client = self._client
        if isinstance(client, redis.asyncio.RedisCluster):
            await client.initialize()
        run: Any = client.execute_command
        where = node_of(client, keys[0])
        rest = _arguments(keys, args)
        if not self.as_scripts:
            try:
                try:
                    return await run("FCALL", f"{LIBRARY}_{name}", *rest, **where)
                except ResponseError as error:
                    if not _is_missing(error):
                        raise
                await run("FUNCTION LOAD", "REPLACE", LIBRARY_SOURCE, **where)
                return await run("FCALL", f"{LIBRARY}_{name}", *rest, **where)
            except ResponseError as error:
                self._refused(error)
        try:
            return await run("EVALSHA", _SHAS[name], *rest, **where)
        except NoScriptError:
            return await run("EVAL", _SCRIPTS[name], *rest, **where)
