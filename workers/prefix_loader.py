"""Brings blocks of a prefix to the device before its request is scheduled, from wherever they are.

Pure Python: a source may be host memory, a disk, or another worker. Loading runs on a few threads of its own, outside
the engine's lock, while the batch goes on. A request waits for at most `deadline_s`; then it goes on without, and what
is being written stays referenced until its writer has let go. Sources bound the time that they block.

A load is planned when a thread has time for it, not when it is asked for: requests with the same prefix that come
together load it once, and those that wait in the queue hold no blocks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from workers.engine.fill import Fill
from workers.engine.request import Request
from workers.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

_SMOOTHING = 0.2  # weight of the newest measurement
_FORGIVING = 0.95  # a source that was too slow is given another chance after some time


class PrefixSource(Protocol):
    """A place that blocks can be had from. Called by several threads at once."""

    @property
    def name(self) -> str: ...

    def count(self, hashes: Sequence[bytes]) -> int:
        """How many of them, from the first on, it has. At once: asks no network; may be called under the engine's lock."""

    def read(self, hashes: Sequence[bytes], blocks: Sequence[int], go_on: Callable[[], bool]) -> int:
        """Write them into these blocks of the device; how many, from the first on, are whole. Blocks the caller.

        Looks at `go_on` often, and stops when it answers False. Raises whatever its trouble is: nothing counts then.
        """


@dataclass(frozen=True, slots=True)
class Loaded:
    """What one read of one source has brought."""

    source: str
    num_blocks: int
    seconds: float
    failed: bool = False


@dataclass(slots=True, eq=False)
class _Load:
    request: Request
    then: Callable[[], None]
    sources: Sequence[PrefixSource]
    deadline: float
    wanted: bool = True  # False: cancelled, or it went on without


@dataclass(slots=True)
class _Pace:
    """Seconds per block by source, as measured lately."""

    by_source: dict[str, float] = field(default_factory=dict)

    def observe(self, loaded: Loaded) -> None:
        if loaded.num_blocks:
            now = loaded.seconds / loaded.num_blocks
            before = self.by_source.get(loaded.source, now)
            self.by_source[loaded.source] = before + _SMOOTHING * (now - before)

    def is_worth_it(self, source: str, compute_block_s: float | None) -> bool:
        """Whether loading a block takes less time than computing it; what was never measured is tried."""
        load_s = self.by_source.get(source)
        if load_s is None or compute_block_s is None or load_s < compute_block_s:
            return True
        self.by_source[source] = load_s * _FORGIVING
        return False


class PrefixLoader:
    """State is guarded by the engine's lock, which is `lock`; `on_loaded` is called without it."""

    def __init__(
        self,
        lock: threading.RLock,
        scheduler: Scheduler,
        sources: Sequence[PrefixSource] = (),
        *,
        compute_token_s: Callable[[], float | None] = lambda: None,
        on_loaded: Callable[[Loaded], None] = lambda loaded: None,
        num_threads: int = 2,
        max_loads: int = 64,
        deadline_s: float = 2.0,
    ) -> None:
        """`sources`: those that every request may use, quickest first. `compute_token_s`: what computing would cost."""
        self.sources = list(sources)
        self._lock = lock
        self._changed = threading.Condition(lock)
        self._scheduler = scheduler
        self._compute_token_s = compute_token_s
        self._on_loaded = on_loaded
        self._num_threads = num_threads
        self._max_loads = max_loads
        self._deadline_s = deadline_s
        self._pace = _Pace()
        self._waiting: list[_Load] = []
        self._by_request: dict[str, _Load] = {}  # loads that a request waits for
        self._filling: set[bytes] = set()  # hashes that are being loaded
        self._threads: list[threading.Thread] = []
        self._stopping = False

    def __len__(self) -> int:
        """Requests that wait for a load."""
        return len(self._by_request)

    # --- called under the lock --------------------------------------------------------------------------------------

    def load(self, request: Request, then: Callable[[], None], more: Sequence[PrefixSource] = ()) -> bool:
        """False: there is nothing worth loading, go on at once. Call it under the lock, before the request is added.

        True: `then` is called once, under the lock, when what could be loaded is in the prefix cache or the deadline
        is past; never after `cancel` or `stop`. `more`: sources for this request alone, tried after all others.
        """
        sources = [*self.sources, *more]
        if not sources or self._stopping or len(self._by_request) >= self._max_loads:
            return False
        if request.request_id in self._by_request or not self._plan(request, sources):
            return False
        load = _Load(request, then, sources, time.monotonic() + self._deadline_s)
        self._waiting.append(load)
        self._by_request[request.request_id] = load
        self._start()
        self._changed.notify_all()
        return True

    def load_now(self, request: Request, more: Sequence[PrefixSource] = ()) -> None:
        """The same in this thread, for whoever has nothing else to do. Not under the lock."""
        sources = [*self.sources, *more]
        with self._lock:
            fill = self._begin(request, sources) if sources else None
        if fill is not None:
            self._fill(fill, sources, lambda: True)

    def cancel(self, request_id: str) -> None:
        """Nobody waits for it any more. Idempotent. Blocks are free on return, or when their writer has let go."""
        with self._lock:
            load = self._by_request.pop(request_id, None)
            if load is not None:
                load.wanted = False
                if load in self._waiting:
                    self._waiting.remove(load)

    def stop(self) -> None:
        """Cancel everything and end the threads. Not under the lock."""
        with self._lock:
            self._stopping = True
            for request_id in list(self._by_request):
                self.cancel(request_id)
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)

    # --- what to load -----------------------------------------------------------------------------------------------

    def _plan(self, request: Request, sources: Sequence[PrefixSource]) -> int:
        """Blocks that are worth loading."""
        hashes = self._scheduler.missing_hashes(request)
        done = 0
        while done < len(hashes):
            source, count = self._next_source(hashes[done:], sources)
            if source is None or not self._is_worth_it(source):
                break
            done += count
        return done

    @staticmethod
    def _next_source(hashes: list[bytes], sources: Sequence[PrefixSource]) -> tuple[PrefixSource | None, int]:
        for source in sources:
            count = source.count(hashes)
            if count:
                return source, count
        return None, 0

    def _is_worth_it(self, source: PrefixSource) -> bool:
        token_s = self._compute_token_s()
        block_s = None if token_s is None else token_s * self._scheduler.block_size
        return self._pace.is_worth_it(source.name, block_s)

    def _begin(self, request: Request, sources: Sequence[PrefixSource]) -> Fill | None:
        count = self._plan(request, sources)
        fill = self._scheduler.begin_fill(request, count) if count else None
        if fill is not None:
            self._filling.update(fill.hashes)
        return fill

    # --- the threads ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._threads:
            return
        names = [f"prefix-loader-{number}" for number in range(self._num_threads)]
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]
        self._threads.append(threading.Thread(target=self._watch, name="prefix-deadlines", daemon=True))
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while (picked := self._pick()) is not None:
            load, fill = picked
            self._fill(fill, load.sources, lambda load=load: load.wanted, load)  # type: ignore[misc]

    def _pick(self) -> tuple[_Load, Fill] | None:
        """The next load, with blocks to write into. None: the end."""
        with self._changed:
            while not self._stopping:
                load = next((load for load in self._waiting if self._can_begin(load)), None)
                if load is None:
                    self._changed.wait()
                    continue
                self._waiting.remove(load)
                fill = self._begin(load.request, load.sources)
                if fill is not None:
                    return load, fill
                self._go_on(load)  # somebody else has loaded it meanwhile, or there is no room
            return None

    def _can_begin(self, load: _Load) -> bool:
        """False while another thread loads what this one would begin with."""
        missing = self._scheduler.missing_hashes(load.request)
        return not missing or missing[0] not in self._filling

    def _fill(
        self,
        fill: Fill,
        sources: Sequence[PrefixSource],
        go_on: Callable[[], bool],
        load: _Load | None = None,
    ) -> None:
        """Write the blocks, outside the lock; then let requests find them, whatever happened."""
        good = 0
        try:
            while good < len(fill.hashes) and go_on():
                source, count = self._next_source(fill.hashes[good:], sources)
                if source is None:
                    break
                loaded = self._read(source, fill, good, count, go_on)
                good += loaded.num_blocks
                if loaded.num_blocks < count:
                    break
        finally:
            with self._lock:
                self._filling.difference_update(fill.hashes)
                self._scheduler.end_fill(fill, good)
                self._changed.notify_all()
                if load is not None:
                    self._go_on(load)

    def _read(
        self, source: PrefixSource, fill: Fill, first: int, count: int, go_on: Callable[[], bool]
    ) -> Loaded:
        began = time.perf_counter()
        good = 0
        failed = False
        try:
            good = source.read(fill.hashes[first : first + count], fill.blocks[first : first + count], go_on)
        except Exception:
            logger.exception("%d blocks could not be loaded from %s, they are computed", count, source.name)
            failed = True
        loaded = Loaded(source.name, good, time.perf_counter() - began, failed)
        with self._lock:
            self._pace.observe(loaded)
        self._on_loaded(loaded)
        return loaded

    def _go_on(self, load: _Load) -> None:
        if load.wanted:
            load.wanted = False
            del self._by_request[load.request.request_id]
            load.then()

    def _watch(self) -> None:
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                for load in [load for load in self._by_request.values() if load.deadline <= now]:
                    if load in self._waiting:
                        self._waiting.remove(load)
                    logger.warning(
                        "request %s goes on without its prefix: loading takes too long",
                        load.request.request_id,
                    )
                    self._go_on(load)
                first = min((load.deadline for load in self._by_request.values()), default=None)
                self._changed.wait(None if first is None else max(first - time.monotonic(), 0.001))
