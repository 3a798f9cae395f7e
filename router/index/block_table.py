"""hash -> who holds it, for tens of millions of blocks, in steps that are never long.

The table is 256 dicts, chosen by the first byte of the hash: a dict that grows is copied as a whole, and one of eleven
million entries would stop the event loop for half a second. In a shard it is a few milliseconds.

A worker that goes does not take its blocks out one by one. Its slot is retired: whoever asks masks it out, and a sweep
through the shards, a slice at a time, takes it out of the sets. Its number is given to another worker only after that.

Measured beside it (CPython 3.11, 64 hashes looked up, bytes an entry): these dicts 1.4 us, 99; one with a mask for each
block and a dict of its blocks for each worker 2.4 times the memory; keys as ints 5.3 us, 16 less; a table in numpy, its
first probe alone, 6.8 us, 42; buckets of packed keys, searched with `find`, 67 us, 30.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from router.index.holder_sets import GUESSED, HolderSets

NUM_SHARDS = 256
SLICE_BLOCKS = 2048  # about a millisecond
_WASTE = 1.4  # a shard that takes so many times what its copy would take is copied


class BlockTable:
    def __init__(self) -> None:
        self.sets = HolderSets()
        self.shards: list[dict[bytes, int]] = [
            {} for _ in range(NUM_SHARDS)
        ]  # hash -> number of a holder set
        self._num_slots = 0
        self._free: list[int] = []  # bits
        self._retired = 0  # bits that wait for the next sweep
        self._sweep: Iterator[int] | None = None
        self._next_shard = 0  # to look at for wasted memory

    def __len__(self) -> int:
        """Distinct hashes, those of retired slots included until they are swept."""
        return sum(map(len, self.shards))

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def num_sets(self) -> int:
        return len(self.sets)

    # --- one block of one worker ------------------------------------------------------------------------------------

    def put(self, block_hash: bytes, bit: int, tier: int) -> int:
        """The worker has it in this tier (too). Answers the tiers it had it in before; a guess is replaced by the fact."""
        shard, sets = self.shards[block_hash[0]], self.sets
        old = shard.get(block_hash)
        if old is None:
            shard[block_hash] = sets.take(sets.changed(None, bit, tier))
            return 0
        before = sets.tiers(old, bit)
        if before & tier:
            return before
        after = tier if tier == GUESSED else (before & ~GUESSED) | tier
        shard[block_hash] = sets.take(sets.changed(old, bit, after))
        sets.give_back(old)
        return before

    def take(self, block_hash: bytes, bit: int, tier: int) -> tuple[int, int]:
        """The worker has it in this tier no more. Answers the tiers before and after; a guess goes in any case."""
        shard, sets = self.shards[block_hash[0]], self.sets
        old = shard.get(block_hash)
        if old is None:
            return 0, 0
        before = sets.tiers(old, bit)
        after = before & ~(tier | GUESSED)
        if after != before:
            new = sets.changed(old, bit, after) if after else sets.without(old, bit)
            if new is None:
                del shard[block_hash]
            else:
                shard[block_hash] = sets.take(new)
            sets.give_back(old)
        return before, after

    def tiers(self, block_hash: bytes, bit: int) -> int:
        """Where the worker has it; 0: nowhere."""
        number = self.shards[block_hash[0]].get(block_hash)
        return 0 if number is None else self.sets.tiers(number, bit)

    def held_by(self, bit: int, tiers: int) -> Iterator[bytes]:
        """Looks at every block: for tests and the curious."""
        for shard in self.shards:
            for block_hash, number in shard.items():
                if self.sets.tiers(number, bit) & tiers:
                    yield block_hash

    # --- slots ------------------------------------------------------------------------------------------------------

    def new_slot(self) -> int:
        """A bit that no set has."""
        if self._free:
            bit = min(self._free)  # small numbers make small masks
            self._free.remove(bit)
            return bit
        self._num_slots += 1
        return 1 << (self._num_slots - 1)

    def free_slot(self, bit: int) -> None:
        """Give back one that no set has."""
        self._free.append(bit)

    def retire_slot(self, bit: int) -> None:
        """Nobody asks for it any more. A slice of the sweep is done at once, and with it all of a small table."""
        self._retired |= bit
        self.tidy()

    def tidy(self, budget: int = SLICE_BLOCKS) -> bool:
        """Sweep about `budget` blocks. True: there is more to sweep."""
        while budget > 0:
            if self._sweep is None:
                if not self._retired:
                    self._shrink_one()
                    return False
                self._sweep = self._sweep_all(self._retired)
                self._retired = 0
            looked_at = next(self._sweep, None)
            if looked_at is None:
                self._sweep = None
            else:
                budget -= looked_at
        return self._sweep is not None or bool(self._retired)

    def _sweep_all(self, retired: int) -> Iterator[int]:
        """Take these bits out of every set. Between two steps the table may change, but never gains one of them."""
        sets, held = self.sets, self.sets.held
        for place in range(NUM_SHARDS):
            keys = list(self.shards[place])
            for start in range(0, len(keys), SLICE_BLOCKS):
                shard = self.shards[place]
                slice_ = keys[start : start + SLICE_BLOCKS]
                for block_hash in slice_:
                    old = shard.get(block_hash)
                    if old is None or not held[old] & retired:
                        continue
                    new = sets.without(old, retired)
                    if new is None:
                        del shard[block_hash]
                    else:
                        shard[block_hash] = sets.take(new)
                    sets.give_back(old)
                yield len(slice_)
        while retired:
            lowest = retired & -retired
            self._free.append(lowest)
            retired ^= lowest

    def _shrink_one(self) -> None:
        """A dict that has seen much come and go is up to three times as large as its copy."""
        shard = self.shards[self._next_shard]
        if sys.getsizeof(shard) > _WASTE * _copy_bytes(len(shard)):
            self.shards[self._next_shard] = dict(shard)
        self._next_shard = (self._next_shard + 1) % NUM_SHARDS


def _copy_bytes(count: int) -> int:
    """What CPython takes for a fresh dict of so many: a power of two that is filled to two thirds at most."""
    size = max(8, 1 << (count * 3 // 2).bit_length())
    index_bytes = 1 if size <= 256 else 2 if size <= 65_536 else 4
    return 64 + size * index_bytes + size * 2 // 3 * 24
