from __future__ import annotations

import logging

import pytest

from cluster.leases import Leases
from tests.valkey_server import EmbeddedValkey
from workers.protocol import redis_keys


def test_an_option_that_redis_does_not_know_is_told() -> None:
    leases = Leases("redis://127.0.0.1:9/0?foo=bar", "c", ["decode-0"])
    with pytest.raises(ConnectionError, match="foo"):
        leases.check()
    leases.close()


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
