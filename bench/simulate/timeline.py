"""Simulated time: a heap of things to do, in the order of their moment, then of their making."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any


class Event:
    """Something that will be done. `cancel` leaves it in the heap as an empty shell."""

    __slots__ = ("action", "arguments", "when")

    def __init__(self, when: float, action: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
        self.when = when
        self.action = action
        self.arguments = arguments

    def cancel(self) -> None:
        self.action = None
        self.arguments = ()


class Timeline:
    """Seconds since the start of the simulation."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0  # that were done
        self._heap: list[tuple[float, int, Event]] = []
        self._serials = itertools.count()

    def at(self, when: float, action: Callable[..., None], *arguments: Any) -> Event:
        """Do it then; what is late is done now, never in the past."""
        event = Event(max(when, self.now), action, arguments)
        heapq.heappush(self._heap, (event.when, next(self._serials), event))
        return event

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> Event:
        return self.at(self.now + delay_s, action, *arguments)

    def run(self, go_on: Callable[[], bool]) -> None:
        """Until nothing is left to do, or `go_on` says that nobody waits for more."""
        heap = self._heap
        while heap and go_on():
            when, _, event = heapq.heappop(heap)
            if event.action is None:
                continue
            self.now = when
            self.num_events += 1
            event.action(*event.arguments)
