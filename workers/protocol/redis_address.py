"""Where Redis is and how to get in, as one line of text: it travels in the settings of workers and routers.

    redis://[user:password@]host:port/db          rediss:// with TLS, unix:///path/to/socket
    redis+sentinel://[user:password@]host:port,host:port/master-name[/db]        rediss+sentinel://
    redis+cluster://[user:password@]host:port,host:port                          rediss+cluster://

Behind a `?`: partitions; with TLS ssl_ca_certs, ssl_certfile, ssl_keyfile; with Sentinel sentinel_username and
sentinel_password. Passwords are in it: keep it out of logs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

Kind = Literal["plain", "sentinel", "cluster"]
_PLAIN = ("redis", "rediss", "unix")
_TLS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_SENTINEL = ("sentinel_username", "sentinel_password")
MAX_PARTITIONS = 1024
_DEFAULT_PORT = {"sentinel": 26379, "cluster": 6379}


@dataclass(frozen=True)
class RedisAddress:
    kind: Kind
    tls: bool = False
    url: str = ""  # plain: what redis-py is given, credentials and options included
    nodes: tuple[tuple[str, int], ...] = ()  # sentinels, or some nodes of the cluster
    master: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = None
    sentinel_username: str | None = None
    sentinel_password: str | None = None
    tls_files: tuple[tuple[str, str], ...] = ()  # option of redis-py, path
    partitions: int = 1  # the keys are in so many hash slots (redis_keys.partition)

    def __repr__(self) -> str:
        return f"RedisAddress({self.kind}, {self.nodes or 'one server'}, partitions={self.partitions})"

    @classmethod
    def parse(cls, text: str) -> RedisAddress:
        """Raises ValueError, which names what is wrong and never the password."""
        scheme, separator, _ = text.partition("://")
        transport, _, kind = scheme.partition("+")
        if not separator or transport not in _PLAIN or kind not in ("", "sentinel", "cluster"):
            raise ValueError(
                "must begin with redis://, rediss:// or unix://, or with redis+sentinel://, rediss+sentinel://, "
                "redis+cluster:// or rediss+cluster://"
            )
        if transport == "unix" and kind:
            raise ValueError(f"a unix socket can't be a {kind}")
        try:
            parts = urlsplit(text)
        except ValueError as error:
            raise ValueError(str(error)) from None
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        partitions = _partitions(options.pop("partitions", "1"))
        if not kind:
            url = text.partition("?")[0] + (f"?{urlencode(options)}" if options else "")
            return cls(kind="plain", tls=transport == "rediss", url=url, partitions=partitions)
        allowed = (_TLS if transport == "rediss" else ()) + (_SENTINEL if kind == "sentinel" else ())
        if unknown := sorted(options.keys() - set(allowed)):
            raise ValueError(
                f"unknown option {unknown[0]!r}; allowed are partitions and {', '.join(allowed) or 'no other'}"
            )
        credentials, at, hosts = parts.netloc.rpartition("@")
        username, _, password = credentials.partition(":")
        path = [unquote(part) for part in parts.path.split("/") if part]
        master, db = "", "0"
        if kind == "sentinel":
            if not 1 <= len(path) <= 2:
                raise ValueError("needs the name of the master behind the sentinels: .../master-name")
            master, db = path[0], path[1] if len(path) == 2 else "0"
        elif path and path != ["0"]:
            raise ValueError("a Redis Cluster has no numbered databases")
        if not db.isdigit():
            raise ValueError(f"the database must be a number, not {db!r}")
        return cls(
            kind="sentinel" if kind == "sentinel" else "cluster",
            tls=transport == "rediss",
            nodes=tuple(parse_node(node, _DEFAULT_PORT[kind]) for node in hosts.split(",")),
            master=master,
            db=int(db),
            username=unquote(username) or None if at else None,
            password=unquote(password) or None if at else None,
            sentinel_username=options.get("sentinel_username"),
            sentinel_password=options.get("sentinel_password"),
            tls_files=tuple((name, options[name]) for name in _TLS if name in options),
            partitions=partitions,
        )

    def text(self) -> str:
        """What `parse` reads."""
        options: dict[str, str] = dict(self.tls_files)
        if self.partitions != 1:
            options["partitions"] = str(self.partitions)
        if self.kind == "plain":
            if not options:
                return self.url
            return self.url + ("&" if "?" in self.url else "?") + urlencode(options)
        for name in _SENTINEL:
            if value := getattr(self, name):
                options[name] = value
        secret = ""
        if self.username or self.password:
            secret = f"{quote(self.username or '', safe='')}:{quote(self.password or '', safe='')}@"
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.nodes)
        path = f"/{quote(self.master, safe='')}/{self.db}" if self.kind == "sentinel" else ""
        query = f"?{urlencode(options)}" if options else ""
        return f"{'rediss' if self.tls else 'redis'}+{self.kind}://{secret}{hosts}{path}{query}"


def parse_node(text: str, default_port: int) -> tuple[str, int]:
    """`host:port`, `[::1]:port` or `host`. Raises ValueError."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port or default_port
    except ValueError:
        host = None
    if not host or parts.path or parts.query or "@" in text:
        raise ValueError(f"{text!r} must be host:port")
    return host, port


def with_credentials(url: str, username: str | None, password: str | None) -> str:
    """The URL of one server with user and password put into it."""
    if not username and not password:
        return url
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{quote(username or '', safe='')}:{quote(password or '', safe='')}@{rest}"


def _partitions(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= MAX_PARTITIONS:
        raise ValueError(f"partitions is {text!r}: must be a number from 1 to {MAX_PARTITIONS}")
    return int(text)
