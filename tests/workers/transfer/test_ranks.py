"""Any number of ranks on either side, any own layout, any road: the right bytes arrive on every rank."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from tests.workers.transfer.pair import (
    LAYOUT,
    OWN_LAYOUTS,
    DecodeSide,
    PatternEngine,
    PrefillSide,
    at_rest,
    until,
    work,
)
from workers.transfer.shards import parts

pytestmark = pytest.mark.usefixtures("nothing_leaks")

RANKS = [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (1, 4), (4, 4), (1, 8), (8, 1), (8, 2), (2, 8)]
# Road, and which side has its cache on a device.
ROADS = ["shm", "shm, sender staged", "shm, receiver staged", "shm, both staged", "tcp", "tcp, sender staged"]


@contextmanager
def sides(
    ranks: tuple[int, int], road: str, own: tuple[str, str] = ("blkhtd", "blkhtd"), **options: Any
) -> Iterator[tuple[DecodeSide, PrefillSide]]:
    name, _, staged = road.partition(", ")
    d = DecodeSide(
        PatternEngine(64, ranks[1], own[1]),
        [name],
        staged=staged in ("receiver staged", "both staged"),
        compression=options.get("compression", "none"),
    )
    p = PrefillSide(
        PatternEngine(64, ranks[0], own[0]),
        [name],
        staged=staged in ("sender staged", "both staged"),
        **options,
    )
    try:
        yield d, p
    finally:
        p.stop()
        d.stop()


def hand_over(d: DecodeSide, p: PrefillSide, *lengths: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    names = []
    for i, length in enumerate(lengths):
        w = work(f"w{i}", [rng.randrange(1000) for _ in range(length)])
        p.accept(w, d.reserve(w))
        names.append(w.request_id)
        p.run()
    d.wait(*names)
    assert d.lost == {}
    assert d.committed == dict.fromkeys(names, True)
    at_rest(d, p)
    assert p.ended == dict.fromkeys(names)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("ranks", RANKS, ids=lambda ranks: f"{ranks[0]} to {ranks[1]}")
def test_right_bytes_on_every_rank(ranks: tuple[int, int], road: str) -> None:
    with sides(ranks, road) as (d, p):
        hand_over(d, p, 1, 8, 70, 33)
        channels = (2 if road.startswith("tcp") else 1) * len(parts(*ranks, LAYOUT.num_kv_heads))
        until(lambda: p.handoffs.peers()["d0"].channels == channels)
        (status,) = p.handoffs.peers().values()
        assert status.road == road.partition(",")[0]


@pytest.mark.parametrize("own", itertools.product(OWN_LAYOUTS, OWN_LAYOUTS), ids=" to ".join)
def test_each_side_lays_its_cache_out_as_it_likes(own: tuple[str, str]) -> None:
    for road in ("shm", "tcp"):
        with sides((2, 1), road, own) as (d, p):
            hand_over(d, p, 1, 45)


@pytest.mark.parametrize("ranks", [(1, 4), (4, 1), (8, 4)], ids=str)
def test_own_layouts_of_several_ranks(ranks: tuple[int, int]) -> None:
    for road, own in itertools.product(("shm", "tcp", "shm, sender staged"), (("lbkhtd", "klbthd"),)):
        mine = ("blkhtd", own[1]) if "staged" in road else own
        with sides(ranks, road, mine) as (d, p):
            hand_over(d, p, 45, 70)


@pytest.mark.parametrize("compression", ["int8", "fp8"])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 4), (4, 1)], ids=str)
def test_compressed_on_the_wire(ranks: tuple[int, int], compression: str) -> None:
    for road, own in [
        ("tcp", ("blkhtd", "blkhtd")),
        ("tcp", ("lbkhtd", "klbthd")),
        ("tcp, sender staged", None),
    ]:
        with sides(ranks, road, own or ("blkhtd", "blkhtd"), compression=compression) as (d, p):
            hand_over(d, p, 1, 33, 60)
            sent = sum(peer.sent_bytes for peer in p.handoffs.peers().values())
            blocks = 1 + 9 + 15
            assert sent == LAYOUT.wire_bytes(blocks, LAYOUT.num_layers, LAYOUT.num_kv_heads, "int8")
            assert sent < blocks * LAYOUT.block_bytes


def test_compression_is_no_matter_where_nothing_is_on_a_wire() -> None:
    with sides((2, 1), "shm", compression="int8") as (d, p):
        d.compression = "none"
        hand_over(d, p, 50)


@pytest.mark.parametrize("streams", [1, 2, 3, 4])
def test_several_connections_of_one_pair(streams: int) -> None:
    with sides((2, 2), "tcp", tcp_streams=streams, ring_memory=2 * LAYOUT.block_bytes) as (d, p):
        hand_over(d, p, 10, 60, 33, 70)
        until(lambda: p.handoffs.peers()["d0"].channels == 2 * streams)


@pytest.mark.parametrize("road", ["shm", "tcp", "shm, sender staged"])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 4)], ids=str)
def test_layers_leave_while_the_rest_is_computed(ranks: tuple[int, int], road: str) -> None:
    with sides(ranks, road, layer_groups=2) as (d, p):
        hand_over(d, p, 3, 64, 100, 50)


def test_the_next_road_is_taken_where_the_first_is_barred() -> None:
    d = DecodeSide(PatternEngine(64, 2), ["shm", "tcp"])
    d.tickets.endpoints = [
        msgspec.structs.replace(e, host_id="elsewhere") if e.kind == "shm" and e.rank == 1 else e
        for e in d.receiver.endpoints
    ]
    p = PrefillSide(PatternEngine(64, 2), ["shm", "tcp"])
    hand_over(d, p, 50, 20)
    (status,) = p.handoffs.peers().values()
    assert status.road == "shm+tcp"
    assert "another host" in status.passed_over[0]
    p.stop()
    d.stop()


def test_a_rank_without_an_endpoint_is_said() -> None:
    d = DecodeSide(PatternEngine(64, 2), ["tcp"])
    d.tickets.endpoints = d.receiver.endpoints[:1]
    p = PrefillSide(PatternEngine(64), ["tcp"])
    w = work("a", [1] * 9)
    p.accept(w, d.reserve(w))
    until(lambda: "a" in p.ended)
    assert "no channel to d0: it offers nothing" in p.reasons["a"]
    d.cancel("a")
    at_rest(d, p)
    p.stop()
    d.stop()


# --- caches that do not fit ------------------------------------------------------------------------------------------

DIFFERENCES = [("model_fingerprint", "g"), ("dtype", "bfloat16"), ("block_size", 8), ("head_dim", 16)]


@pytest.mark.parametrize("road", ["shm", "tcp"])
@pytest.mark.parametrize(("field", "value"), DIFFERENCES)
def test_another_cache_is_refused_before_the_first_byte(field: str, value: Any, road: str) -> None:
    """The ticket is right, so that only the receiver can see it, at KvOpen: the sender's own layout differs."""
    with sides((1, 1), road) as (d, p):
        ours = msgspec.structs.replace(LAYOUT, **{field: value})
        p.handoffs._sender = dataclasses.replace(p.handoffs._sender, layout=ours)
        w = work("a", list(range(20)))
        p.accept(w, d.reserve(w))
        p.run()
        until(lambda: "a" in p.ended)
        assert p.ended["a"] == "transfer_failed"
        assert f"is {getattr(LAYOUT, field)} here and {value} on p0" in p.reasons["a"]
        assert d.engine.untouched
        d.cancel("a")
        at_rest(d, p)


@pytest.mark.parametrize("ranks", [3, 0, -1, 2**40])
def test_ranks_that_no_heads_can_be_shared_among_are_refused_at_once(ranks: int) -> None:
    with sides((1, 1), "tcp") as (d, p):
        w = work("a", list(range(20)))
        ticket = msgspec.structs.replace(d.reserve(w), ranks=ranks)
        with pytest.raises(ValueError, match=f"{ranks} ranks"):
            p.accept(w, ticket)
        d.cancel("a")
        at_rest(d, p)
        assert p.handoffs.peers() == {}
