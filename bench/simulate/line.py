"""The line of requests that found no worker, first come first served: the seam to the router's admission.

Nobody overtakes: whoever is let try is in front of all who come later, until it is placed or waits again.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

from router.config import AdmissionConfig
from router.generation import GenerationError, Overloaded, Unavailable

Key = tuple[int, int]  # 0 resumed or 1 new, order of arrival


@dataclass(eq=False, slots=True)
class Entry:
    need_blocks: int = 1
    work: float | Callable[[], float] = 1.0
    resumed: bool = False

    entered_at: float = 0.0
    waited: bool = False
    why: GenerationError | None = None  # it was dropped
    key: Key = (1, 0)
    parked: bool = False

    def __lt__(self, other: Entry) -> bool:
        return self.key < other.key


class Line:
    def __init__(self, config: AdmissionConfig) -> None:
        self._config = config
        self._parked: list[Entry] = []  # sorted
        self._trying: dict[Entry, None] = {}
        self._arrivals = 0
        self._dropped: list[Entry] = []

    @property
    def waiting(self) -> int:
        return len(self._parked) + len(self._trying)

    def enter(self, entry: Entry, now: float) -> bool:
        """True: it may try now. False: somebody is in front, it waits. Raises GenerationError."""
        self._arrivals += 1
        entry.key = (0 if entry.resumed else 1, self._arrivals)
        entry.entered_at = now
        return self.again(entry, now)

    def again(self, entry: Entry, now: float) -> bool:
        if not (self._parked and self._parked[0] < entry) and not any(o < entry for o in self._trying):
            return True
        self.no_room(entry, now)
        return False

    def no_room(self, entry: Entry, now: float) -> None:
        if not entry.resumed and not entry.waited and self.waiting >= self._config.max_queue:
            raise Overloaded("the line is full", retry_after_s=1.0)
        self._trying.pop(entry, None)
        entry.waited = entry.parked = True
        insort(self._parked, entry)

    def room(self, free_blocks: int, now: float) -> list[Entry]:
        """A worker has this many: who may try, in order."""
        self._drop_late(now)
        woken: list[Entry] = []
        budget = free_blocks
        while budget > 0 and self._parked and (budget >= self._parked[0].need_blocks or not woken):
            budget -= self._parked[0].need_blocks
            woken.append(self._let_try())
        return woken

    def placed(self, entry: Entry, now: float) -> list[Entry]:
        return self.leave(entry, now)

    def leave(self, entry: Entry, now: float) -> list[Entry]:
        """Returns who may try next."""
        return self.aside(entry, now)

    def aside(self, entry: Entry, now: float) -> list[Entry]:
        in_the_way = entry in self._trying
        self._trying.pop(entry, None)
        if entry.parked:
            entry.parked = False
            del self._parked[bisect_left(self._parked, entry)]
        self._drop_late(now)
        return [self._let_try()] if in_the_way and not self._trying and self._parked else []

    def expired(self, now: float) -> list[Entry]:
        self._drop_late(now)
        dropped, self._dropped = self._dropped, []
        return dropped

    def _let_try(self) -> Entry:
        entry = self._parked.pop(0)
        entry.parked = False
        self._trying[entry] = None
        return entry

    def _drop_late(self, now: float) -> None:
        limit = self._config.queue_timeout_s
        while self._parked and now - self._parked[0].entered_at >= limit:
            entry = self._parked.pop(0)
            entry.parked = False
            entry.why = Unavailable(f"no room within {limit:g} s", retry_after_s=1.0)
            self._dropped.append(entry)
