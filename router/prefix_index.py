"""Which worker holds which prefix: the index that routing looks into without asking the network.

Pure Python. One int per block hash, one bit per worker: who holds it, in whatever tier. Two more such maps name those
whose quickest copy of a hash is in host memory or on disk; they are empty where workers have one tier, and then cost a
look-up nothing. The index is fed by snapshots and by the numbered batches of
DESIGN §7. Between two of them the entry of a worker is exactly what that worker held after batch `seq`, so a lost
batch is always noticed (`apply` answers True) and never guessed over; what to do then, read the snapshot, is
discovery's job.

While Redis is away a replica may note what it routed itself. Those entries are guesses: they are bounded by the
worker's number of blocks, and the next snapshot of that worker wipes them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from workers.protocol.messages import IndexBatch
from workers.protocol.tiers import DEVICE, DISK, HOST, Removed

_ON_DEVICE, _IN_HOST, _ON_DISK = 1, 2, 4
_BIT_OF = {DEVICE: _ON_DEVICE, HOST: _IN_HOST, DISK: _ON_DISK}


def _tier_bit(tier: str) -> int:
    """A tier that this version does not know counts as the slowest."""
    return _BIT_OF.get(tier, _ON_DISK)


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
    """One life of one worker."""

    bit: int  # 1 << slot
    epoch: int
    seq: int  # number of the last batch that is in `held`
    held: dict[bytes, int] = field(default_factory=dict)  # hash -> tiers, as bits
    guesses: dict[bytes, None] = field(default_factory=dict)  # oldest first; disjoint from `held`


class PrefixIndex:
    """hash -> workers, keyed by (worker_id, epoch). Memory grows with what the workers hold and with nothing else."""

    def __init__(self) -> None:
        self._masks: dict[bytes, int] = {}
        self._host_masks: dict[
            bytes, int
        ] = {}  # whose quickest copy is in host memory; disjoint from the next
        self._disk_masks: dict[bytes, int] = {}  # who has it on disk only
        self._holders: dict[str, _Holder] = {}
        self._names: list[str | None] = []  # slot -> worker_id
        self._present = 0  # bits of all known workers
        self._plain = [
            CachedPrefix(0)
        ]  # by depth, all on the device: making them anew is what a look-up would feel

    # --- feeding it -------------------------------------------------------------------------------------------------

    def apply(self, batch: IndexBatch) -> bool:
        """Take one batch. True: batches are missing before it, read the worker's snapshot.

        Duplicates, batches of other lives and of workers without a snapshot are ignored: they change nothing, and
        whoever learns of a new life loads its snapshot anyway.
        """
        holder = self._holders.get(batch.worker_id)
        if holder is None or batch.epoch != holder.epoch or batch.seq <= holder.seq:
            return False
        if batch.cleared:
            self._forget_all(holder)  # what came before does not matter any more, nor does a gap
        elif batch.seq != holder.seq + 1:
            return True
        for block_hash, tier in batch.removed:
            self._remove(holder, block_hash, _tier_bit(tier))
        for block_hash, _, tier in batch.stored:
            self._store(holder, block_hash, _tier_bit(tier))
        holder.seq = batch.seq
        return False

    def load_snapshot(self, worker_id: str, epoch: int, seq: int, held: Iterable[Removed]) -> bool:
        """Replace what is known of a worker by (hash, tier) of all it holds. False: it is older than what is known, and was ignored.

        Unless False is returned the guesses about this worker are gone afterwards.
        """
        holder = self._holders.get(worker_id)
        if holder is not None:
            if (epoch, seq) < (holder.epoch, holder.seq):
                return False
            self._forget_all(holder)
            holder.epoch, holder.seq = epoch, seq
        else:
            holder = self._add(worker_id, epoch, seq)
        for block_hash, tier in held:
            self._store(holder, block_hash, _tier_bit(tier))
        return True

    def drop(self, worker_id: str) -> None:
        """The worker is gone, and its blocks with it. Unknown workers are fine."""
        holder = self._holders.pop(worker_id, None)
        if holder is None:
            return
        self._forget_all(holder)
        self._names[holder.bit.bit_length() - 1] = None
        self._present &= ~holder.bit

    def note_routed(self, worker_id: str, epoch: int, hashes: Iterable[bytes], capacity: int) -> None:
        """Guess that this life of the worker holds these blocks, because a request was sent there (approximate mode).

        At most `capacity` blocks (the worker's number) are guessed; the oldest guesses make room.
        """
        holder = self._holders.get(worker_id)
        if holder is None:
            holder = self._add(worker_id, epoch, seq=0)
        elif holder.epoch != epoch:
            if epoch < holder.epoch:
                return
            self._forget_all(holder)
            holder.epoch, holder.seq = epoch, 0
        for block_hash in hashes:
            if block_hash not in holder.held:
                holder.guesses.pop(block_hash, None)
                holder.guesses[block_hash] = None
                self._masks[block_hash] = self._masks.get(block_hash, 0) | holder.bit
        while len(holder.guesses) > capacity:
            oldest = next(iter(holder.guesses))
            del holder.guesses[oldest]
            self._unset(holder, oldest)

    # --- asking it --------------------------------------------------------------------------------------------------

    def match(self, hashes: Sequence[bytes]) -> dict[str, CachedPrefix]:
        """The part of the prefix `hashes` that each worker holds without a break; workers with none are left out."""
        found = self._depths(hashes)
        if found and (self._host_masks or self._disk_masks):
            self._count_lower(found, hashes)
        return found

    def _depths(self, hashes: Sequence[bytes]) -> dict[str, CachedPrefix]:
        masks = self._masks
        alive = self._present
        found: dict[str, CachedPrefix] = {}
        for depth, block_hash in enumerate(hashes):
            now = alive & masks.get(block_hash, 0)
            if now == alive:
                continue
            if depth:
                self._credit(found, alive & ~now, depth)
            alive = now
            if not alive:
                return found
        if hashes:
            self._credit(found, alive, len(hashes))
        return found

    def _count_lower(self, found: dict[str, CachedPrefix], hashes: Sequence[bytes]) -> None:
        """How much of what was found is not on the device. Costs something where a run of such blocks begins or ends."""
        host, disk = self._runs(self._host_masks, hashes), self._runs(self._disk_masks, hashes)
        for bit in host | disk:
            name = self._names[bit.bit_length() - 1]
            if name in found:
                depth = found[name].blocks
                found[name] = CachedPrefix(
                    depth, _within(host.get(bit), depth), _within(disk.get(bit), depth)
                )

    @staticmethod
    def _runs(masks: dict[bytes, int], hashes: Sequence[bytes]) -> dict[int, list[int]]:
        """For each worker's bit that is set somewhere: where runs of it begin, end, begin, ..."""
        edges: dict[int, list[int]] = {}
        if not masks:
            return edges
        before = 0
        for depth, block_hash in enumerate(hashes):
            now = masks.get(block_hash, 0)
            changed = now ^ before
            while changed:
                lowest = changed & -changed
                edges.setdefault(lowest, []).append(depth)
                changed ^= lowest
            before = now
        return edges

    def position(self, worker_id: str, epoch: int) -> int | None:
        """Number of the last batch known of this life; None: its snapshot has not been loaded."""
        holder = self._holders.get(worker_id)
        return holder.seq if holder is not None and holder.epoch == epoch else None

    def num_blocks(self, worker_id: str) -> int:
        """Blocks known or guessed to be on the worker."""
        holder = self._holders.get(worker_id)
        return 0 if holder is None else len(holder.held) + len(holder.guesses)

    def num_guesses(self, worker_id: str) -> int:
        holder = self._holders.get(worker_id)
        return 0 if holder is None else len(holder.guesses)

    def hashes(self, worker_id: str, tier: str | None = None) -> frozenset[bytes]:
        """What the worker is known to hold (in this tier), guesses left out."""
        holder = self._holders.get(worker_id)
        if holder is None:
            return frozenset()
        if tier is None:
            return frozenset(holder.held)
        bit = _tier_bit(tier)
        return frozenset(block_hash for block_hash, tiers in holder.held.items() if tiers & bit)

    def workers(self) -> list[str]:
        return list(self._holders)

    def __len__(self) -> int:
        """Distinct hashes."""
        return len(self._masks)

    # --- bits -------------------------------------------------------------------------------------------------------

    def _add(self, worker_id: str, epoch: int, seq: int) -> _Holder:
        try:
            slot = self._names.index(None)
            self._names[slot] = worker_id
        except ValueError:
            slot = len(self._names)
            self._names.append(worker_id)
        holder = _Holder(bit=1 << slot, epoch=epoch, seq=seq)
        self._holders[worker_id] = holder
        self._present |= holder.bit
        return holder

    def _credit(self, found: dict[str, CachedPrefix], bits: int, depth: int) -> None:
        plain = self._plain
        while len(plain) <= depth:
            plain.append(CachedPrefix(len(plain)))
        prefix = plain[depth]
        while bits:
            lowest = bits & -bits
            name = self._names[lowest.bit_length() - 1]
            assert name is not None, "a bit without a worker"
            found[name] = prefix
            bits ^= lowest

    def _store(self, holder: _Holder, block_hash: bytes, tier: int) -> None:
        holder.guesses.pop(block_hash, None)
        tiers = holder.held[block_hash] = holder.held.get(block_hash, 0) | tier
        self._masks[block_hash] = self._masks.get(block_hash, 0) | holder.bit
        self._set_lower(holder, block_hash, tiers)

    def _remove(self, holder: _Holder, block_hash: bytes, tier: int) -> None:
        guessed = block_hash in holder.guesses
        if guessed:
            del holder.guesses[block_hash]
        tiers = holder.held.get(block_hash, 0) & ~tier
        if tiers:
            holder.held[block_hash] = tiers
            self._set_lower(holder, block_hash, tiers)
        elif guessed or holder.held.pop(block_hash, None) is not None:
            self._unset(holder, block_hash)

    def _set_lower(self, holder: _Holder, block_hash: bytes, tiers: int) -> None:
        """Bring the maps of the lower tiers up to date with the tiers that hold the hash."""
        in_host = not tiers & _ON_DEVICE and tiers & _IN_HOST
        on_disk = not tiers & (_ON_DEVICE | _IN_HOST) and tiers & _ON_DISK
        for masks, is_best in ((self._host_masks, in_host), (self._disk_masks, on_disk)):
            if is_best:
                masks[block_hash] = masks.get(block_hash, 0) | holder.bit
            elif masks:
                _clear(masks, block_hash, holder.bit)

    def _unset(self, holder: _Holder, block_hash: bytes) -> None:
        for masks in (self._masks, self._host_masks, self._disk_masks):
            _clear(masks, block_hash, holder.bit)

    def _forget_all(self, holder: _Holder) -> None:
        for block_hash in holder.held:
            self._unset(holder, block_hash)
        for block_hash in holder.guesses:
            self._unset(holder, block_hash)
        holder.held = {}
        holder.guesses = {}


def _clear(masks: dict[bytes, int], block_hash: bytes, bit: int) -> None:
    mask = masks.get(block_hash, 0)
    if mask == bit:
        del masks[block_hash]
    elif mask & bit:
        masks[block_hash] = mask & ~bit


def _within(edges: list[int] | None, depth: int) -> int:
    """Blocks before `depth` in runs that begin and end at these places; the last run may have no end."""
    if edges is None:
        return 0
    ends = [min(edge, depth) for edge in edges]
    if len(ends) % 2:
        ends.append(depth)
    return sum(ends[1::2]) - sum(ends[::2])
