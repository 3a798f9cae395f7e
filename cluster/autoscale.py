"""Pool sizes from measured load, live: looks at routers and workers, decides, tells, and where allowed acts.

A thread of its own looks and decides (HTTP may stall); what it decides is carried out on the supervisor's thread. The
decision itself is planner/decide.py, pure.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from prometheus_client.parser import text_string_to_metric_families

from cluster.config import PlannerConfig
from cluster.planner.decide import Decision, Limits, State, applied, decide
from cluster.planner.observe import COUNTERS, Census, Look, look, observe
from workers.protocol.messages import Planned, Role

logger = logging.getLogger(__name__)

_TIMEOUT_S = 8.0
_COUNTED = {
    name.rpartition("_")[0] if name.endswith(("_sum", "_count", "_total")) else name for name in COUNTERS
}


class Pools(Protocol):
    """What can be resized (cluster/resize.py); on the supervisor's thread only."""

    def census(self) -> Mapping[Role, Census]: ...

    def room(self, role: Role) -> int: ...

    def resize(self, role: Role, size: int) -> int: ...


class Router:
    """GET /cluster and /metrics of a running cluster. Any replica answers for all workers."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def look(self, at: float) -> Look:
        """Raises OSError or ValueError."""
        status = json.loads(self._get("/cluster"))
        samples = [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(self._get("/metrics"))
            if family.name in _COUNTED
            for sample in family.samples
        ]
        return look(at, status, samples)

    def _get(self, path: str) -> str:
        request = urllib.request.Request(f"{self._url}{path}", headers=self._headers)
        with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
            text: bytes = answer.read()
        return text.decode()


class Autoscaler:
    """`tick` belongs on the supervisor's thread, again and again; the rest is its own."""

    def __init__(
        self,
        config: PlannerConfig,
        look: Callable[[float], Look],
        pools: Pools,
        tell: Callable[[Planned], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tell`: publish what was decided, for `headrace status` and metrics."""
        self._config = config
        self._look = look
        self._pools = pools
        self._tell = tell
        self._clock = clock
        self._looks: deque[Look] = deque()
        self._state = State()
        self._census: Mapping[Role, Census] = {}
        self._most: Mapping[Role, int] = {}
        self._lock = threading.Lock()  # of what both threads touch: state, census, decided
        self._decided: Decision | None = None
        self._said: Mapping[Role, int] = {}
        self._blind = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="planner", daemon=True)
        self._asked_room_at = -1e9

    def start(self) -> None:
        self._count()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(0.5)  # it may be waiting for an answer; it holds nothing

    def tick(self) -> None:
        """Count what there is, and carry out what was decided since the last time."""
        self._count()
        with self._lock:
            decided, self._decided = self._decided, None
        if decided is None or not self._config.apply:
            return
        for role, change in decided.changes.items():
            # What was decided is a number; what there is may have changed since.
            if decided.sizes[role] == self._census[role].present:
                continue
            logger.info("planner: %s", decided.text)
            moved = self._pools.resize(role, decided.sizes[role])
            if moved:
                with self._lock:
                    self._state = applied(self._state, role, self._clock())
            elif change > 0:
                logger.warning("planner: %s should grow by %d, but there is no place", role, change)
        self._asked_room_at = -1e9
        self._count()

    def _count(self) -> None:
        now = self._clock()
        census = self._pools.census()
        if now - self._asked_room_at >= self._config.interval_s:
            self._asked_room_at = now
            self._most = {role: self._most_of(role, here.present) for role, here in census.items()}
        with self._lock:
            self._census = census

    def _most_of(self, role: Role, present: int) -> int:
        """Bounded by the settings and, where workers are really started, by what Ray has room for."""
        bounds = self._config.bounds(role)
        if not self._config.apply:
            return bounds.max or 1 << 16
        held = present + self._pools.room(role)
        return max(min(held, bounds.max or held), bounds.min)

    # --- the planner's own thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.wait(self._config.interval_s):
            try:
                self.observe_once()
            except (OSError, ValueError, KeyError) as error:
                if not self._blind:
                    logger.warning("planner: the load can't be measured: %s", error)
                self._blind = True
            else:
                self._blind = False

    def observe_once(self) -> Decision | None:
        """One look and what follows from it. None: too little was seen so far."""
        now = self._clock()
        seen = self._look(now)
        while self._looks and now - self._looks[0].at > self._config.window_s:
            self._looks.popleft()
        self._looks.append(seen)
        with self._lock:
            census, state = self._census, self._state
        found = observe(self._looks, census) if "decode" in census else None
        if found is None:
            return None
        decision = decide(found, state, self._limits(), now)
        with self._lock:
            if self._state is state:  # else it was acted on meanwhile
                self._state, self._decided = decision.state, decision
        if decision.changes and decision.sizes != self._said and not self._config.apply:
            logger.info("planner suggests: %s (planner.apply is off)", decision.text)
        self._said = decision.sizes
        self._tell(
            Planned(
                text=decision.text,
                apply=self._config.apply,
                sizes={str(role): size for role, size in decision.sizes.items()},
                present={role: here.present for role, here in census.items()},
                draining={role: here.draining for role, here in census.items()},
            )
        )
        return decision

    def _limits(self) -> Limits:
        config = self._config
        return Limits(
            ttft_s=config.ttft_s,
            tpot_s=config.tpot_s,
            headroom=config.headroom,
            window_s=config.window_s,
            up_after_s=config.up_after_s,
            down_after_s=config.down_after_s,
            calm=config.calm,
            pause_s=config.pause_s,
            most=self._most,
            least={"prefill": config.prefill.min, "decode": config.decode.min},
        )
