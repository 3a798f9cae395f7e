"""Who holds a block: sets of (worker, tier), kept once however many blocks they describe.

Millions of blocks are held by few different sets of workers: most by one worker, a prompt that many share by all of
them. So a block's entry is the number of a set that it shares with others, and whether two blocks are held by the same
workers is a comparison of two numbers. Sets are counted by the blocks that refer to them and forgotten with the last one.

Numbers and lists of ints, not objects: the garbage collector stops everything to walk through objects, and through dicts
that refer to them, but ints are no business of its. Each number is one int object, which all its blocks share: the table
stores the numbers that it gets here and never makes one.

A worker is a bit, `1 << slot`. A set of tiers is a small int of `ON_DEVICE`, `IN_HOST`, `ON_DISK` and `GUESSED`.
"""

from __future__ import annotations

ON_DEVICE, IN_HOST, ON_DISK, GUESSED = 1, 2, 4, 8

Masks = tuple[
    int, int, int, int
]  # who has it on the device, in host memory, on disk, and who is guessed to have it


class HolderSets:
    """Every set that some block has. Whoever writes a number into the table says so with `take`, and `give_back` when it
    is overwritten.

    `held` and the lists after it are by number: bits of workers.
    """

    def __init__(self) -> None:
        self.held: list[int] = []  # in whatever tier
        self.other: list[int] = []  # in host memory, on disk or by guess, maybe besides; 0 nearly everywhere
        self.device: list[int] = []
        self.host: list[int] = []
        self.disk: list[int] = []
        self.guess: list[int] = []
        self.num_other = 0  # sets with any of those
        self._refs: list[int] = []
        self._free: list[int] = []
        self._numbers: dict[int | Masks, int] = {}
        # Neighbours in a prefix change alike: the step that was made last is likely the next one too.
        self._step: tuple[int | None, int, int] = (None, 0, 0)
        self._step_to = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def tiers(self, number: int, bit: int) -> int:
        """Where this worker has it; 0: nowhere."""
        device = self.device[number]
        if not self.other[number]:
            return ON_DEVICE if device & bit else 0
        return (
            (ON_DEVICE if device & bit else 0)
            | (IN_HOST if self.host[number] & bit else 0)
            | (ON_DISK if self.disk[number] & bit else 0)
            | (GUESSED if self.guess[number] & bit else 0)
        )

    def in_host_at_best(self, number: int) -> int:
        return self.host[number] & ~self.device[number]

    def on_disk_at_best(self, number: int) -> int:
        return self.disk[number] & ~(self.device[number] | self.host[number])

    def changed(self, old: int | None, bit: int, tiers: int) -> int:
        """`old` with this worker in exactly these tiers (not none at all: see `without`)."""
        step = (old, bit, tiers)
        if step == self._step:
            return self._step_to
        device, host, disk, guess = self._masks(old, ~bit)
        number = self._number(
            device | bit if tiers & ON_DEVICE else device,
            host | bit if tiers & IN_HOST else host,
            disk | bit if tiers & ON_DISK else disk,
            guess | bit if tiers & GUESSED else guess,
        )
        self._step, self._step_to = step, number
        return number

    def without(self, old: int, bits: int) -> int | None:
        """`old` without any of these workers; None: nobody is left."""
        if not self.held[old] & ~bits:
            return None
        return self._number(*self._masks(old, ~bits))

    def take(self, number: int) -> int:
        """One block more refers to it."""
        self._refs[number] += 1
        return number

    def give_back(self, number: int) -> None:
        """One block less refers to it."""
        self._refs[number] -= 1
        if not self._refs[number]:
            self.num_other -= bool(self.other[number])
            del self._numbers[_key(*self._masks(number, -1))]
            for masks in (self.held, self.other, self.device, self.host, self.disk, self.guess):
                masks[number] = 0
            self._free.append(number)
            self._step = (None, 0, 0)  # its number may soon mean another set

    def _masks(self, number: int | None, mask: int) -> Masks:
        if number is None:
            return 0, 0, 0, 0
        device = self.device[number]
        if not self.other[number]:
            return device & mask, 0, 0, 0
        return device & mask, self.host[number] & mask, self.disk[number] & mask, self.guess[number] & mask

    def _number(self, device: int, host: int, disk: int, guess: int) -> int:
        key = _key(device, host, disk, guess)
        number = self._numbers.get(key)
        if number is not None:
            return number
        if self._free:
            number = self._free.pop()
        else:
            number = len(self.held)
            for masks in (self.held, self.other, self.device, self.host, self.disk, self.guess, self._refs):
                masks.append(0)
        self.device[number], self.host[number], self.disk[number], self.guess[number] = (
            device,
            host,
            disk,
            guess,
        )
        self.other[number] = other = host | disk | guess
        self.held[number] = device | other if other else device
        self.num_other += bool(other)
        self._numbers[key] = number
        return number


def _key(device: int, host: int, disk: int, guess: int) -> int | Masks:
    return (device, host, disk, guess) if host or disk or guess else device
