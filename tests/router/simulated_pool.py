"""Workers as queues in virtual time, under a real policy, load book and roster: how a policy spreads work in seconds of CPU.

A prefill worker computes uncached tokens one request after the other; a decode worker runs streams side by side. What a
worker has had is cached there for good.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from router.load import Booking, LoadBook
from router.policy import Demand, Policy
from router.prefix_index import CachedPrefix
from router.roster import Roster, Sorts
from tests.router.fake_worker import BLOCK, LAYOUT, ROOT
from workers.protocol.messages import Load, Role, WorkerInfo


def info(worker_id: str, role: Role, host: str = "h") -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        epoch=1,
        role=role,
        address=f"{host}:1",
        model="m",
        layout=LAYOUT,
        hash_root=ROOT,
        num_blocks=100_000,
        max_model_len=100_000,
        max_num_seqs=256,
        vocab_size=1000,
        device="cpu",
        pid=0,
    )


@dataclass
class SimulatedPool:
    """`token_s`: seconds of a prompt token, by worker; `answer_s`: how long a stream runs."""

    policy: Policy
    token_s: dict[str, float]
    answer_s: float = 2.0
    seed: int = 1
    heartbeat_s: float = 0.5
    now: float = 0.0
    picked: Counter[str] = field(default_factory=Counter)
    log: list[tuple[float, str]] = field(default_factory=list)  # (time, prefill worker)
    ttft: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.book = LoadBook(clock=lambda: self.now)
        standing = self.policy.standing if isinstance(self.policy, Sorts) else None
        self.roster = Roster(self.book, standing, self.rng)
        for worker_id in self.token_s:
            self.roster.enlist(info(worker_id, "prefill" if worker_id[0] == "p" else "decode"))
        self._cached: dict[tuple[str, int], int] = {}  # (worker, prefix) -> blocks
        self._free_at = dict.fromkeys(self.token_s, 0.0)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serials = itertools.count()

    def run(
        self, rate: float, seconds: float, prefix_of: Callable[[int], int], prefix: int, fresh: int
    ) -> None:
        """Poisson arrivals; request n has `prefix` tokens of prefix number `prefix_of(n)`, and `fresh` of its own."""
        at = self.now
        for number in itertools.count():
            at += self.rng.expovariate(rate)
            if at > self.now + seconds:
                break
            self._at(at, lambda number=number: self._arrive(prefix_of(number), prefix, fresh))
        beat = self.now
        while beat < at:
            self._at(beat, self._beat)
            beat += self.heartbeat_s
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._serials), event))

    def _beat(self) -> None:
        for worker_id, token_s in self.token_s.items():
            booked = self.book.booked(worker_id)
            load = Load(
                queued_prefill_tokens=booked.prefill_tokens,
                active_blocks=booked.decode_blocks,
                prefill_token_s=token_s,
            )
            self.book.report(worker_id, load)

    def _arrive(self, name: int, prefix: int, fresh: int) -> None:
        held = {w: CachedPrefix(blocks) for (w, p), blocks in self._cached.items() if p == name}
        demand = Demand(prefix + fresh, BLOCK, held)
        choice = self.policy.choose(demand, self.roster.views(ROOT))
        assert choice is not None
        decode, prefill = choice.decode, choice.prefill or choice.decode
        self.picked[decode.worker_id] += 1
        if choice.prefill is not None:
            self.picked[prefill.worker_id] += 1
        self.log.append((self.now, prefill.worker_id))
        stream = self.book.book(decode.worker_id, decode_blocks=(prefix + fresh) // BLOCK + 1)
        reading = self.book.book(
            prefill.worker_id,
            prefill_tokens=prefill.uncached_tokens,
            requests=int(choice.prefill is not None),
        )
        began = max(self.now, self._free_at[prefill.worker_id])
        ends = began + prefill.uncached_tokens * self.token_s[prefill.worker_id]
        self._free_at[prefill.worker_id] = ends
        self.ttft.append(ends - self.now)
        workers = {decode.worker_id, prefill.worker_id}
        self._at(ends, lambda: self._read(reading, name, prefix // BLOCK, workers))
        self._at(ends + self.answer_s, stream.release)

    def _read(self, reading: Booking, name: int, blocks: int, workers: set[str]) -> None:
        reading.release()
        for worker_id in workers:
            self._cached[worker_id, name] = blocks
