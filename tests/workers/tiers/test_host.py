"""Host memory: what it keeps, in which order it loses it, and that a reader is never given another block's bytes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workers.tiers.byte_cache import BLOCK_BYTES, ROOT, Cache, content, h
from workers.tiers.block_file import HEADER_BYTES
from workers.tiers.disk import DiskTier
from workers.tiers.host import HostTier


def always() -> bool:
    return True


def make(cache: Cache, slots: int, lower: DiskTier | None = None) -> HostTier:
    return HostTier(slots * BLOCK_BYTES, cache.block_bytes, pinned=False, lower=lower)


def evict(cache: Cache, tier: HostTier, *numbers: int) -> None:
    """A chain in which n follows n - 1, evicted together: leaf first."""
    chain = sorted(numbers, reverse=True)
    for block, number in enumerate(chain):
        cache.put(block, h(number))
    tier.take([(block, h(number), h(number - 1)) for block, number in enumerate(chain)])
    tier.check()


def held(tier: HostTier) -> set[bytes]:
    return {block_hash for block_hash, _ in tier.held()}


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_was_evicted_comes_back_as_it_was(ranks: int):
    cache = Cache(ranks=ranks)
    tier = make(cache, 8)
    evict(cache, tier, 1, 2, 3)
    chain = [h(n) for n in range(1, 6)]
    assert tier.count(chain) == 3
    assert tier.count([h(9), *chain]) == 0
    assert tier.read(chain[:3], [40, 41, 42], always) == 3
    assert [cache.get(block) for block in (40, 41, 42)] == [content(block_hash) for block_hash in chain[:3]]
    assert held(tier) == set(chain[:3]), "it stays"
    tier.check()


def test_a_second_eviction_copies_nothing(monkeypatch: pytest.MonkeyPatch):
    cache = Cache()
    tier = make(cache, 4)
    evict(cache, tier, 1, 2)
    evict(cache, tier, 11)
    monkeypatch.setattr(cache.block_bytes, "outgoing", None)
    tier.take([(0, h(2), h(1)), (1, h(1), h(0))])
    monkeypatch.undo()
    assert tier.stats().stored_blocks == 3
    evict(cache, tier, 21, 22)
    assert held(tier) == {h(n) for n in (1, 2, 21, 22)}, "they counted as used"


def test_leaves_go_before_their_parents_and_the_bound_holds():
    cache = Cache()
    tier = make(cache, 4)
    evict(cache, tier, 1, 2, 3)
    evict(cache, tier, 11, 12)
    assert held(tier) == {h(n) for n in (1, 2, 11, 12)}
    tier.count([h(1), h(2)])
    evict(cache, tier, 21)
    assert held(tier) == {h(n) for n in (1, 2, 11, 21)}
    evict(cache, tier, *range(31, 41))
    assert held(tier) == {h(n) for n in (31, 32, 33, 34)}, "of too many, those that were used last"
    stored, removed = tier.drain()
    assert {block_hash for block_hash, _ in stored} == held(tier)
    assert removed == [], "what came and went between two drains was nothing"
    assert tier.stats().blocks == 4


def test_a_block_that_is_read_is_not_overwritten():
    cache = Cache()
    tier = make(cache, 2)
    evict(cache, tier, 1, 2)
    began, go = threading.Event(), threading.Event()

    def wait() -> bool:
        began.set()
        return go.wait(10)

    reader = threading.Thread(target=lambda: results.append(tier.read([h(1), h(2)], [50, 51], wait)))
    results: list[int] = []
    reader.start()
    assert began.wait(10)
    evict(cache, tier, 11, 12)
    assert held(tier) == {h(1), h(2)}, "no slot was free: the newcomers are dropped"
    assert tier.stats().dropped_blocks == 2
    go.set()
    reader.join()
    assert results == [2]
    assert (cache.get(50), cache.get(51)) == (content(h(1)), content(h(2)))
    evict(cache, tier, 11, 12)
    assert held(tier) == {h(11), h(12)}


def test_a_cache_that_cannot_be_read_costs_blocks_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    cache = Cache()
    tier = make(cache, 4)

    def broken(blocks: object) -> None:
        raise MemoryError

    monkeypatch.setattr(cache.block_bytes, "outgoing", broken)
    tier.take([(0, h(1), h(0))])
    monkeypatch.undo()
    tier.check()
    assert (tier.count([h(1)]), tier.stats().errors) == (0, 1)


def test_less_than_one_block_is_refused():
    with pytest.raises(ValueError, match=r"host_cache_memory is 95 bytes, one KV block of this model has 96"):
        HostTier(95, Cache().block_bytes, pinned=False, lower=None)


def test_what_is_evicted_goes_on_to_the_disk(tmp_path: Path):
    cache = Cache()
    disk = DiskTier(tmp_path / "w", 1 << 20, cache.block_bytes, ROOT)
    tier = make(cache, 8, disk)
    for first in range(1, 60, 2):
        evict(cache, tier, first, first + 1)
        until(lambda: not tier._leaving)
    on_disk = {block_hash for block_hash, _ in disk.held()}
    assert on_disk | held(tier) == {h(n) for n in range(1, 61)}
    assert disk.read([h(1)], [40], always) == 1
    assert cache.get(40) == content(h(1))
    written = disk.stats().stored_blocks
    evict(cache, tier, 1, 2)  # back on the device, and evicted once more
    evict(cache, tier, *range(71, 79))
    until(lambda: not tier._leaving)
    again = disk.stats().stored_blocks - written
    assert again == len({b for b, _ in disk.held()} - on_disk), "nothing is written twice"
    disk.close()


def test_a_writer_that_is_slow_costs_blocks_but_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = Cache()
    go = threading.Event()
    monkeypatch.setattr("workers.tiers.disk.write_block", lambda *_: go.wait(20))
    disk = DiskTier(tmp_path / "w", 1 << 20, cache.block_bytes, ROOT)
    tier = make(cache, 8, disk)
    began = time.monotonic()
    for number in range(1, 200, 2):
        evict(cache, tier, number)
    assert time.monotonic() - began < 5
    assert tier.stats().blocks >= 6
    assert len(tier._leaving) <= 2
    assert disk.stats().dropped_blocks >= 90
    go.set()
    disk.close()
    tier.check()
    assert not tier._leaving


@pytest.mark.parametrize("with_disk", [False, True])
def test_readers_and_evictions_at_once(tmp_path: Path, with_disk: bool):
    """Whatever comes back is what its hash says, while slots change hands all the time."""
    cache = Cache(num_blocks=64)
    disk = (
        DiskTier(tmp_path / "w", 40 * (BLOCK_BYTES + HEADER_BYTES), cache.block_bytes, ROOT)
        if with_disk
        else None
    )
    tier = make(cache, 12, disk)
    stop = threading.Event()
    wrong: list[str] = []
    hits = [0]

    def read(first_block: int) -> None:
        rng = random.Random(first_block)
        while not stop.is_set():
            start = rng.randrange(1, 60)
            chain = [h(n) for n in range(start, start + rng.randrange(1, 6))]
            for source in (tier, disk) if disk else (tier,):
                blocks = list(range(first_block, first_block + len(chain)))
                good = source.read(chain, blocks, always)
                hits[0] += good
                for block, block_hash in list(zip(blocks, chain, strict=True))[:good]:
                    if cache.get(block) != content(block_hash):
                        wrong.append(block_hash.hex())

    readers = [threading.Thread(target=read, args=(block,)) for block in (40, 50)]
    for reader in readers:
        reader.start()
    rng = random.Random(5)
    rounds, end = 0, time.monotonic() + 60
    while (rounds < 500 or hits[0] < 500) and time.monotonic() < end:
        rounds += 1
        first = rng.randrange(1, 60)
        evict(cache, tier, *range(first, first + rng.randrange(1, 6)))
        time.sleep(0.0005)
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert hits[0] >= 500
    if disk is not None:
        disk.close()
        assert not disk.stats().errors
        assert disk.stats().active
        assert len(list((tmp_path / "w").glob("*.kv"))) == len(disk.held()) <= 40
    tier.check()
    assert not tier._pins
