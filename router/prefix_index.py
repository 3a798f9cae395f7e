"""Which worker holds which prefix: the index that routing looks into without asking the network.

Pure Python. It is fed by snapshots and by the numbered batches of DESIGN §7. Between two of them the entry of a worker
is exactly what that worker held after batch `seq`, so a lost batch is always noticed (`apply` answers True) and never
guessed over; what to do then, read the snapshot, is the feed's job. One life of a worker is one slot of the table
(router/index/block_table.py): a snapshot is loaded into a new slot and takes the place of the old one in one step,
and what an earlier life held is gone the moment the next one is known.

While Redis is away a replica may note what it routed itself. Those entries are guesses: they are bounded by the
worker's number of blocks, and the next snapshot of that worker wipes them out.

Nothing here takes long but what is told whole: `load_snapshot` with a large list (`begin_snapshot` takes it in pieces)
and `hashes`. What is dropped is taken out by `tidy`, a slice a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple, cast

from router.index.block_table import SLICE_BLOCKS, BlockTable
from router.index.holder_sets import GUESSED, IN_HOST, ON_DEVICE, ON_DISK
from workers.protocol.messages import IndexBatch
from workers.protocol.tiers import DEVICE, DISK, HOST, Removed

_BIT_OF = {DEVICE: ON_DEVICE, HOST: IN_HOST, DISK: ON_DISK}
_FACTS = ON_DEVICE | IN_HOST | ON_DISK
_MAX_LATER = 4096  # batches that may come while a snapshot is read
_MANY = 24  # workers, from which on it pays to unpack all bits together
_DIGITS = bytes(digit == ord("1") for digit in range(256))  # "0" and "1" as false and true


class CachedPrefix(NamedTuple):
    """The unbroken prefix that a worker holds, in blocks, and where the quickest copy of each block is."""

    blocks: int
    host: int = 0  # of these: in host memory at best
    disk: int = 0  # of these: on disk only

    @property
    def device(self) -> int:
        return self.blocks - self.host - self.disk


@dataclass(slots=True)
class _Holder:
    """What is known of one life of one worker, as of one batch."""

    epoch: int
    seq: int  # number of the last batch that is in it
    bit: int  # 1 << slot
    num_held: int = 0
    guesses: dict[bytes, None] = field(default_factory=dict)  # oldest first; none of them is held


class PrefixIndex:
    """hash -> workers, keyed by (worker_id, epoch). Memory grows with what the workers hold and with nothing else."""

    def __init__(self) -> None:
        self._table = BlockTable()
        self._holders: dict[str, _Holder] = {}
        self._names: list[str | None] = []  # slot -> worker_id, where the slot may be found by a look-up
        self._present = 0  # bits of these slots
        self._loads: dict[str, SnapshotLoad] = {}
        # By depth, all on the device: making them anew is what a look-up would feel.
        self._plain = [CachedPrefix(0)]

    # --- feeding it -------------------------------------------------------------------------------------------------

    def apply(self, batch: IndexBatch) -> bool:
        """Take one batch. True: batches are missing before it, read the worker's snapshot.

        Duplicates, batches of other lives and of workers without a snapshot are ignored: they change nothing, and
        whoever learns of a new life loads its snapshot anyway.
        """
        if self._loads and (load := self._loads.get(batch.worker_id)) is not None:
            load.remember(batch)
        holder = self._holders.get(batch.worker_id)
        if holder is None or batch.epoch != holder.epoch or batch.seq <= holder.seq:
            return False
        if batch.cleared:
            self._show(batch.worker_id, self._emptied(holder))  # nor does a gap before it matter
        elif batch.seq != holder.seq + 1:
            return True
        self._change(holder, batch)
        return False

    def load_snapshot(self, worker_id: str, epoch: int, seq: int, held: Iterable[Removed]) -> bool:
        """Replace what is known of a worker by (hash, tier) of all it holds. False: it is older than what is known, and was ignored.

        Unless False is returned the guesses about this worker are gone afterwards.
        """
        known = self._holders.get(worker_id)
        if known is not None and (epoch, seq) < (known.epoch, known.seq):
            return False
        fresh = _Holder(epoch, seq, self._table.new_slot())
        for block_hash, tier in held:
            self._store(fresh, block_hash, tier)
        self._replace(worker_id, fresh)
        return True

    def begin_snapshot(self, worker_id: str, epoch: int) -> SnapshotLoad:
        """The same in pieces, while batches go on coming. Begin before the first piece is read. One at a time for each worker."""
        if (earlier := self._loads.get(worker_id)) is not None:
            earlier.abandon()
        load = self._loads[worker_id] = SnapshotLoad(self, worker_id, epoch)
        return load

    def drop(self, worker_id: str) -> None:
        """The worker is gone, and its blocks with it. Unknown workers are fine."""
        if (load := self._loads.get(worker_id)) is not None:
            load.abandon()
        holder = self._holders.pop(worker_id, None)
        if holder is not None:
            self._hide(holder)
            self._release(holder)

    def note_routed(self, worker_id: str, epoch: int, hashes: Iterable[bytes], capacity: int) -> None:
        """Guess that this life of the worker holds these blocks, because a request was sent there (approximate mode).

        At most `capacity` blocks (the worker's number) are guessed; the oldest guesses make room.
        """
        holder = self._holders.get(worker_id)
        if holder is None or holder.epoch < epoch:
            holder = _Holder(epoch, 0, self._table.new_slot())
            self._replace(worker_id, holder)
        elif epoch < holder.epoch:
            return
        table, guesses = self._table, holder.guesses
        for block_hash in hashes:
            if not table.tiers(block_hash, holder.bit) & _FACTS:
                guesses.pop(block_hash, None)
                guesses[block_hash] = None
                table.put(block_hash, holder.bit, GUESSED)
                if len(guesses) > capacity:
                    oldest = next(iter(guesses))
                    del guesses[oldest]
                    table.take(oldest, holder.bit, GUESSED)

    def tidy(self, budget: int = SLICE_BLOCKS) -> bool:
        """Take a slice, about `budget` blocks, of the work that drops and snapshots left behind. True: there is more."""
        return self._table.tidy(budget)

    # --- asking it --------------------------------------------------------------------------------------------------

    def match(self, hashes: Sequence[bytes]) -> dict[str, CachedPrefix]:
        """The part of the prefix `hashes` that each worker holds without a break; workers with none are left out."""
        found: dict[str, CachedPrefix] = {}
        shards, sets = self._table.shards, self._table.sets
        held = sets.held
        last = shards[hashes[0][0]].get(hashes[0]) if hashes else None
        if last is None:
            return found
        alive = self._present & held[last]
        if not alive:
            return found
        depth = 0
        try:
            for depth, block_hash in enumerate(hashes):
                number = shards[block_hash[0]][block_hash]
                if number is last:
                    continue
                last = number
                now = alive & held[number]
                if now != alive:
                    self._credit(found, alive ^ now, depth)
                    alive = now
                    if not alive:
                        break
            else:
                depth = len(hashes)
        except KeyError:  # nobody has this block
            pass
        if alive:
            self._credit(found, alive, depth)
        if sets.num_other and found:
            self._count_lower(found, hashes[:depth])
        return found

    def _count_lower(self, found: dict[str, CachedPrefix], hashes: Sequence[bytes]) -> None:
        """How much of what was found is not on the device. A second look, where any worker has a slower tier."""
        shards, sets, present = self._table.shards, self._table.sets, self._present
        runs: list[tuple[int, int]] = []  # where they begin, number of the set
        for depth, block_hash in enumerate(hashes):
            number = shards[block_hash[0]][block_hash]
            if not runs or number != runs[-1][1]:
                runs.append((depth, number))
        host = _edges([(depth, sets.in_host_at_best(number) & present) for depth, number in runs])
        disk = _edges([(depth, sets.on_disk_at_best(number) & present) for depth, number in runs])
        for bit in host.keys() | disk.keys():
            name = self._names[bit.bit_length() - 1]
            if name in found:
                prefix = found[name].blocks
                found[name] = CachedPrefix(
                    prefix, _within(host.get(bit), prefix), _within(disk.get(bit), prefix)
                )

    def position(self, worker_id: str, epoch: int) -> int | None:
        """Number of the last batch known of this life; None: its snapshot has not been loaded."""
        holder = self._holders.get(worker_id)
        return holder.seq if holder is not None and holder.epoch == epoch else None

    def num_blocks(self, worker_id: str) -> int:
        """Blocks known or guessed to be on the worker."""
        holder = self._holders.get(worker_id)
        return 0 if holder is None else holder.num_held + len(holder.guesses)

    def num_guesses(self, worker_id: str) -> int:
        holder = self._holders.get(worker_id)
        return 0 if holder is None else len(holder.guesses)

    def hashes(self, worker_id: str, tier: str | None = None) -> frozenset[bytes]:
        """What the worker is known to hold (in this tier), guesses left out. Looks at every block there is."""
        holder = self._holders.get(worker_id)
        if holder is None:
            return frozenset()
        tiers = _FACTS if tier is None else _tier_bit(tier)
        return frozenset(self._table.held_by(holder.bit, tiers))

    def workers(self) -> list[str]:
        return list(self._holders)

    def __len__(self) -> int:
        """Distinct hashes; those of workers that are gone count until `tidy` has taken them out."""
        return len(self._table)

    # --- holders and their slots ------------------------------------------------------------------------------------

    def _replace(self, worker_id: str, fresh: _Holder) -> None:
        """From now on this is what is known of the worker."""
        known = self._holders.get(worker_id)
        self._holders[worker_id] = fresh
        if known is not None:
            self._hide(known)
        self._show(worker_id, fresh)
        if known is not None:
            self._release(known)

    def _emptied(self, holder: _Holder) -> _Holder:
        """The same life with nothing in it."""
        if holder.num_held or holder.guesses:
            self._hide(holder)
            self._table.retire_slot(holder.bit)
            holder.bit = self._table.new_slot()
            holder.num_held = 0
            holder.guesses = {}
        return holder

    def _show(self, worker_id: str, holder: _Holder) -> None:
        slot = holder.bit.bit_length() - 1
        while len(self._names) <= slot:
            self._names.append(None)
        self._names[slot] = worker_id
        self._present |= holder.bit

    def _hide(self, holder: _Holder) -> None:
        if self._present & holder.bit:
            self._names[holder.bit.bit_length() - 1] = None
            self._present ^= holder.bit

    def _release(self, holder: _Holder) -> None:
        if holder.num_held or holder.guesses:
            self._table.retire_slot(holder.bit)
        else:
            self._table.free_slot(holder.bit)

    # --- blocks -----------------------------------------------------------------------------------------------------

    def _change(self, holder: _Holder, batch: IndexBatch) -> None:
        for block_hash, tier in batch.removed:
            before, after = self._table.take(block_hash, holder.bit, _tier_bit(tier))
            if before & GUESSED:
                del holder.guesses[block_hash]
            elif before and not after:
                holder.num_held -= 1
        for block_hash, _, tier in batch.stored:
            self._store(holder, block_hash, tier)
        holder.seq = batch.seq

    def _store(self, holder: _Holder, block_hash: bytes, tier: str) -> None:
        before = self._table.put(block_hash, holder.bit, _BIT_OF.get(tier, ON_DISK))
        if before & GUESSED:
            del holder.guesses[block_hash]
            holder.num_held += 1
        elif not before:
            holder.num_held += 1

    def _credit(self, found: dict[str, CachedPrefix], bits: int, depth: int) -> None:
        try:
            prefix = self._plain[depth]
        except IndexError:
            self._plain += map(CachedPrefix, range(len(self._plain), depth + 1))
            prefix = self._plain[depth]
        names = self._names
        if not bits & (bits - 1):
            found[cast(str, names[bits.bit_length() - 1])] = prefix
            return
        if bits.bit_count() > _MANY:  # all at once, by C
            chosen = compress(names, bin(bits)[:1:-1].encode().translate(_DIGITS))
            found.update(dict.fromkeys(cast(Iterable[str], chosen), prefix))
            return
        while bits:
            slot = bits.bit_length() - 1
            name = names[slot]
            assert name is not None, "a bit without a worker"
            found[name] = prefix
            bits ^= 1 << slot


class SnapshotLoad:
    """A snapshot on its way in. Look-ups see what was known before, until `finish`.

    The pieces need not be of one moment: `seq` of the first one says where the log has to be replayed from, and what was
    stored or removed while the others were read is in the batches after it. They are kept here as they come, and make
    the whole exact.
    """

    def __init__(self, index: PrefixIndex, worker_id: str, epoch: int) -> None:
        self._index = index
        self._worker_id = worker_id
        self._holder: _Holder | None = None
        self._epoch = epoch
        self._read_at = 0  # number of the last batch that a piece can show
        self._later: list[IndexBatch] = []
        self.over = False  # finished or abandoned

    def add(self, seq: int, held: Iterable[Removed]) -> None:
        """One piece; `seq`: number of the last batch when it was read."""
        if self.over:
            return
        if self._holder is None:
            self._holder = _Holder(self._epoch, seq, self._index._table.new_slot())
        self._read_at = max(self._read_at, seq)
        for block_hash, tier in held:
            self._index._store(self._holder, block_hash, tier)

    def remember(self, batch: IndexBatch) -> None:
        if batch.epoch == self._epoch:
            self._later.append(batch)
            if len(self._later) > _MAX_LATER:  # the log runs faster than we read: try again another time
                self.abandon()

    def replay(self, limit: int = 4) -> bool:
        """Once all pieces are in: take up to `limit` of the batches that came meanwhile. True: there are more."""
        for batch in self._later[:limit]:
            self._take(batch)
        del self._later[:limit]
        return bool(self._later) and not self.over

    @property
    def behind(self) -> bool:
        """Batches up to the moment of the last piece have not been taken; once over, for ever."""
        return self.over or self._holder is None or self._holder.seq < self._read_at

    def finish(self) -> bool:
        """Put it in place of what was known. False: it is of no use, and forgotten.

        That is when batches are missing, up to the moment of the last piece (`behind` tells whether they may still
        come), or when newer things are known already.
        """
        while self.replay():
            pass
        fresh = self._holder
        if fresh is None or self.behind:
            self.abandon()
            return False
        known = self._index._holders.get(self._worker_id)
        if known is not None and (fresh.epoch, fresh.seq) < (known.epoch, known.seq):
            self.abandon()
            return False
        self._end()
        self._index._replace(self._worker_id, fresh)
        return True

    def abandon(self) -> None:
        """Forget it. Idempotent."""
        if self.over:
            return
        self._end()
        if self._holder is not None:
            self._index._release(self._holder)
            self._holder = None

    def _take(self, batch: IndexBatch) -> None:
        holder = self._holder
        if self.over or holder is None or batch.seq <= holder.seq:
            return
        if batch.cleared:
            self._index._emptied(holder)
        elif batch.seq != holder.seq + 1:
            self.abandon()
            return
        self._index._change(holder, batch)

    def _end(self) -> None:
        self.over = True
        self._later = []
        if self._index._loads.get(self._worker_id) is self:
            del self._index._loads[self._worker_id]


def _tier_bit(tier: str) -> int:
    """A tier that this version does not know counts as the slowest."""
    return _BIT_OF.get(tier, ON_DISK)


def _edges(masks: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """For each bit that is set somewhere: where runs of it begin, end, begin, ..."""
    edges: dict[int, list[int]] = {}
    before = 0
    for depth, now in masks:
        changed = now ^ before
        while changed:
            lowest = changed & -changed
            edges.setdefault(lowest, []).append(depth)
            changed ^= lowest
        before = now
    return edges


def _within(edges: list[int] | None, depth: int) -> int:
    """Blocks before `depth` in runs that begin and end at these places; the last run may have no end."""
    if edges is None:
        return 0
    ends = [min(edge, depth) for edge in edges]
    if len(ends) % 2:
        ends.append(depth)
    return sum(ends[1::2]) - sum(ends[::2])
