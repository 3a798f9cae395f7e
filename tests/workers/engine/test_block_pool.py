"""The block pool against a plain model of it: counts, hashes, eviction, and the prefix-closed set of hashes."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.engine.block_pool import BlockPool, Evicted
from workers.protocol.hashes import block_hashes

ROOT = b"\0" * 16


class PoolMachine(RuleBasedStateMachine):
    """Requests take chains of blocks, compute them, and give them back in any order. Tokens are letters, B = 1."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.held: list[tuple[list[int], list[bytes], int]] = []  # table, hashes, stored
        self.mirror: set[bytes] = set()  # what the events say is cached
        self.below: dict[bytes, bytes] = {}  # hash -> parent, of what was evicted and not computed again
        self.pool.on_evict = self.evict

    def evict(self, evicted: list[Evicted]) -> None:
        held = dict(self.pool.cached_hashes())
        for _, block_hash, parent in evicted:
            assert block_hash not in held, "evicted while somebody else holds it"
            assert block_hash not in self.below, "evicted twice"
            assert parent not in self.below, "a parent was evicted before its child"
            self.below[block_hash] = parent

    @rule(prompt=st.lists(st.integers(0, 2), min_size=1, max_size=6))
    def arrive(self, prompt: list[int]) -> None:
        hashes = block_hashes(prompt, 1, ROOT)
        matched = self.pool.match(hashes)
        missing = len(hashes) - len(matched)
        available = self.pool.num_available(matched)
        self.pool.acquire(matched)
        fresh = self.pool.allocate(missing)
        if fresh is None:
            assert missing > available
            self.pool.release(matched)
            return
        assert missing <= available
        others = {block for table, _, _ in self.held for block in table} | set(matched)
        assert not others & set(fresh), "a block in use was handed out"
        self.held.append((matched + fresh, hashes, len(matched)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        table, hashes, stored = self.held[index]
        upto = data.draw(st.integers(stored, len(hashes)))
        for i in range(stored, upto):
            self.pool.store(table[i], hashes[i], hashes[i - 1] if i else ROOT)
            self.below.pop(hashes[i], None)
        self.held[index] = (table, hashes, upto)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        table, _, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(table)

    @rule()
    def drain(self) -> None:
        events = self.pool.drain_events()
        if events is None:
            return
        removed = set(events.removed)
        assert removed <= self.mirror, "removed what was never stored"
        self.mirror -= removed
        stored = {h for h, _ in events.stored}
        assert not stored & self.mirror, "stored twice"
        self.mirror |= stored

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check([table for table, _, _ in self.held])

    @invariant()
    def nothing_is_lost(self) -> None:
        """What was ever stored is cached or was given to the hook."""
        for _, hashes, stored in self.held:
            assert set(hashes[:stored]) <= {h for h, _ in self.pool.cached_hashes()}
        for parent in self.below.values():
            assert parent == ROOT or parent in self.below or parent in dict(self.pool.cached_hashes())

    @invariant()
    def prefix_closed(self) -> None:
        cached = dict(self.pool.cached_hashes())
        for block_hash, parent in cached.items():
            assert parent == ROOT or parent in cached, f"{block_hash.hex()} outlived its parent"

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for table, _, _ in self.held:
            self.pool.release(table)
        self.drain()
        assert self.pool.num_free == self.pool.num_blocks
        assert self.mirror == {h for h, _ in self.pool.cached_hashes()}


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBlockPool = PoolMachine.TestCase


def test_empty_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(3)
    first = pool.allocate(1)
    assert first is not None
    pool.store(first[0], b"a" * 16, ROOT)
    pool.release(first)
    taken = pool.allocate(2)
    assert taken is not None
    assert first[0] not in taken
    assert pool.match([b"a" * 16]) == first


def test_least_recently_used_leaf_goes_first() -> None:
    pool = BlockPool(2)
    chain = pool.allocate(2)
    assert chain is not None
    pool.store(chain[0], b"a" * 16, ROOT)
    pool.store(chain[1], b"b" * 16, b"a" * 16)
    pool.release(chain)
    pool.allocate(1)
    assert pool.match([b"a" * 16, b"b" * 16]) == [chain[0]]


def test_the_hook_is_told_before_the_blocks_are_handed_out_and_once_for_each_hash() -> None:
    pool = BlockPool(3)
    told: list[list[Evicted]] = []
    pool.on_evict = told.append
    chain, twin = pool.allocate(2), pool.allocate(1)
    assert chain is not None
    assert twin is not None
    pool.store(chain[0], b"a" * 16, ROOT)
    pool.store(chain[1], b"b" * 16, b"a" * 16)
    pool.store(twin[0], b"a" * 16, ROOT)
    pool.release(twin)
    assert pool.allocate(1) == twin
    assert told == [], "another block holds the same hash"
    pool.release(chain)
    pool.release(twin)
    pool.allocate(3)
    assert told == [[(chain[1], b"b" * 16, b"a" * 16), (chain[0], b"a" * 16, ROOT)]]


def test_release_without_reference_is_an_error() -> None:
    pool = BlockPool(1)
    with pytest.raises(RuntimeError, match="without a reference"):
        pool.release([0])


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(1, caching=False)
    block = pool.allocate(1)
    assert block is not None
    pool.store(block[0], b"a" * 16, ROOT)
    assert pool.match([b"a" * 16]) == []
    assert pool.drain_events() is None
