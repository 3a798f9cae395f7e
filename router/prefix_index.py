"""Which worker holds which prefix: the index that routing looks into without asking the network.

Pure Python. One int per block hash, one bit per worker. It is fed by snapshots and by the numbered batches of
DESIGN §7. Between two of them the entry of a worker is exactly what that worker held after batch `seq`, so a lost
batch is always noticed (`apply` answers True) and never guessed over; what to do then, read the snapshot, is
discovery's job.

While Redis is away a replica may note what it routed itself. Those entries are guesses: they are bounded by the
worker's number of blocks, and the next snapshot of that worker wipes them out.

Tiers are not told apart: workers have one (the device).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from workers.protocol.messages import IndexBatch


@dataclass(slots=True)
class _Holder:
    """One life of one worker."""

    bit: int  # 1 << slot
    epoch: int
    seq: int  # number of the last batch that is in `held`
    held: set[bytes] = field(default_factory=set)
    guesses: dict[bytes, None] = field(default_factory=dict)  # oldest first; disjoint from `held`


class PrefixIndex:
    """hash -> workers, keyed by (worker_id, epoch). Memory grows with what the workers hold and with nothing else."""

    def __init__(self) -> None:
        self._masks: dict[bytes, int] = {}
        self._holders: dict[str, _Holder] = {}
        self._names: list[str | None] = []  # slot -> worker_id
        self._present = 0  # bits of all known workers

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
        for block_hash, _ in batch.removed:
            self._remove(holder, block_hash)
        for block_hash, _, _ in batch.stored:
            self._store(holder, block_hash)
        holder.seq = batch.seq
        return False

    def load_snapshot(self, worker_id: str, epoch: int, seq: int, hashes: Iterable[bytes]) -> bool:
        """Replace what is known of a worker. False: it is older than what is known, and was ignored.

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
        for block_hash in hashes:
            self._store(holder, block_hash)
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

    def match(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Blocks of the prefix `hashes` that each worker holds without a break; workers with none are left out."""
        masks = self._masks
        alive = self._present
        found: dict[str, int] = {}
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

    def hashes(self, worker_id: str) -> frozenset[bytes]:
        """What the worker is known to hold, guesses left out."""
        holder = self._holders.get(worker_id)
        return frozenset() if holder is None else frozenset(holder.held)

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

    def _credit(self, found: dict[str, int], bits: int, depth: int) -> None:
        while bits:
            lowest = bits & -bits
            name = self._names[lowest.bit_length() - 1]
            assert name is not None, "a bit without a worker"
            found[name] = depth
            bits ^= lowest

    def _store(self, holder: _Holder, block_hash: bytes) -> None:
        holder.guesses.pop(block_hash, None)
        holder.held.add(block_hash)
        self._masks[block_hash] = self._masks.get(block_hash, 0) | holder.bit

    def _remove(self, holder: _Holder, block_hash: bytes) -> None:
        holder.guesses.pop(block_hash, None)
        holder.held.discard(block_hash)
        self._unset(holder, block_hash)

    def _unset(self, holder: _Holder, block_hash: bytes) -> None:
        mask = self._masks.get(block_hash, 0) & ~holder.bit
        if mask:
            self._masks[block_hash] = mask
        else:
            self._masks.pop(block_hash, None)

    def _forget_all(self, holder: _Holder) -> None:
        for block_hash in holder.held:
            self._unset(holder, block_hash)
        for block_hash in holder.guesses:
            self._unset(holder, block_hash)
        holder.held = set()
        holder.guesses = {}
