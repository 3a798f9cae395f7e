"""KV blocks: who uses them, which prefix they hold, which may be taken next.

Pure Python. The pool knows block ids and hashes, not tensors.

A block is in exactly one of three states:

* referenced: in the block table of at least one request;
* cached: no references, but it holds a hash, so a later prompt can take it back; it is evicted when room is needed;
* empty: no references and no hash.

Cached and empty blocks form the free list, in the order in which they are taken: empty ones first, then the least
recently used. Requests give their blocks back from the last to the first, so of a chain of cached blocks the leaf is
evicted before its parent. Two requests that compute the same prefix at the same time own two blocks with one hash;
block tables are append-only, so both stay, and the hash lives until the last of them is evicted. Together these keep
the set of cached hashes *prefix-closed*: whenever a hash is held, so is its parent. The router's index rests on that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Evicted = tuple[int, bytes, bytes]  # (block, hash, parent hash)


@dataclass(slots=True)
class CacheEvents:
    """Hashes that came to be held, and ceased to be held, since the last drain; in this order they are consistent."""

    removed: list[bytes]
    stored: list[tuple[bytes, bytes]]  # (hash, parent hash)


class BlockPool:
    def __init__(self, num_blocks: int, *, caching: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self._caching = caching
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._parent_of: dict[bytes, bytes] = {}
        self._holders: dict[bytes, dict[int, None]] = {}  # hash -> blocks, oldest first
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._stored: dict[bytes, bytes] = {}
        self._removed: dict[bytes, None] = {}
        # Called by `allocate` with what it is about to forget for good, least recently used first and leaves before
        # their parents, while the blocks still hold their content. Must not call the pool.
        self.on_evict: Callable[[list[Evicted]], None] | None = None

    # --- what there is ----------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Blocks without references, cached ones included."""
        return len(self._free)

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Distinct hashes held, by referenced and by free blocks."""
        return len(self._holders)

    def cached_hashes(self) -> list[tuple[bytes, bytes]]:
        """(hash, parent hash) of everything held: the snapshot for the index."""
        return [(block_hash, self._parent_of[block_hash]) for block_hash in self._holders]

    def cached_blocks(self) -> list[Evicted]:
        """One block for each hash that is held: what `on_evict` would be told if all of them went."""
        return [(next(iter(blocks)), h, self._parent_of[h]) for h, blocks in self._holders.items()]

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest held prefix of `hashes`. Takes no reference: see `acquire`."""
        if not self._caching:
            return []
        blocks = []
        for block_hash in hashes:
            holders = self._holders.get(block_hash)
            if holders is None:
                break
            blocks.append(next(iter(holders)))
        return blocks

    def num_available(self, matched: Sequence[int]) -> int:
        """Free blocks that would be left after taking a reference on `matched`."""
        return len(self._free) - sum(1 for block in matched if self._references[block] == 0)

    # --- taking and giving back -------------------------------------------------------------------------------------

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference on blocks found by `match`."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each and undefined content; None, and nothing changes, without room."""
        if count > len(self._free):
            return None
        blocks = []
        evicted: list[Evicted] = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            lost = self._forget_hash(block)
            if lost is not None:
                evicted.append((block, *lost))
            self._references[block] = 1
            blocks.append(block)
        if evicted and self.on_evict is not None:
            self.on_evict(evicted)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference on each block of a block table (given in table order)."""
        for block in reversed(blocks):
            if self._references[block] <= 0:
                raise RuntimeError(f"block {block} released without a reference")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    # --- the prefix cache -------------------------------------------------------------------------------------------

    def store(self, block: int, block_hash: bytes, parent: bytes) -> None:
        """A referenced block is now full and its content is computed: let later prompts find it."""
        if not self._caching or self._hash_of[block] == block_hash:
            return
        if self._references[block] <= 0:
            raise RuntimeError(f"block {block} stored without a reference")
        if self._hash_of[block] is not None:
            raise RuntimeError(f"block {block} holds another hash already")
        self._hash_of[block] = block_hash
        holders = self._holders.get(block_hash)
        if holders is not None:
            holders[block] = None
            return
        self._holders[block_hash] = {block: None}
        self._parent_of[block_hash] = parent
        if block_hash in self._removed:
            del self._removed[block_hash]
        else:
            self._stored[block_hash] = parent

    def _forget_hash(self, block: int) -> tuple[bytes, bytes] | None:
        """(hash, parent) when nobody else holds that hash: it is gone."""
        block_hash = self._hash_of[block]
        if block_hash is None:
            return None
        self._hash_of[block] = None
        holders = self._holders[block_hash]
        del holders[block]
        if holders:
            return None
        del self._holders[block_hash]
        parent = self._parent_of.pop(block_hash)
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._removed[block_hash] = None
        return block_hash, parent

    def clear_cache(self) -> None:
        """Forget every hash. References stay."""
        for block in range(self.num_blocks):
            self._forget_hash(block)

    def drain_events(self) -> CacheEvents | None:
        """What changed since the last call, None if nothing did. Apply `removed` first, then `stored`."""
        if not self._stored and not self._removed:
            return None
        events = CacheEvents(removed=list(self._removed), stored=list(self._stored.items()))
        self._stored.clear()
        self._removed.clear()
        return events

    # --- invariants -------------------------------------------------------------------------------------------------

    def check(self, tables: Iterable[Sequence[int]] = ()) -> None:
        """Raise AssertionError unless every count agrees; `tables` are all block tables that hold references."""
        expected = [0] * self.num_blocks
        for table in tables:
            for block in table:
                expected[block] += 1
        assert expected == self._references, "reference counts differ from the block tables"
        for block, references in enumerate(self._references):
            assert (references == 0) == (block in self._free), f"block {block}: free list and count disagree"
        held: dict[bytes, set[int]] = {}
        for block, block_hash in enumerate(self._hash_of):
            if block_hash is not None:
                held.setdefault(block_hash, set()).add(block)
        assert held == {block_hash: set(blocks) for block_hash, blocks in self._holders.items()}
        assert set(self._parent_of) == set(self._holders)
