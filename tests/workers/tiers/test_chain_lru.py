"""The order of eviction against a search through everything."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.tiers.chain_lru import ChainLru
from workers.tiers.changes import Changes


def h(number: int) -> bytes:
    return number.to_bytes(16, "little")


def parent(number: int) -> int:
    """A tree: 0 is the root, n hangs on n // 2."""
    return number // 2


steps = st.lists(
    st.tuples(st.sampled_from(["add", "touch", "remove", "evict"]), st.integers(1, 20)), max_size=80
)


@settings(max_examples=300, deadline=None)
@given(steps, st.frozensets(st.integers(1, 20), max_size=6))
def test_the_oldest_leaf_that_may_go(script, pinned):
    lru = ChainLru()
    used: dict[int, int] = {}
    for now, (kind, number) in enumerate(script):
        if kind == "add" and number not in used:
            lru.add(h(number), h(parent(number)))
            used[number] = now
        elif kind == "touch":
            lru.touch(h(number))
            if number in used:
                used[number] = now
        elif kind == "remove" and number in used:
            lru.remove(h(number))
            del used[number]
        elif kind == "evict":
            leaves = [n for n in used if not any(parent(child) == n for child in used)]
            free = [n for n in leaves if n not in pinned]
            expected = min(free, key=used.__getitem__, default=None)
            found = lru.next_out(lambda block_hash: int.from_bytes(block_hash, "little") not in pinned)
            assert found == (None if expected is None else h(expected))
            if expected is not None:
                lru.remove(h(expected))
                del used[expected]
        assert dict(lru.items()) == {h(n): h(parent(n)) for n in used}
        assert len(lru._leaves) <= 2 * len(lru) + 66
    order = []
    while (out := lru.next_out()) is not None:
        lru.remove(out)
        order.append(int.from_bytes(out, "little"))
    assert sorted(order) == sorted(used), "everything goes in the end"
    assert lru._children == {}
    for number in order:
        assert parent(number) not in order[: order.index(number)], "a parent went before its child"


def test_the_same_block_twice_is_an_error():
    lru = ChainLru()
    lru.add(h(1), h(0))
    with pytest.raises(ValueError, match="here already"):
        lru.add(h(1), h(0))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), max_size=60))
def test_changes_are_net_and_in_order_consistent(script):
    changes = Changes()
    held: set[bytes] = set()
    mirror: set[bytes] = set()
    for number, store, drain in script:
        block_hash = h(number)
        if store and block_hash not in held:
            held.add(block_hash)
            changes.stored(block_hash, h(number + 1))
        elif not store and block_hash in held:
            held.remove(block_hash)
            changes.removed(block_hash)
        if drain:
            stored, removed = changes.drain()
            assert not {x for x, _ in stored} & set(removed)
            mirror = (mirror - set(removed)) | {x for x, _ in stored}
            assert mirror == held
