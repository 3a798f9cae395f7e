"""Redis as it is run elsewhere: with users and rights, Sentinel, a cluster, TLS; and without functions.

The publisher writes and the index feed reads, through servers of the embedded Valkey (TLS: a Debian redis-server, where
there is one).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import redis
from prometheus_client import CollectorRegistry

from router.dispatch_metrics import DispatchMetrics
from router.index.feed import IndexFeed
from router.prefix_index import PrefixIndex
from tests.valkey_groups import Cluster, Sentinels
from tests.valkey_server import EmbeddedValkey, Servers, free_ports
from workers.protocol import redis_keys
from workers.protocol.messages import KvLayout, WorkerInfo
from workers.protocol.redis_address import RedisAddress
from workers.protocol.redis_client import LIBRARY, Functions, connect
from workers.protocol.tiers import DEVICE, HOST, Removed, Stored
from workers.publisher import Publisher

CLUSTER = "test"
LEASE_S = 0.6


def h(number: int) -> bytes:
    return (number * 0x9E3779B97F4A7C15 % 2**64).to_bytes(16, "little")


def info(worker_id: str, epoch: int) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        epoch=epoch,
        role="decode",
        address="127.0.0.1:1",
        model="m",
        layout=KvLayout(1, 1, 4, 16, "float32", "f"),
        hash_root=b"r" * 16,
        num_blocks=100,
        max_model_len=100,
        max_num_seqs=4,
        vocab_size=10,
        device="cpu",
        pid=1,
    )


class Worker:
    """A cache and the real publisher; nothing else of a worker."""

    def __init__(self, url: str, worker_id: str, epoch: int = 1) -> None:
        self.worker_id, self.epoch = worker_id, epoch
        self.lock = threading.Lock()
        self.held: set[Removed] = set()
        self.publisher = Publisher(info(worker_id, epoch), url, CLUSTER, LEASE_S, self._snapshot)
        self.publisher.start()

    def _snapshot(self) -> list[Stored]:
        with self.lock:
            return [(block_hash, b"", tier) for block_hash, tier in self.held]

    def change(self, stored: set[Removed], removed: set[Removed] = frozenset()) -> None:
        with self.lock:
            self.held = (self.held - removed) | stored
            self.publisher.publish([(x, b"", tier) for x, tier in stored], list(removed))

    def die(self) -> None:
        """Says nothing to anybody."""
        self.publisher._closing = True


class Reader:
    """The real feed and what stands around it: who is a member is known, the numbers in Redis are polled."""

    def __init__(self, url: str, members: Callable[[], list[Worker]]) -> None:
        self.index = PrefixIndex()
        self.registry = CollectorRegistry()
        address = RedisAddress.parse(url)
        self.partitions = address.partitions
        self.feed = IndexFeed(
            address,
            CLUSTER,
            index=self.index,
            metrics=DispatchMetrics(self.registry),
            trouble=lambda error: self.feed.nothing_is_exact(),
            pause_s=lambda: 0.03,
        )
        self._members = members

    @contextlib.asynccontextmanager
    async def running(self):
        tasks = [asyncio.create_task(task) for task in (self._poll(), *self.feed.tasks())]
        try:
            yield self
        finally:
            self.feed.stop()
            while tasks:
                for task in tasks:
                    task.cancel()
                _, tasks = await asyncio.wait(tasks, timeout=0.1)
            await self.feed.close()

    async def _poll(self) -> None:
        while True:
            members = {worker.worker_id: worker for worker in self._members()}
            for worker_id in self.index.workers():
                if worker_id not in members:
                    self.feed.forget(worker_id)
            for worker in members.values():
                part = redis_keys.partition(CLUSTER, worker.worker_id, self.partitions)
                keys = [
                    redis_keys.index_blocks(part, worker.worker_id, worker.epoch),
                    redis_keys.index_seq(part, worker.worker_id, worker.epoch),
                ]
                try:
                    seq, _, _ = await self.feed._functions.call("snapshot", keys, ["0", 1])
                except (redis.RedisError, redis.exceptions.RedisClusterException, OSError, TimeoutError):
                    self.feed.nothing_is_exact()
                else:
                    self.feed.compare(worker.worker_id, worker.epoch, None if seq < 0 else seq)
            await asyncio.sleep(0.03)

    def is_exact(self) -> bool:
        return all(
            self.feed.is_exact(worker.worker_id, worker.epoch)
            and {(x, tier) for tier in (DEVICE, HOST) for x in self.index.hashes(worker.worker_id, tier)}
            == worker.held
            and not self.index.num_guesses(worker.worker_id)
            for worker in self._members()
        )


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        await asyncio.sleep(0.01)


async def publish_and_read(
    url: str, *, num_workers: int = 3, meanwhile: Callable[[], object] | None = None
) -> None:
    """Changes, a snapshot of several pieces, more changes: the index is what the workers hold."""
    workers = [Worker(url, f"w{n}") for n in range(num_workers)]
    try:
        workers[0].change({(h(n), DEVICE) for n in range(10_000)})
        async with Reader(url, lambda: workers).running() as reader:
            await until(reader.is_exact)
            if meanwhile is not None:
                await asyncio.to_thread(meanwhile)
            for n, worker in enumerate(workers):
                worker.change({(h(n), DEVICE), (h(n + 1), HOST)}, {(h(5), DEVICE)})
            await until(reader.is_exact, timeout_s=20)
            assert reader.index.match([h(0)])["w0"].blocks == 1
    finally:
        for worker in workers:
            await asyncio.to_thread(worker.publisher.close)


# --- functions and rights -----------------------------------------------------------------------------------------------


async def test_the_functions_are_loaded_and_loaded_again(valkey):
    with valkey.client() as client:
        client.function_flush()
        await publish_and_read(valkey.url, meanwhile=lambda: (client.function_flush(), client.flushall()))
        assert LIBRARY in str(client.function_list())


@contextlib.contextmanager
def user(valkey: EmbeddedValkey, *rules: str) -> Iterator[str]:
    """The URL with which somebody logs in who may do this much."""
    with valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "router", "reset", "on", ">s3cret/@:", *rules)
        try:
            yield valkey.url.replace("unix://", "unix://router:s3cret%2F%40%3A@")
        finally:
            client.execute_command("ACL", "DELUSER", "router")


async def test_a_user_without_dangerous_commands_is_enough(valkey):
    rules = ("~{headrace:*", "+@all", "-@dangerous", "-keys", "-scan")
    with user(valkey, *rules) as url, valkey.client() as client:
        client.function_flush()
        with pytest.raises(redis.exceptions.NoPermissionError):
            redis.Redis.from_url(url).keys("*")
        await publish_and_read(url)
        assert LIBRARY in str(client.function_list())


def documented_rules() -> list[str]:
    text = (Path(__file__).resolve().parents[3] / "docs" / "index.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("ACL SETUSER headrace "))
    return [rule for rule in line.split()[3:] if rule[0] in "+-~"]


async def test_the_rights_that_the_documentation_names_are_enough(valkey):
    with user(valkey, *documented_rules()) as url, valkey.client() as client:
        client.function_flush()
        await publish_and_read(url)
        assert LIBRARY in str(client.function_list())


async def test_scripts_take_the_place_of_functions_where_these_are_refused(valkey, caplog):
    rules = ("~{headrace:*", "+@all", "-@dangerous", "-fcall", "-fcall_ro", "-function")
    with user(valkey, *rules) as url, valkey.client() as client:
        client.function_flush()
        client.script_flush()
        await publish_and_read(url, num_workers=1, meanwhile=client.script_flush)
        assert LIBRARY not in str(client.function_list())
    refusals = [r for r in caplog.records if "refuses functions" in r.getMessage()]
    assert len(refusals) == 2, "once for each connection: the publisher's and the feed's"


def test_a_mistake_in_a_call_is_not_taken_for_a_refusal(valkey):
    with connect(RedisAddress.parse(valkey.url), 2.0) as client:
        functions = Functions(client)
        with pytest.raises(redis.ResponseError):
            functions.call("publish", ["{headrace:x}:a"], [])
        assert not functions.as_scripts


def test_nothing_looks_through_all_keys():
    root = Path(__file__).resolve().parents[3]
    for room in ("workers", "router", "cluster"):
        for path in [*(root / room).rglob("*.py"), *(root / room).rglob("*.lua")]:
            text = path.read_text()
            for command in ("'KEYS'", '"KEYS"', "'SCAN'", '"SCAN"', ".scan_iter(", ".scan("):
                assert command not in text, f"{path} uses {command}"


# --- faults, end to end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
async def test_the_index_is_what_the_workers_hold_whatever_happens_to_redis(own_valkey, seed):
    await storm(own_valkey, seed, rounds=12)


@pytest.mark.slow
async def test_the_same_for_minutes(own_valkey):
    await storm(own_valkey, 3, rounds=150)


async def storm(valkey: EmbeddedValkey, seed: int, rounds: int) -> None:
    """Changes without end, while the log is cut, Redis is flushed, killed or paused, and workers die and come back."""
    rng = random.Random(seed)
    workers = {f"w{n}": Worker(valkey.url, f"w{n}") for n in range(4)}
    log = redis_keys.index_stream(CLUSTER)
    past: list[Worker] = []

    def flush() -> None:
        with valkey.client() as client:
            client.flushall()

    def cut_the_log() -> None:
        with valkey.client() as client:
            client.delete(log) if rng.random() < 0.5 else client.xtrim(log, maxlen=0, approximate=False)

    def nonsense() -> None:
        with valkey.client() as client:
            client.xadd(log, {"b": rng.randbytes(9)})
            for _, fields in client.xrevrange(log, count=5)[1:]:  # once more, and in the wrong order
                client.xadd(log, fields)

    def restart() -> None:
        valkey.stop()
        time.sleep(rng.random() * 0.3)
        valkey.start()

    def pause() -> None:
        valkey.pause()
        time.sleep(0.2)
        valkey.resume()

    def new_life() -> None:
        old = workers[rng.choice(sorted(workers))]
        old.die()
        past.append(old)
        workers[old.worker_id] = Worker(valkey.url, old.worker_id, old.epoch + 1)

    faults = [flush, cut_the_log, nonsense, restart, pause, new_life]
    try:
        async with Reader(valkey.url, lambda: list(workers.values())).running() as reader:
            for number in range(rounds):
                fault = asyncio.create_task(asyncio.to_thread(faults[number % len(faults)]))
                while not fault.done() or rng.random() < 0.9:
                    worker = rng.choice(list(workers.values()))
                    some = [(h(rng.randrange(3000)), rng.choice([DEVICE, HOST])) for _ in range(200)]
                    worker.change(set(some[:150]), set(some[100:]) - set(some[:150]))
                    if rng.random() < 0.2:
                        reader.index.note_routed(
                            worker.worker_id, worker.epoch, [h(n) for n in range(40)], capacity=20
                        )
                        assert reader.index.num_guesses(worker.worker_id) <= 20
                    await asyncio.sleep(0.002)
                await fault
                for worker in workers.values():  # guesses go with the snapshot that the next doubt brings
                    if reader.index.num_guesses(worker.worker_id):
                        reader.feed._synced.pop(worker.worker_id, None)
                await until(reader.is_exact, timeout_s=20)
    finally:
        for worker in [*workers.values(), *past]:
            await asyncio.to_thread(worker.publisher.close)


# --- other servers ------------------------------------------------------------------------------------------------------


async def test_behind_sentinels_through_a_failover(valkeys):
    group = Sentinels(valkeys)
    await publish_and_read(group.url, meanwhile=lambda: (time.sleep(0.5), valkeys.kill(group.master)))
    assert group.primaries() == [group.replica]


async def test_in_a_cluster_of_three_nodes(valkeys):
    group = Cluster(valkeys, replicas=0)
    await publish_and_read(group.url, num_workers=6)
    logs = 0
    for port in group.ports:
        with group.client(port) as client:
            logs += any(b":index:log" in key for key in client.keys("*"))
    assert logs >= 2, "partitions are spread over the nodes"


async def test_over_tls_with_a_client_certificate():
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip(
            "needs a redis-server with TLS (Debian: apt-get install redis-server); the embedded Valkey has none"
        )
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make certificates")
    servers = Servers(binary)
    try:
        home = servers.directory

        def openssl(*arguments: str) -> None:
            subprocess.run(["openssl", *arguments], cwd=home, check=True, capture_output=True)

        openssl(
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=ca",
            "-keyout",
            "ca.key",
            "-out",
            "ca.crt",
        )
        (home / "names").write_text("subjectAltName=IP:127.0.0.1\n")
        for name in ("server", "client"):
            openssl(
                "req",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-subj",
                f"/CN={name}",
                "-keyout",
                f"{name}.key",
                "-out",
                f"{name}.csr",
            )
            openssl(
                "x509",
                "-req",
                "-in",
                f"{name}.csr",
                "-CA",
                "ca.crt",
                "-CAkey",
                "ca.key",
                "-CAcreateserial",
                "-days",
                "2",
                "-extfile",
                "names",
                "-out",
                f"{name}.crt",
            )
        (port,) = free_ports(1)
        files = {
            "ssl_ca_certs": f"{home}/ca.crt",
            "ssl_certfile": f"{home}/client.crt",
            "ssl_keyfile": f"{home}/client.key",
        }
        servers.start(
            port,
            f"port 0\ntls-port {port}\ntls-cert-file {home}/server.crt\ntls-key-file {home}/server.key\n"
            f"tls-ca-cert-file {home}/ca.crt\ntls-auth-clients yes",
            ssl=True,
            **files,
        )
        address = RedisAddress(
            kind="plain", tls=True, url=f"rediss://127.0.0.1:{port}/0", tls_files=tuple(files.items())
        )
        await publish_and_read(address.text())
        with pytest.raises((redis.RedisError, OSError)):
            redis.Redis.from_url(f"rediss://127.0.0.1:{port}/0").ping()
    finally:
        servers.close()


def test_the_registry_entry_can_be_read(valkey):
    """What Redis holds does not depend on the way it was written."""
    worker = Worker(valkey.url + "?partitions=4", "w0", epoch=7)
    part = redis_keys.partition(CLUSTER, "w0", 4)
    with valkey.client() as client:
        deadline = time.monotonic() + 5
        while not (entry := client.hget(redis_keys.workers(part), "w0")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert msgspec.msgpack.decode(entry, type=WorkerInfo) == info("w0", 7)
        assert client.get(redis_keys.lease(part, "w0")) == b"7"
    worker.publisher.close()


async def test_a_snapshot_that_cannot_be_read_harms_nobody_else(valkey):
    workers = [Worker(valkey.url, f"w{n}") for n in range(2)]
    blocks = redis_keys.index_blocks(CLUSTER, "w0", 1)
    with valkey.client() as client:
        await until(lambda: all(worker.publisher.synced for worker in workers))
        workers[1].change({(h(1), DEVICE)})
        client.sadd(blocks, b"not a member")
        async with Reader(valkey.url, lambda: workers).running() as reader:
            await until(lambda: reader.feed.is_exact("w1", 1))
            await until(lambda: reader.index.match([h(1)]) == {"w1": (1, 0, 0)})
            assert not reader.feed.is_exact("w0", 1)
            client.srem(blocks, b"not a member")
            await until(reader.is_exact)
    for worker in workers:
        await asyncio.to_thread(worker.publisher.close)


async def test_a_tail_that_is_behind_is_not_taken_for_a_loss(valkey, monkeypatch):
    """Reading snapshots instead would put it further behind."""
    worker = Worker(valkey.url, "w0")
    async with Reader(valkey.url, lambda: [worker]).running() as reader:
        worker.change({(h(0), DEVICE)})
        await until(reader.is_exact)
        read = reader.registry.get_sample_value("headrace_index_snapshots_total")
        real = reader.feed._apply

        async def slowly(partition, entries):
            await asyncio.sleep(0.5)
            await real(partition, entries)

        monkeypatch.setattr(reader.feed, "_apply", slowly)
        for n in range(1, 6):
            worker.change({(h(n), DEVICE)})
            await asyncio.sleep(0.1)
        await until(reader.is_exact)
        assert reader.registry.get_sample_value("headrace_index_snapshots_total") == read
    await asyncio.to_thread(worker.publisher.close)
