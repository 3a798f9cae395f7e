"""Who holds a block: sets of (worker, tier), kept once however many blocks they describe.

Millions of blocks are held by few different sets of workers: most by one worker, a prompt that many share by all of
them. So a block's entry is the number of a set that it shares with others, and whether two blocks are held by the same
workers is a comparison of two numbers. Sets are counted by the blocks that refer to them and forgotten with the last one.

Numbers, not the sets themselves: a dict whose values are ints is no business of the garbage collector, which would
otherwise stop everything to walk through millions of entries. And each number is one int object, which all its blocks
share: the table takes a set's `number` and never makes one.

A worker is a bit, `1 << slot`. A set of tiers is a small int of `ON_DEVICE`, `IN_HOST`, `ON_DISK` and `GUESSED`.
"""

from __future__ import annotations

ON_DEVICE, IN_HOST, ON_DISK, GUESSED = 1, 2, 4, 8


class HolderSet:
    """Immutable but for `refs`, the number of blocks that refer to it."""

    __slots__ = ("device", "disk", "guess", "held", "host", "number", "plain", "refs")

    def __init__(self, number: int, device: int, host: int, disk: int, guess: int) -> None:
        self.number = number
        self.device = device
        self.host = host
        self.disk = disk
        self.guess = guess
        self.plain = not (host or disk or guess)
        self.held = device if self.plain else device | host | disk | guess
        self.refs = 0

    def tiers(self, bit: int) -> int:
        """Where this worker has it; 0: nowhere."""
        if self.plain:
            return ON_DEVICE if self.device & bit else 0
        return (
            (ON_DEVICE if self.device & bit else 0)
            | (IN_HOST if self.host & bit else 0)
            | (ON_DISK if self.disk & bit else 0)
            | (GUESSED if self.guess & bit else 0)
        )

    @property
    def in_host_at_best(self) -> int:
        return self.host & ~self.device

    @property
    def on_disk_at_best(self) -> int:
        return self.disk & ~(self.device | self.host)


Key = int | tuple[int, int, int, int]


class HolderSets:
    """Every set that some block has: `by_number`. Whoever writes a number into the table says so with `take`, and
    `give_back` when it is overwritten.
    """

    def __init__(self) -> None:
        self.by_number: list[HolderSet] = []  # those of free numbers are empty
        self._free: list[int] = []
        self._sets: dict[Key, HolderSet] = {}
        # Neighbours in a prefix change alike: the step that was made last is likely the next one too.
        self._step: tuple[HolderSet | None, int, int] = (None, 0, 0)
        self._step_to: HolderSet | None = None

    def __len__(self) -> int:
        return len(self._sets)

    def changed(self, old: HolderSet | None, bit: int, tiers: int) -> HolderSet:
        """`old` with this worker in exactly these tiers (not none at all: see `without`)."""
        known = self._step_to
        if known is not None and known.refs and (old, bit, tiers) == self._step:
            return known
        device, host, disk, guess = _masks(old, ~bit)
        new = self._get(
            device | bit if tiers & ON_DEVICE else device,
            host | bit if tiers & IN_HOST else host,
            disk | bit if tiers & ON_DISK else disk,
            guess | bit if tiers & GUESSED else guess,
        )
        self._step, self._step_to = (old, bit, tiers), new
        return new

    def without(self, old: HolderSet, bits: int) -> HolderSet | None:
        """`old` without any of these workers; None: nobody is left."""
        if not old.held & ~bits:
            return None
        return self._get(*_masks(old, ~bits))

    def take(self, holders: HolderSet) -> int:
        """The number for one block more."""
        holders.refs += 1
        return holders.number

    def give_back(self, holders: HolderSet) -> None:
        """One block less refers to it."""
        holders.refs -= 1
        if not holders.refs:
            del self._sets[_key(holders.device, holders.host, holders.disk, holders.guess)]
            number = holders.number
            self.by_number[number] = HolderSet(number, 0, 0, 0, 0)
            self._free.append(number)

    def _get(self, device: int, host: int, disk: int, guess: int) -> HolderSet:
        key = _key(device, host, disk, guess)
        holders = self._sets.get(key)
        if holders is None:
            if self._free:
                holders = HolderSet(self._free.pop(), device, host, disk, guess)
                self.by_number[holders.number] = holders
            else:
                holders = HolderSet(len(self.by_number), device, host, disk, guess)
                self.by_number.append(holders)
            self._sets[key] = holders
        return holders


def _masks(holders: HolderSet | None, mask: int) -> tuple[int, int, int, int]:
    if holders is None:
        return 0, 0, 0, 0
    if holders.plain:
        return holders.device & mask, 0, 0, 0
    return holders.device & mask, holders.host & mask, holders.disk & mask, holders.guess & mask


def _key(device: int, host: int, disk: int, guess: int) -> Key:
    return (device, host, disk, guess) if host or disk or guess else device
