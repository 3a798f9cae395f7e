"""The index against a plain dict of sets, under a log that loses, repeats and reorders."""

from __future__ import annotations

import gc
import random
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from router.index.block_table import NUM_SHARDS, SLICE_BLOCKS, _copy_bytes
from router.prefix_index import CachedPrefix, PrefixIndex
from workers.protocol.messages import IndexBatch
from workers.protocol.tiers import DEVICE, DISK, HOST, TIERS


def h(number: int) -> bytes:
    return number.to_bytes(16, "little")


def stored(*numbers: int) -> list[tuple[bytes, bytes, str]]:
    return [(h(n), h(n - 1), "device") for n in numbers]


def removed(*numbers: int) -> list[tuple[bytes, str]]:
    return [(h(n), "device") for n in numbers]


def on_device(*numbers: int) -> list[tuple[bytes, str]]:
    return [(h(n), DEVICE) for n in numbers]


def prefix_length(held: set[bytes], hashes: list[bytes]) -> int:
    count = 0
    for block_hash in hashes:
        if block_hash not in held:
            break
        count += 1
    return count


def test_match_counts_the_contiguous_prefix_of_each_worker():
    index = PrefixIndex()
    index.load_snapshot("a", 1, 0, on_device(1, 2, 3))
    index.load_snapshot("b", 1, 0, on_device(1, 3))
    index.load_snapshot("c", 1, 0, on_device(2))
    index.load_snapshot("d", 1, 0, [])
    assert index.match([h(1), h(2), h(3), h(4)]) == {"a": CachedPrefix(3), "b": CachedPrefix(1)}
    assert index.match([h(1), h(2)]) == {"a": CachedPrefix(2), "b": CachedPrefix(1)}
    assert index.match([h(9)]) == {}
    assert index.match([]) == {}
    assert PrefixIndex().match([h(1)]) == {}


def test_a_gap_is_told_and_changes_nothing_until_the_snapshot():
    index = PrefixIndex()
    index.load_snapshot("a", 1, 0, [])
    assert index.apply(IndexBatch("a", 1, 1, stored=stored(1))) is False
    assert index.apply(IndexBatch("a", 1, 3, stored=stored(3))) is True
    assert index.hashes("a") == {h(1)}
    assert index.position("a", 1) == 1
    assert index.load_snapshot("a", 1, 3, on_device(1, 2, 3))
    assert index.match([h(1), h(2), h(3)]) == {"a": CachedPrefix(3)}


def test_cleared_needs_nothing_before_it_and_removed_goes_before_stored():
    index = PrefixIndex()
    index.load_snapshot("a", 1, 2, on_device(1, 2))
    batch = IndexBatch("a", 1, 9, stored=stored(5), removed=removed(5, 1), cleared=True)
    assert index.apply(batch) is False
    assert index.hashes("a") == {h(5)}
    assert index.position("a", 1) == 9


def test_old_lives_and_unknown_workers_change_nothing():
    index = PrefixIndex()
    index.load_snapshot("a", 2, 5, on_device(1))
    assert index.apply(IndexBatch("a", 1, 6, stored=stored(7))) is False
    assert index.apply(IndexBatch("x", 1, 6, stored=stored(7))) is False
    assert index.load_snapshot("a", 1, 99, on_device(7)) is False
    assert index.load_snapshot("a", 2, 4, on_device(7)) is False
    assert index.hashes("a") == {h(1)}
    assert index.workers() == ["a"]
    assert index.load_snapshot("a", 3, 0, [])  # a new life begins with nothing
    assert len(index) == 0


def test_drop_frees_everything_and_slots_are_used_again():
    index = PrefixIndex()
    for round_ in range(100):
        index.load_snapshot(f"w{round_}", 1, 1, on_device(1, round_ + 2))
        index.drop(f"w{round_}")
        index.drop(f"w{round_}")
    assert len(index) == 0
    assert index._present == 0
    assert len(index._names) == 1


def test_guesses_are_bounded_and_vanish_with_the_snapshot():
    index = PrefixIndex()
    index.load_snapshot("a", 1, 4, on_device(1))
    index.note_routed("a", 1, [h(n) for n in range(1, 8)], capacity=3)
    assert index.num_guesses("a") == 3
    assert index.num_blocks("a") == 4
    index.note_routed("a", 1, [h(2), h(3)], capacity=3)
    assert index.match([h(1), h(2), h(3)]) == {"a": CachedPrefix(3)}
    index.apply(IndexBatch("a", 1, 5, stored=stored(2), removed=removed(3)))  # facts replace guesses
    assert index.match([h(1), h(2), h(3)]) == {"a": CachedPrefix(2)}
    assert index.load_snapshot("a", 1, 5, on_device(1, 2))
    assert index.num_guesses("a") == 0
    assert index.hashes("a") == {h(1), h(2)}
    assert len(index) == 2


def test_guesses_about_a_worker_without_a_snapshot():
    index = PrefixIndex()
    index.note_routed("a", 7, [h(1)], capacity=10)
    assert index.match([h(1)]) == {"a": CachedPrefix(1)}
    index.note_routed("a", 6, [h(2)], capacity=10)  # an older life
    assert index.num_blocks("a") == 1
    index.note_routed("a", 8, [h(3)], capacity=10)
    assert index.match([h(1)]) == {}
    assert index.load_snapshot("a", 8, 0, [])
    assert len(index) == 0


batches = st.lists(
    st.tuples(
        st.integers(0, 2),  # worker
        st.frozensets(st.integers(1, 12), max_size=5),  # stored
        st.frozensets(st.integers(1, 12), max_size=5),  # removed
        st.integers(0, 12),  # 0: cleared
        st.integers(0, 9),  # 0: the worker restarts
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(batches, st.randoms(use_true_random=False), st.data())
def test_the_index_is_exactly_what_the_worker_held_at_its_seq(script, rng: random.Random, data):
    index = PrefixIndex()
    truth: dict[str, set[bytes]] = {}
    history: dict[tuple[str, int, int], frozenset[bytes]] = {}
    epochs: dict[str, int] = {}
    seqs: dict[str, int] = {}
    log: list[IndexBatch] = []

    def snapshot(worker: str) -> None:
        index.load_snapshot(worker, epochs[worker], seqs[worker], [(x, DEVICE) for x in truth[worker]])

    for number, put, take, clear, restart in script:
        worker = f"w{number}"
        if worker not in truth or restart == 0:
            epochs[worker] = epochs.get(worker, 0) + 1
            truth[worker], seqs[worker] = set(), 0
            history[worker, epochs[worker], 0] = frozenset()
            if rng.random() < 0.7:
                snapshot(worker)
        if clear == 0:
            truth[worker].clear()
        truth[worker] -= {h(n) for n in take}
        truth[worker] |= {h(n) for n in put}
        seqs[worker] += 1
        history[worker, epochs[worker], seqs[worker]] = frozenset(truth[worker])
        batch = IndexBatch(
            worker, epochs[worker], seqs[worker], stored(*put), removed(*take), cleared=clear == 0
        )
        fate = rng.random()
        if fate > 0.1:
            log.append(batch)
        if fate > 0.8:
            log.append(batch)
        if fate > 0.9:
            rng.shuffle(log)
        while log and rng.random() < 0.7:
            delivered = log.pop(0)
            gap = index.apply(delivered)
            if gap and rng.random() < 0.6:
                snapshot(delivered.worker_id)
        for name, epoch in epochs.items():
            seq = index.position(name, epoch)
            if seq is not None:
                assert index.hashes(name) == history[name, epoch, seq]

    for name, epoch in epochs.items():  # as discovery does when the seq in Redis is ahead
        if index.position(name, epoch) != seqs[name]:
            snapshot(name)
    chain = [h(n) for n in data.draw(st.lists(st.integers(1, 12), max_size=12))]
    expected = {name: prefix_length(held, chain) for name, held in truth.items()}
    assert index.match(chain) == {name: CachedPrefix(count) for name, count in expected.items() if count}
    assert len(index) == len(set().union(*truth.values()))
    for name in truth:
        index.drop(name)
    assert len(index) == 0


def test_match_tells_the_tiers_of_the_prefix():
    index = PrefixIndex()
    index.load_snapshot("a", 1, 0, [(h(1), DEVICE), (h(1), HOST), (h(2), HOST), (h(2), DISK), (h(3), DISK)])
    index.load_snapshot("b", 1, 0, [*on_device(1, 2), (h(4), HOST)])
    chain = [h(1), h(2), h(3), h(4)]
    assert index.match(chain) == {"a": CachedPrefix(3, host=1, disk=1), "b": CachedPrefix(2)}
    index.apply(IndexBatch("a", 1, 1, removed=[(h(1), DEVICE), (h(2), HOST), (h(9), DISK)]))
    assert index.match(chain)["a"] == CachedPrefix(3, host=1, disk=2)
    index.apply(IndexBatch("a", 1, 2, removed=[(h(2), DISK), (h(3), "tape")]))
    assert index.match(chain)["a"] == CachedPrefix(1, host=1)
    assert index.hashes("a") == {h(1)}
    assert (index.hashes("a", HOST), index.hashes("a", DEVICE)) == ({h(1)}, frozenset())
    for name in ("a", "b"):
        index.drop(name)
    assert len(index) == index._table.num_sets == 0


tier_changes = st.lists(
    st.tuples(
        st.integers(0, 2),  # worker
        st.frozensets(st.tuples(st.integers(1, 8), st.sampled_from(TIERS)), max_size=8),  # stored
        st.frozensets(st.tuples(st.integers(1, 8), st.sampled_from(TIERS)), max_size=8),  # removed
        st.sampled_from(["batch", "batch", "batch", "cleared", "snapshot", "guess"]),
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(tier_changes, st.lists(st.integers(1, 8), max_size=10))
def test_tiers_are_what_a_search_of_all_of_them_finds(script, numbers):
    index = PrefixIndex()
    truth: dict[str, set[tuple[bytes, str]]] = {f"w{i}": set() for i in range(3)}
    seqs = dict.fromkeys(truth, 0)
    guesses: dict[str, set[bytes]] = {name: set() for name in truth}
    for name in truth:
        index.load_snapshot(name, 1, 0, [])
    for number, put, take, kind in script:
        name = f"w{number}"
        stored_now = {(h(n), tier) for n, tier in put}
        removed_now = {(h(n), tier) for n, tier in take}
        if kind == "guess":
            index.note_routed(name, 1, [block_hash for block_hash, _ in stored_now], capacity=100)
            guesses[name] |= {x for x, _ in stored_now} - {x for x, _ in truth[name]}
            continue
        seqs[name] += 1
        if kind == "snapshot":
            truth[name] = stored_now
            guesses[name] = set()
            index.load_snapshot(name, 1, seqs[name], stored_now)
            continue
        if kind == "cleared":
            truth[name] = set()
            guesses[name] = set()
        truth[name] = (truth[name] - removed_now) | stored_now
        guesses[name] -= {x for x, _ in removed_now | stored_now}
        put_list = [(x, b"", tier) for x, tier in stored_now]
        batch = IndexBatch(name, 1, seqs[name], put_list, list(removed_now), cleared=kind == "cleared")
        assert index.apply(batch) is False
    chain = [h(n) for n in numbers]
    expected = {}
    for name, held in truth.items():
        best = []
        for block_hash in chain:
            tiers = [tier for tier in TIERS if (block_hash, tier) in held]
            if not tiers and block_hash not in guesses[name]:
                break
            best.append(tiers[0] if tiers else DEVICE)
        if best:
            expected[name] = CachedPrefix(len(best), best.count(HOST), best.count(DISK))
    assert index.match(chain) == expected
    for name, held in truth.items():
        assert all(index.hashes(name, tier) == {x for x, t in held if t == tier} for tier in TIERS)
        index.drop(name)
    assert len(index) == index._table.num_sets == 0


def test_what_is_large_is_dropped_and_loaded_in_slices():
    index = PrefixIndex()
    numbers = range(3 * SLICE_BLOCKS)
    index.load_snapshot("a", 1, 0, on_device(*numbers))
    index.load_snapshot("b", 1, 0, on_device(*numbers[::2]))
    chain = [h(n) for n in numbers[:64]]
    index.drop("a")
    assert index.match(chain) == {"b": CachedPrefix(1)}
    assert index.workers() == ["b"]
    assert len(index) > len(numbers) // 2, "a drop sweeps one slice only"
    index.load_snapshot("a", 2, 0, on_device(0))  # before the sweep is over: gets another slot
    steps = 1
    while index.tidy(SLICE_BLOCKS):
        steps += 1
        assert index.match(chain) == {"a": CachedPrefix(1), "b": CachedPrefix(1)}
    assert steps >= 2
    assert len(index) == len(numbers) // 2

    load = index.begin_snapshot("b", 1)
    for start in range(0, 10, 5):
        load.add(7, on_device(*range(start, start + 5)))
        assert index.match(chain)["b"] == CachedPrefix(1)
    assert load.finish()
    assert index.match(chain)["b"] == CachedPrefix(10)
    assert index.position("b", 1) == 7
    assert index.num_blocks("b") == 10


def test_pieces_of_several_moments_are_made_whole_by_the_log():
    index = PrefixIndex()
    load = index.begin_snapshot("a", 1)
    load.add(4, on_device(1, 2))
    index.apply(IndexBatch("a", 1, 5, removed=removed(2), stored=stored(3)))
    load.add(5, on_device(3))
    load.add(6, on_device(4))
    assert load.behind
    index.apply(IndexBatch("a", 1, 6, stored=stored(4)))
    load.replay()
    assert not load.behind
    index.apply(IndexBatch("a", 1, 7, removed=removed(1)))
    assert load.finish()
    assert index.hashes("a") == {h(3), h(4)}
    assert index.position("a", 1) == 7

    load = index.begin_snapshot("a", 1)
    load.add(8, [])
    load.add(9, on_device(9))  # batch 9 is lost
    index.apply(IndexBatch("a", 1, 10, stored=stored(10)))
    assert not load.finish()
    assert index.hashes("a") == {h(3), h(4)}


def test_a_load_ends_with_its_worker_and_with_a_newer_one():
    index = PrefixIndex()
    index.load_snapshot("a", 1, 3, on_device(1))
    old = index.begin_snapshot("a", 1)
    old.add(3, on_device(1, 2))
    newer = index.begin_snapshot("a", 2)
    assert old.over
    assert not old.finish()
    newer.add(0, on_device(5))
    assert newer.finish()
    assert index.position("a", 1) is None
    assert index.hashes("a") == {h(5)}
    late = index.begin_snapshot("a", 1)
    late.add(99, on_device(1))
    assert not late.finish(), "a life that is over does not come back"
    gone = index.begin_snapshot("a", 2)
    gone.add(1, on_device(5))
    index.drop("a")
    assert not gone.finish()
    assert index.workers() == []
    assert len(index) == index._table.num_sets == 0


@given(st.permutations(range(6)), st.booleans())
def test_a_new_life_takes_nothing_of_the_old_with_it(order, in_pieces):
    """Whatever the order of the messages of two lives under one name."""
    index = PrefixIndex()

    def snapshot(epoch: int, seq: int, *numbers: int) -> None:
        if not in_pieces:
            index.load_snapshot("a", epoch, seq, on_device(*numbers))
            return
        load = index.begin_snapshot("a", epoch)
        load.add(seq, on_device(*numbers))
        load.finish()

    messages = [
        lambda: snapshot(1, 5, 1, 2, 3),
        lambda: index.apply(IndexBatch("a", 1, 6, stored=stored(4))),
        lambda: index.apply(IndexBatch("a", 1, 7, stored=stored(1, 2), cleared=True)),
        lambda: snapshot(2, 1, 2),
        lambda: index.apply(IndexBatch("a", 2, 2, stored=stored(1))),
        lambda: index.note_routed("a", 1, [h(1), h(2), h(3)], capacity=10),
    ]
    for number in order:
        messages[number]()
    assert index.position("a", 1) is None
    assert index.hashes("a") == ({h(1), h(2)} if order.index(4) > order.index(3) else {h(2)})
    assert h(3) not in index.hashes("a")
    assert index.match([h(3)]) == {}
    assert index.match([h(4)]) == {}


def test_the_garbage_collector_has_no_business_with_the_blocks():
    """Else it would stop the event loop now and then, to walk through millions of them."""
    index = PrefixIndex()
    for number in range(5):
        index.load_snapshot(f"w{number}", 1, 0, on_device(*range(2000)))
        index.note_routed(f"w{number}", 1, [h(n) for n in range(3000, 3010)], capacity=100)
    sets = index._table.sets
    assert not any(map(gc.is_tracked, index._table.shards))
    assert not any(map(gc.is_tracked, [*sets.held, *sets.device]))
    numbers = {number for shard in index._table.shards for number in shard.values()}
    stored = {id(number) for shard in index._table.shards for number in shard.values()}
    assert len(numbers) == len(stored), "a number is one object, however many blocks refer to it"


def test_shards_that_have_seen_much_come_and_go_are_made_small_again():
    index = PrefixIndex()
    index.load_snapshot("a", 1, 0, [])
    for seq in range(1, 300):
        index.apply(IndexBatch("a", 1, 2 * seq - 1, stored(*range(100 * seq, 100 * seq + 2000))))
        index.apply(IndexBatch("a", 1, 2 * seq, removed=removed(*range(100 * seq))))
    assert index.num_blocks("a") == 2000
    index.load_snapshot("a", 1, 600, on_device(*range(2000)))
    while index.tidy():
        pass

    def size() -> int:
        return sum(map(sys.getsizeof, index._table.shards))

    before = size()
    for _ in range(NUM_SHARDS):
        assert not index.tidy()
    assert size() < before / 2
    assert index.match([h(n) for n in range(50)]) == {"a": CachedPrefix(50)}
    for count in (0, 5, 6, 170, 171, 43_690, 43_691, 80_000):
        assert sys.getsizeof(dict(dict.fromkeys(range(count)))) <= 1.4 * _copy_bytes(count)
