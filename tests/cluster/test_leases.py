from __future__ import annotations

import logging

import pytest
from rich.console import Console

from cluster.config import load_config
from cluster.launch import Cluster
from cluster.leases import Leases
from cluster.parts import LaunchError
from cluster.progress import Steps
from tests.valkey_server import EmbeddedValkey
from workers.protocol import redis_keys


def test_an_option_that_redis_does_not_know_is_told() -> None:
    leases = Leases("redis://127.0.0.1:9/0?foo=bar", "c", ["decode-0"])
    with pytest.raises(ConnectionError, match="foo"):
        leases.check()
    leases.close()


def test_a_name_that_is_taken_in_a_shared_redis(valkey: EmbeddedValkey) -> None:
    settings = {"redis.url": valkey.url, "cluster": "c", "worker.timeout_s": 1}
    steps = Steps(Console(quiet=True))
    with valkey.client() as client:
        client.hset(redis_keys.workers("c"), "decode-0", b"info")
        client.set(redis_keys.lease("c", "decode-0"), 17)
        with pytest.raises(LaunchError, match=r"a cluster named 'c' is alive in that Redis \(decode-0\)"):
            Cluster(load_config(None, settings))._start_redis(steps)
        # Of another name, or left behind by one that was killed: no hindrance.
        assert Cluster(load_config(None, settings | {"cluster": "d"}))._start_redis(steps) == valkey.url
        client.set(redis_keys.lease("c", "decode-0"), 17, px=500)
        assert Cluster(load_config(None, settings))._start_redis(steps) == valkey.url


def test_leases_that_are_held(valkey: EmbeddedValkey) -> None:
    leases = Leases(valkey.url, "c", ["a", "b", "broken"])
    leases.check()
    assert leases.read() == {}
    with valkey.client() as client:
        client.set(redis_keys.lease("c", "a"), 17)
        client.set(redis_keys.lease("c", "broken"), "x")
        client.set(redis_keys.lease("another", "b"), 1)
        assert leases.read() == {"a": 17}
        client.set(redis_keys.lease("c", "a"), 18, px=1)
        client.set(redis_keys.lease("c", "b"), 5)
        assert leases.read() in ({"b": 5}, {"a": 18, "b": 5})
    leases.close()


def test_a_redis_that_is_away_is_no_answer_and_told_once(
    own_valkey: EmbeddedValkey, caplog: pytest.LogCaptureFixture
) -> None:
    leases = Leases(own_valkey.url, "c", ["a"])
    own_valkey.stop()
    with caplog.at_level(logging.INFO, "cluster.leases"):
        assert leases.read() is None
        assert leases.read() is None
        own_valkey.start()
        assert leases.read() == {}
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    leases.close()


def test_a_redis_that_is_not_there() -> None:
    with pytest.raises(ConnectionError):
        Leases("redis://127.0.0.1:9", "c", ["a"]).check()


def test_leases_of_a_partitioned_cluster(valkey: EmbeddedValkey) -> None:
    names = [f"decode-{number}" for number in range(20)]
    parts = {name: redis_keys.partition("c", name, 4) for name in names}
    assert set(parts.values()) == set(redis_keys.all_partitions("c", 4)) == {f"c/{n}" for n in range(4)}
    leases = Leases(f"{valkey.url}?partitions=4", "c", names)
    with valkey.client() as client:
        for epoch, name in enumerate(names[:15]):
            client.hset(redis_keys.workers(parts[name]), name, b"info")
            client.set(redis_keys.lease(parts[name], name), epoch)
    assert leases.read() == {name: epoch for epoch, name in enumerate(names[:15])}
    assert leases.registered() == sorted(names[:15])
    leases.close()
