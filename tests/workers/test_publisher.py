"""The publisher against a real Valkey: what Redis holds is what the worker holds, whatever happened."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import msgspec
import pytest

from tests.valkey_server import EmbeddedValkey
from workers.engine.block_pool import BlockPool
from workers.protocol import redis_keys
from workers.protocol.messages import IndexBatch, KvLayout, WorkerInfo
from workers.protocol.tiers import DEVICE, DISK, HOST, Removed, Stored, pack_member, unpack_member
from workers.publisher import Publisher

CLUSTER = "test"
BLOCKS = redis_keys.index_blocks(CLUSTER, "w", 5)
SEQ = redis_keys.index_seq(CLUSTER, "w", 5)
LEASE = redis_keys.lease(CLUSTER, "w")
WORKERS = redis_keys.workers(CLUSTER)
LOG = redis_keys.index_stream(CLUSTER)


def h(number: int) -> bytes:
    return number.to_bytes(16, "little")


def members(*numbers: int, tier: str = DEVICE) -> set[bytes]:
    return {pack_member(h(n), tier) for n in numbers}


def info(epoch: int = 5) -> WorkerInfo:
    return WorkerInfo(
        worker_id="w",
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


class Cache:
    """What a worker holds; changed and published under one lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held: dict[tuple[bytes, str], bytes] = {}
        self.publisher: Publisher | None = None

    def snapshot(self) -> list[Stored]:
        with self.lock:
            return [(block_hash, parent, tier) for (block_hash, tier), parent in self.held.items()]

    def members(self) -> set[bytes]:
        with self.lock:
            return {pack_member(*key) for key in self.held}

    def change(self, stored: list[int], removed: list[int] = (), tier: str = DEVICE) -> None:
        with self.lock:
            for number in removed:
                self.held.pop((h(number), tier), None)
            self.held |= {(h(n), tier): h(n - 1) for n in stored}
            self.publisher.publish([(h(n), h(n - 1), tier) for n in stored], [(h(n), tier) for n in removed])


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.005)


def replay(client) -> set[bytes]:
    """What a router makes of the log."""
    held: set[bytes] = set()
    last = 0
    for _, fields in client.xrange(LOG):
        batch = msgspec.msgpack.decode(fields[b"b"], type=IndexBatch)
        assert batch.seq > last
        assert batch.seq == last + 1 or batch.cleared
        last = batch.seq
        if batch.cleared:
            held.clear()
        held -= {pack_member(*gone) for gone in batch.removed}
        held |= {pack_member(block_hash, tier) for block_hash, _, tier in batch.stored}
    assert last == int(client.get(SEQ))
    return held


@pytest.fixture
def cache(valkey: EmbeddedValkey):
    yield from running(valkey)


@pytest.fixture
def own_cache(own_valkey: EmbeddedValkey):
    yield from running(own_valkey)


def running(valkey: EmbeddedValkey):
    cache = Cache()
    cache.held = {(h(1), DEVICE): h(0)}
    cache.publisher = Publisher(info(), valkey.url, CLUSTER, 0.6, cache.snapshot)
    cache.publisher.start()
    until(lambda: cache.publisher.synced)
    yield cache
    cache.publisher.close()


def test_registration_lease_and_first_snapshot(valkey, cache):
    with valkey.client() as client:
        until(lambda: client.smembers(BLOCKS) == members(1))
        assert msgspec.msgpack.decode(client.hget(WORKERS, "w"), type=WorkerInfo) == info()
        assert client.get(LEASE) == b"5"
        left_ms = [client.pttl(LEASE)]
        renewals = 0
        while renewals < 3:
            left_ms.append(client.pttl(LEASE))
            assert 0 < left_ms[-1] <= 600
            renewals += left_ms[-1] > left_ms[-2]
            time.sleep(0.01)
        assert 600 < client.pttl(BLOCKS) <= 1800
        assert 600 < client.pttl(SEQ) <= 1800


def test_log_and_set_agree_and_order_is_kept(valkey, cache):
    with valkey.client() as client:
        for n in range(2, 300):
            cache.change([n], removed=[n - 1] if n % 3 else [])
        cache.change([2], removed=[2])  # both in one step: it is held
        cache.change([], removed=[299])
        until(lambda: client.smembers(BLOCKS) == cache.members())
        assert replay(client) == cache.members()
        assert client.xlen(LOG) < 100  # coalesced


def test_a_block_is_held_in_each_tier_by_itself(valkey, cache):
    with valkey.client() as client:
        cache.change([1, 2], tier=HOST)
        cache.change([2, 3], tier=DISK)
        cache.change([], removed=[1])
        cache.change([], removed=[2], tier=HOST)
        expected = members(1, tier=HOST) | members(2, 3, tier=DISK)
        until(lambda: client.smembers(BLOCKS) == expected)
        assert replay(client) == expected
        assert unpack_member(pack_member(h(7), DISK)) == (h(7), DISK)
        assert unpack_member(h(7) + b"9") == (h(7), DISK), "a tier of a later version"


def test_more_hashes_than_lua_can_unpack(valkey, cache):
    with valkey.client() as client:
        cache.change(list(range(1, 20_001)))
        until(lambda: client.scard(BLOCKS) == 20_000)
        cache.change([], removed=list(range(1, 20_000)))
        until(lambda: client.scard(BLOCKS) == 1)
        assert replay(client) == members(20_000)


def test_too_many_changes_at_once_become_a_snapshot(valkey, cache):
    with valkey.client() as client:
        cache.change(list(range(1, 80_001)))
        until(lambda: client.scard(BLOCKS) == 80_000, timeout_s=10)
        assert len(cache.publisher._pending) == 0


def test_close_leaves_nothing_but_the_log(valkey, cache):
    cache.publisher.close()
    with valkey.client() as client:
        assert client.keys("*") == [LOG.encode()]
    cache.publisher.close()


def test_a_flush_is_noticed_without_any_traffic(valkey, cache):
    with valkey.client() as client:
        client.flushall()
        until(lambda: client.smembers(BLOCKS) == members(1))
        assert client.get(LEASE) == b"5"
        assert replay(client) == members(1)


def test_a_wrong_seq_is_refused_and_everything_published_anew(valkey, cache):
    with valkey.client() as client:
        until(lambda: client.get(SEQ) == b"2")
        client.set(SEQ, 77)
        client.sadd(BLOCKS, pack_member(h(99), HOST))
        cache.change([2])
        until(lambda: client.smembers(BLOCKS) == members(1, 2))
        assert int(client.get(SEQ)) < 77


def test_redis_comes_back_empty(own_valkey, own_cache):
    own_valkey.stop()
    for n in range(2, 5000):
        own_cache.change([n], removed=[n - 1])
    until(lambda: not own_cache.publisher.synced)
    assert not own_cache.publisher._pending
    own_valkey.start()
    with own_valkey.client() as client:
        until(lambda: client.smembers(BLOCKS) == members(4999))
        assert replay(client) == members(4999)
        assert client.get(LEASE) == b"5"


def test_redis_is_away_at_the_start_and_at_the_end(own_valkey):
    own_valkey.stop()
    cache = Cache()
    cache.publisher = Publisher(info(), own_valkey.url, CLUSTER, 0.6, cache.snapshot)
    cache.publisher.start()
    cache.change([1])
    own_valkey.start()
    with own_valkey.client() as client:
        until(lambda: client.smembers(BLOCKS) == members(1))
    own_valkey.stop()
    cache.publisher.close()


def test_a_pause_in_the_middle_of_a_write_does_not_reuse_its_number(own_valkey, own_cache, monkeypatch):
    """The answer to a batch is lost, the batch is not: routers have seen its number, `cleared` must get another."""
    publisher = own_cache.publisher
    with own_valkey.client() as client:
        own_cache.change([2])
        until(lambda: client.smembers(BLOCKS) == members(1, 2))
        real, lost = publisher._call, []

        def lose_the_answer(name, keys, args):
            answer = real(name, keys, args)
            if name == "publish" and not lost:
                lost.append(answer)
                raise TimeoutError("the answer is lost")
            return answer

        monkeypatch.setattr(publisher, "_call", lose_the_answer)
        own_cache.change([3], removed=[2])
        until(lambda: lost == [1] and publisher.synced)
        own_cache.change([4])
        until(lambda: client.smembers(BLOCKS) == members(1, 3, 4))
        assert replay(client) == members(1, 3, 4)


def test_a_later_life_is_not_overwritten(valkey, cache):
    later = Cache()
    later.publisher = Publisher(info(epoch=6), valkey.url, CLUSTER, 0.6, later.snapshot)
    later.publisher.start()
    until(lambda: cache.publisher.superseded)
    with valkey.client() as client:
        time.sleep(0.5)
        assert client.get(LEASE) == b"6"
        cache.publisher.close()
        assert client.get(LEASE) == b"6"
        assert msgspec.msgpack.decode(client.hget(WORKERS, "w"), type=WorkerInfo).epoch == 6
    later.publisher.close()


def test_a_block_pool_under_load_while_redis_comes_and_goes(own_valkey):
    """The contract of `snapshot`, with the real pool: publish what is undrained, then list, under the engine's lock."""
    lock = threading.RLock()
    pool = BlockPool(40)
    publisher: Publisher

    def publish() -> None:
        events = pool.drain_events()
        if events is not None:
            stored = [(block_hash, parent, DEVICE) for block_hash, parent in events.stored]
            removed: list[Removed] = [(block_hash, DEVICE) for block_hash in events.removed]
            publisher.publish(stored, removed)

    def snapshot() -> list[Stored]:
        with lock:
            publish()
            return [(block_hash, parent, DEVICE) for block_hash, parent in pool.cached_hashes()]

    def held() -> set[bytes]:
        return {pack_member(block_hash, DEVICE) for block_hash, _ in pool.cached_hashes()}

    publisher = Publisher(info(), own_valkey.url, CLUSTER, 0.6, snapshot)
    publisher.start()
    rng = random.Random(3)

    def churn(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with lock:
                chain = 1000 * rng.randrange(1, 12)
                blocks = pool.allocate(rng.randrange(1, 8))
                for depth, block in enumerate(blocks):
                    pool.store(block, h(chain + depth), h(chain + depth - 1))
                pool.release(blocks)
                if rng.random() < 0.5:
                    publish()
            time.sleep(0.0002)

    with own_valkey.client() as client:
        for _ in range(4):
            churn(0.1)
            client.flushall()
            churn(0.2)
            with lock:
                publish()
            until(lambda: client.smembers(BLOCKS) == held())
            assert replay(client) == held()
            own_valkey.stop()
            churn(0.1)
            own_valkey.start()
    publisher.close()
