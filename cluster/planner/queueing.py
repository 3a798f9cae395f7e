"""Waiting, in closed form: a pool of prefill workers as M/G/c, decode workers as one processor-sharing system. Pure.

M/G/c: the chance of waiting is Erlang's C; the mean wait is that of M/M/c times (cv² of arrivals + cv² of service)/2
(Allen and Cunneen), and what waits is taken as exponential. Exact for M/M/c, for other services an approximation whose
error tests state against simulation.

Decode: n requests in a pool progress together, at a speed that falls with n. The stationary distribution of such a
system depends on the answers' lengths through their mean only (insensitivity of processor sharing, Cohen 1979), so a
birth-death chain gives it. Beyond the seats there are, requests wait and the speed stays.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

_NEGLIGIBLE = 1e-12


@dataclass(frozen=True, slots=True)
class Wait:
    """P(W > t) = chance · exp(−t / scale_s)."""

    chance: float
    scale_s: float

    @property
    def mean_s(self) -> float:
        return self.chance * self.scale_s

    def beyond(self, seconds: float) -> float:
        """P(W > seconds)."""
        if seconds < 0:
            return 1.0
        if self.scale_s == 0 or self.chance == 0:
            return 0.0
        return self.chance * math.exp(-seconds / self.scale_s)

    def quantile(self, share: float) -> float:
        left = 1 - share
        return 0.0 if left >= self.chance else self.scale_s * math.log(self.chance / left)


NO_WAIT = Wait(0.0, 0.0)


def erlang_c(servers: int, offered: float) -> float:
    """Chance that an arrival waits in M/M/c; `offered` is rate × mean service, below `servers`."""
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    busy = offered / servers
    return blocked / (1 - busy + busy * blocked)


def mgc_wait(
    servers: int, rate: float, service_s: float, service_cv2: float, arrival_cv2: float
) -> Wait | None:
    """None: it never ends."""
    offered = rate * service_s
    if offered >= servers:
        return None
    chance = erlang_c(servers, offered)
    if chance < _NEGLIGIBLE:
        return NO_WAIT
    mean_s = chance * service_s / (servers - offered) * (arrival_cv2 + service_cv2) / 2
    return Wait(chance, mean_s / chance)


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How many requests a pool of decode workers holds, as arrivals find it."""

    workers: int
    seats: int  # of all workers together
    chances: tuple[float, ...]  # of 0, 1, ... `seats` − 1 requests there
    wait: Wait  # for a seat

    @property
    def mean(self) -> float:
        """Requests that have a seat."""
        seated = sum(count * chance for count, chance in enumerate(self.chances))
        return seated + self.seats * self.wait.chance

    def quantile(self, share: float) -> int:
        """So many requests or fewer, with this chance; at most all seats."""
        totals = list(accumulate(self.chances))
        return bisect_left(totals, share) if totals and totals[-1] >= share else self.seats


def occupancy(
    workers: int, seats_each: int, rate: float, tokens: float, step_s: Callable[[float], float]
) -> Occupancy | None:
    """`tokens`: mean steps a request stays; `step_s(batch)`: seconds of a step. None: more comes than can leave.

    Requests are spread evenly, as a router does that knows who has how many.
    """
    seats = workers * seats_each
    if seats < 1:
        return None

    def leaving(count: int) -> float:
        """Requests that end per second when there are so many."""
        return count / (tokens * step_s(max(1.0, count / workers)))

    if tokens <= 0:
        return Occupancy(workers, seats, (1.0,), NO_WAIT)
    top = leaving(seats)
    if rate >= top:
        return None
    logs = [0.0]
    for count in range(1, seats + 1):
        logs.append(logs[-1] + math.log(rate) - math.log(leaving(count)))
    highest = max(logs)
    weights = [math.exp(value - highest) for value in logs]
    ratio = rate / top
    waiting = weights.pop()  # with all seats taken and nobody waiting
    total = sum(weights) + waiting / (1 - ratio)
    chance = waiting / (1 - ratio) / total
    wait = Wait(chance, 1 / (top - rate)) if chance > _NEGLIGIBLE else NO_WAIT
    return Occupancy(workers, seats, tuple(weight / total for weight in weights), wait)
