"""Keeps every worker alive: notices death and hanging, and starts a new life with a new epoch.

The decisions are here and pure; what they are carried out with (Ray, Redis) is behind `Hands`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.config import SupervisorConfig
from cluster.topology import Replica
from workers.protocol.messages import Role

logger = logging.getLogger(__name__)

Phase = Literal["starting", "running", "waiting", "draining"]
_DRAIN_GRACE_S = 10.0  # to end in order, once the time for its streams is over
_ALARM_AFTER = 5  # deaths in a row after which each further one is an error in the log


@dataclass(frozen=True, slots=True)
class Started:
    worker_id: str
    epoch: int
    address: str
    pid: int


@dataclass(frozen=True, slots=True)
class Died:
    worker_id: str
    epoch: int
    reason: str


Event = Started | Died


class Hands(Protocol):
    """Carries out what the supervisor decides."""

    def start(self, replica: Replica, epoch: int) -> None:
        """Begin a life; its end, or that it never began, comes as an event. Does not block."""

    def kill(self, worker_id: str) -> None:
        """End the present life at once, a stopped process included. No event follows."""

    def drain(self, worker_id: str, timeout_s: float) -> None:
        """Let it take nothing new, finish what it has, and end; its end comes as an event. Does not block."""

    def release(self, replica: Replica) -> None:
        """It has left for good: its place may be another's."""

    def events(self, timeout_s: float) -> list[Event]:
        """What has happened, after at most `timeout_s` of waiting."""

    def leases(self) -> Mapping[str, int] | None:
        """worker_id -> epoch of each lease in Redis; None while Redis does not answer."""


@dataclass(slots=True)
class Watched:
    """A replica as the supervisor sees it. Times are seconds on the supervisor's clock."""

    replica: Replica
    epoch: int = 0
    phase: Phase = "waiting"
    since: float = 0.0  # of this phase
    start_at: float = 0.0  # phase "waiting": when the next life begins
    lease_seen: float = 0.0
    deaths_in_a_row: int = 0
    restarts: int = 0
    address: str = ""
    pid: int = 0


class Supervisor:
    """Call `tick` again and again on one thread."""

    def __init__(
        self,
        replicas: Iterable[Replica],
        hands: Hands,
        config: SupervisorConfig,
        start_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.watched = {replica.worker_id: Watched(replica) for replica in replicas}
        self._hands = hands
        self._config = config
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self._wall_ms = wall_ms
        self.launching = True  # until the whole cluster has been up once: the launcher tells of deaths itself
        self._drain_timeout_s = 0.0
        self._blind_since: float | None = None  # Redis does not answer: nobody can be called hung

    def start_all(self) -> None:
        for watched in self.watched.values():
            self._begin(watched)

    def all_running(self) -> bool:
        return all(watched.phase == "running" for watched in self.watched.values())

    def add(self, replica: Replica) -> None:
        """One more worker, kept alive like the others from here on."""
        if replica.worker_id in self.watched:
            raise ValueError(f"{replica.worker_id} is here already")
        watched = self.watched[replica.worker_id] = Watched(replica)
        self._begin(watched)

    def retire(self, worker_id: str, drain_timeout_s: float) -> None:
        """Let a worker finish what it has and go; it is not started again. One that does not run goes at once."""
        watched = self.watched[worker_id]
        if watched.phase == "draining":
            return
        self._drain_timeout_s = drain_timeout_s
        running, watched.phase, watched.since = watched.phase == "running", "draining", self._clock()
        if running:
            self._hands.drain(worker_id, drain_timeout_s)
        else:
            self._hands.kill(worker_id)
            self._gone(watched, "it was not running")

    def count(self, role: Role, phases: Collection[str]) -> int:
        return sum(w.replica.role == role and w.phase in phases for w in self.watched.values())

    def tick(self, timeout_s: float) -> list[Event]:
        """One round: take in what happened, judge hanging and slow starts, begin lives that are due."""
        happened = [event for event in self._hands.events(timeout_s) if self._take_in(event)]
        now = self._clock()
        happened += self._overdue(now)
        happened += self._hung(now)
        for watched in list(self.watched.values()):
            if watched.phase == "waiting" and watched.start_at <= now:
                self._begin(watched)
        return happened

    def _begin(self, watched: Watched) -> None:
        watched.epoch = max(self._wall_ms(), watched.epoch + 1)
        watched.phase = "starting"
        watched.since = self._clock()
        watched.address, watched.pid = "", 0
        self._hands.start(watched.replica, watched.epoch)

    def _take_in(self, event: Event) -> bool:
        """False for news of an earlier life."""
        watched = self.watched.get(event.worker_id)
        if watched is None or watched.epoch != event.epoch or watched.phase == "waiting":
            return False
        if isinstance(event, Died) and watched.phase == "draining":
            self._gone(watched, "its streams had ended")
            return True
        if isinstance(event, Died):
            self._bury(watched, event.reason)
            return True
        watched.phase = "running"
        took_s = self._clock() - watched.since
        watched.since = watched.lease_seen = self._clock()
        watched.address, watched.pid = event.address, event.pid
        if watched.restarts:
            logger.info(
                "%s is back after %.1f s (epoch %d, pid %d)", event.worker_id, took_s, event.epoch, event.pid
            )
        return True

    def _bury(self, watched: Watched, reason: str) -> None:
        now = self._clock()
        lived_s = now - watched.since
        if watched.phase == "running" and lived_s >= self._config.stable_after_s:
            watched.deaths_in_a_row = 0
        watched.deaths_in_a_row += 1
        watched.restarts += 1
        pause_s = self.pause_s(watched.deaths_in_a_row)
        logger.log(
            logging.DEBUG
            if self.launching
            else logging.ERROR
            if watched.deaths_in_a_row >= _ALARM_AFTER
            else logging.WARNING,
            "%s (epoch %d) %s after %.1f s: %s; starting it again %s%s",
            watched.replica.worker_id,
            watched.epoch,
            "died" if watched.phase == "running" else "failed to start",
            lived_s,
            reason,
            f"in {pause_s:g} s" if pause_s else "now",
            f" ({watched.deaths_in_a_row} deaths in a row)" if watched.deaths_in_a_row > 1 else "",
        )
        watched.phase = "waiting"
        watched.since = now
        watched.start_at = now + pause_s

    def _gone(self, watched: Watched, reason: str) -> None:
        """A worker that was to leave has left."""
        worker_id = watched.replica.worker_id
        del self.watched[worker_id]
        self._hands.release(watched.replica)
        logger.info(
            "%s has left after %.1f s of draining: %s", worker_id, self._clock() - watched.since, reason
        )

    def pause_s(self, deaths_in_a_row: int) -> float:
        """The first restart is at once, the second after the initial back-off, which then doubles up to its cap."""
        if deaths_in_a_row <= 1:
            return 0.0
        doubled = self._config.backoff_initial_s * 2.0 ** min(deaths_in_a_row - 2, 30)
        return min(self._config.backoff_max_s, doubled)

    def _overdue(self, now: float) -> list[Event]:
        found: list[Event] = []
        for watched in list(self.watched.values()):
            if watched.phase == "draining" and now - watched.since > self._drain_timeout_s + _DRAIN_GRACE_S:
                found.append(self._put_down(watched, "its streams did not end in time; they go on elsewhere"))
            if watched.phase == "starting" and now - watched.since > self._start_timeout_s:
                found.append(self._put_down(watched, f"not ready within {self._start_timeout_s:g} s"))
        return found

    def _hung(self, now: float) -> list[Event]:
        """A process that lives but no longer renews its lease: stopped, or stuck."""
        leases = self._hands.leases()
        if leases is None:
            self._blind_since = self._blind_since if self._blind_since is not None else now
            return []
        if self._blind_since is not None:  # the time without Redis counts for nobody
            self._blind_since = None
            for watched in self.watched.values():
                watched.lease_seen = now
        found: list[Event] = []
        for watched in list(self.watched.values()):
            if watched.phase != "running":
                continue
            if leases.get(watched.replica.worker_id) == watched.epoch:
                watched.lease_seen = now
            elif now - watched.lease_seen > self._config.hang_timeout_s:
                found.append(
                    self._put_down(watched, "hung: its process lives, but its lease in Redis ran out")
                )
        return found

    def _put_down(self, watched: Watched, reason: str) -> Died:
        self._hands.kill(watched.replica.worker_id)
        died = Died(watched.replica.worker_id, watched.epoch, reason)
        if watched.phase == "draining":
            self._gone(watched, reason)
        else:
            self._bury(watched, reason)
        return died
