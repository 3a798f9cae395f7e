"""What a rank counts reaches the routers once, whatever becomes of a message on the way to Redis."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import redis

from router.experts.loads import Loads
from tests.valkey_server import EmbeddedValkey
from workers.experts.board import RankBoard
from workers.experts.counts import Counts
from workers.experts.group import GroupStatus
from workers.experts.plane import Place
from workers.protocol import redis_keys
from workers.protocol.expert_messages import ExpertCounts

LAYERS, EXPERTS, RANKS = 2, 4, 2


class FakePlane:
    """Counts, and a group that never changes."""

    def __init__(self) -> None:
        self.place = Place("g", 0, RANKS, "rank-0", 1)
        self.counts = Counts(LAYERS, EXPERTS, slots=EXPERTS)
        self.group = SimpleNamespace(
            status=GroupStatus(1, (0, 1), 0, ((0, 1), (0, 1)), None, "", 0, 0, ""),
            model=SimpleNamespace(num_layers=LAYERS, num_experts=EXPERTS),
            holdings=SimpleNamespace(expert_bytes=1, bytes_per_s=1.0),
            slots=EXPERTS,
        )
        self.take_counts = self.counts.take

    def compute(self, tokens: int) -> None:
        for layer in range(LAYERS):
            self.counts.routed(layer, np.full(tokens, 3))
            self.counts.computed(layer, np.array([0, 0, 0, tokens]), 0.0)


class Flaky(RankBoard):
    """Redis ends the connection, `once` before or behind a command that it names."""

    once: tuple[str, str] | None = None

    def _redis(self, command: str, key: str, *arguments: Any) -> Any:
        if self.once == (command, "before"):
            self.once = None
            raise redis.ConnectionError("gone")
        found = super()._redis(command, key, *arguments)
        if self.once == (command, "behind"):
            self.once = None
            raise redis.ConnectionError("gone")
        return found


@pytest.fixture
def plane() -> FakePlane:
    return FakePlane()


@pytest.fixture
def board(valkey: EmbeddedValkey, plane: FakePlane) -> Iterator[Flaky]:
    made = Flaky(plane, "decode", valkey.url, "test", "here", heartbeat_s=60)  # type: ignore[arg-type]
    yield made
    made.close()


def messages(valkey: EmbeddedValkey) -> list[ExpertCounts]:
    with valkey.client() as client:
        entries: Any = client.xrange(redis_keys.expert_counts("test", "g"))
    return [msgspec.msgpack.decode(fields[b"c"], type=ExpertCounts) for _, fields in entries]


def test_a_message_says_what_was_counted_since_the_last(
    valkey: EmbeddedValkey, plane: FakePlane, board: Flaky
) -> None:
    board.beat()
    assert messages(valkey) == [], "nothing was counted"
    plane.compute(5)
    board.beat()
    board.beat()
    plane.compute(2)
    board.beat()
    first, second = messages(valkey)
    assert (first.seq, second.seq) == (1, 2)
    assert np.frombuffer(second.routed, "<u4").reshape(LAYERS, EXPERTS).tolist() == [[0, 0, 0, 2]] * 2
    assert second.steps == 1


@pytest.mark.parametrize("command", ["HSET", "XADD", "GET"])
@pytest.mark.parametrize("when", ["before", "behind"])
def test_nothing_is_lost_or_counted_twice_when_redis_goes_away(
    valkey: EmbeddedValkey, plane: FakePlane, board: Flaky, command: str, when: str
) -> None:
    """Also where Redis has the message and the rank does not know."""
    for tokens in (5, 7, 11):
        plane.compute(tokens)
        if tokens == 7:
            board.once = command, when
            with pytest.raises(redis.ConnectionError):
                board.beat()
        else:
            board.beat()
    board.beat()
    loads = Loads(LAYERS, EXPERTS, RANKS, window_s=60, half_life_s=600, enough=1)
    for counts in messages(valkey):
        loads.take(counts, now=0.0)
    assert loads.routed().tolist() == [[0, 0, 0, 5 + 7 + 11]] * LAYERS
    assert loads.lost == 0
    assert loads.repeated == (1 if (command, when) == ("XADD", "behind") else 0)
