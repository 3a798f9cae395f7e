"""Several Valkeys that are one Redis: behind sentinels, or a cluster whose primaries have replicas."""

from __future__ import annotations

import time
from collections.abc import Callable

import redis

from tests.valkey_server import Servers, free_ports

PASSWORD = "pw"
SENTINEL_PASSWORD = "watch"
_SLOTS = 16384


class Sentinels:
    """A master, its replica and three sentinels."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.master, self.replica, *self.sentinels = free_ports(5)
        secret = f"masterauth {PASSWORD}\nrequirepass {PASSWORD}\nrepl-diskless-sync-delay 0"
        servers.start(self.master, f"port {self.master}\n{secret}", password=PASSWORD)
        replica = f"port {self.replica}\nreplicaof 127.0.0.1 {self.master}\n{secret}"
        servers.start(self.replica, replica, password=PASSWORD)
        for port in self.sentinels:
            text = (
                f"port {port}\nrequirepass {SENTINEL_PASSWORD}\nsentinel sentinel-pass {SENTINEL_PASSWORD}\n"
                f"sentinel monitor main 127.0.0.1 {self.master} 2\nsentinel auth-pass main {PASSWORD}\n"
                "sentinel down-after-milliseconds main 400\nsentinel failover-timeout main 3000"
            )
            servers.start(port, text, "--sentinel", password=SENTINEL_PASSWORD)
        nodes = ",".join(f"127.0.0.1:{port}" for port in self.sentinels)
        self.url = f"redis+sentinel://:{PASSWORD}@{nodes}/main?sentinel_password={SENTINEL_PASSWORD}"
        with self._sentinel() as sentinel:

            def ready() -> bool:
                state = sentinel.execute_command("SENTINEL", "MASTER", "main")
                state = state if isinstance(state, dict) else dict(zip(state[::2], state[1::2], strict=True))
                return int(state["num-slaves"]) == 1 and int(state["num-other-sentinels"]) == 2

            wait_until(ready)

    def primaries(self) -> list[int]:
        """Ports that writes go to."""
        with self._sentinel() as sentinel:
            return [int(sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")[1])]

    def _sentinel(self) -> redis.Redis:
        return redis.Redis(port=self.sentinels[0], password=SENTINEL_PASSWORD, decode_responses=True)


class Cluster:
    """Three primaries that share the slots; each has so many replicas."""

    def __init__(self, servers: Servers, *, replicas: int = 1, partitions: int = 8) -> None:
        self.servers = servers
        free = free_ports(2 * 3 * (1 + replicas))
        ports, buses = free[::2], free[1::2]
        for port, bus in zip(ports, buses, strict=True):
            text = (
                f"port {port}\ncluster-enabled yes\ncluster-port {bus}\ncluster-node-timeout 1000\n"
                f"requirepass {PASSWORD}\nmasterauth {PASSWORD}\nrepl-diskless-sync-delay 0"
            )
            servers.start(port, text, password=PASSWORD)
        self.ports = ports
        self.url = (
            f"redis+cluster://:{PASSWORD}@127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}?partitions={partitions}"
        )
        for number, (port, bus) in enumerate(zip(ports, buses, strict=True)):
            with self.client(port) as node:
                if number < 3:
                    first, last = _SLOTS * number // 3, _SLOTS * (number + 1) // 3 - 1
                    node.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            with self.client(ports[0]) as node:
                node.execute_command("CLUSTER", "MEET", "127.0.0.1", port, bus)
        wait_until(lambda: all(self._knows(port, len(ports)) for port in ports))
        for number, port in enumerate(ports[3:]):
            with self.client(ports[number % 3]) as primary:
                name = primary.execute_command("CLUSTER", "MYID").decode()
            with self.client(port) as node:
                node.execute_command("CLUSTER", "REPLICATE", name)
        wait_until(lambda: all(self._is_synced(port) for port in ports[3:]))

    def client(self, port: int) -> redis.Redis:
        return redis.Redis(port=port, password=PASSWORD)

    def primaries(self) -> list[int]:
        """Ports of those that live and hold slots, as they see themselves."""
        return [port for port in self.servers.processes if self._role(port) == b"master"]

    def _knows(self, port: int, count: int) -> bool:
        with self.client(port) as node:
            state = node.execute_command("CLUSTER", "INFO", NEVER_DECODE=[])
        return b"cluster_state:ok" in state and f"cluster_known_nodes:{count}".encode() in state

    def _is_synced(self, port: int) -> bool:
        with self.client(port) as node:
            return node.info("replication").get("master_link_status") == "up"

    def _role(self, port: int) -> bytes:
        with self.client(port) as node:
            return node.execute_command("ROLE")[0]


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.05)
