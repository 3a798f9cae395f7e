"""A whole simulated cluster: workers, network, index stream, routers, and what goes wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.simulate.cost import StepCost
from bench.simulate.index_stream import Publisher, StreamConfig
from bench.simulate.jobs import Asked, Job
from bench.simulate.network import Network, Wires
from bench.simulate.policies import ORACLE, make
from bench.simulate.router import POLL_S, Router
from bench.simulate.timeline import Timeline
from bench.simulate.worker import Limits, Worker
from router.config import RouterConfig
from workers.protocol.messages import Load, Role
from workers.protocol.tiers import Removed

_MIN_SAMPLE_S = 0.5
_SAMPLES = 150
_LOOK_EVERY = 1000  # events
_STUCK_S = 1000.0


@dataclass(frozen=True)
class Fault:
    """`death` of a worker, which comes back with a new epoch after `for_s`; or Redis `away` for `for_s`."""

    kind: str
    at_s: float
    for_s: float
    worker: int = 0  # its number

    def __post_init__(self) -> None:
        if self.kind not in ("death", "away"):
            raise ValueError(f"kind is {self.kind!r}: it must be death or away")
        if self.at_s < 0 or self.for_s < 0:
            raise ValueError(f"a fault at {self.at_s} s for {self.for_s} s: neither may be negative")


@dataclass(frozen=True)
class ClusterConfig:
    """`prefill` 0: every worker is unified, that is a decode worker that reads prompts itself."""

    cost: StepCost
    limits: Limits
    decode: int
    prefill: int = 0
    prefill_limits: Limits | None = None  # None: as the others
    policy: str = "cost"
    router: RouterConfig = field(default_factory=RouterConfig)
    routers: int = 1
    fetching: bool = True  # longer prefixes of other workers may be fetched
    wires: Wires = field(default_factory=Wires)
    stream: StreamConfig = field(default_factory=StreamConfig)
    faults: tuple[Fault, ...] = ()
    detect_s: float = 0.05  # until a router notices a death
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("decode", 1), ("prefill", 0), ("routers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        for fault in self.faults:
            if fault.kind == "death" and not 0 <= fault.worker < self.prefill + self.decode:
                raise ValueError(
                    f"fault: there is no worker {fault.worker}, only 0 to {self.prefill + self.decode - 1}"
                )


def check_fits(number: int, asked: Asked, config: ClusterConfig) -> None:
    """Raise ValueError for a request that some worker could never hold: a router would refuse it."""
    tokens = asked.prompt_tokens + asked.output_tokens
    for limits in (config.limits, config.prefill_limits or config.limits):
        if tokens > limits.num_blocks * limits.block_size:
            raise ValueError(
                f"request {number} has {tokens} tokens, the KV cache of a worker holds "
                f"{limits.num_blocks * limits.block_size}"
            )


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float
    line: int  # requests that wait at the routers
    waiting: int  # on workers
    running: int
    used_blocks: float  # share of all, referenced


class Cluster:
    """Runs one trace once."""

    def __init__(self, config: ClusterConfig, trace: Sequence[Asked]) -> None:
        for number, asked in enumerate(trace):
            check_fits(number, asked, config)
        self.config = config
        self.timeline = Timeline()
        self.jobs = [Job(number, asked, config.limits.block_size) for number, asked in enumerate(trace)]
        self.samples: list[Sample] = []
        self.workers: list[Worker] = []  # those that live or will again, by number
        self.past: list[Worker] = []  # earlier lives
        self.publishers: dict[str, Publisher] = {}
        self._followers: dict[int, list[Job]] = {}
        self._open = len(self.jobs)
        self._redis_away = False
        self._rng = random.Random(f"{config.seed}/cluster")
        self._next = 0  # in a saturated run: the next first turn
        self._unplaced = 0
        self._keep_waiting = 0
        self._in_flight = 0
        self._moved: tuple[int, ...] = ()
        self._moved_s = 0.0
        total = config.prefill + config.decode
        names = {self._name(number): number for number in range(total)}
        self.network = Network(self.timeline, config.wires, names)
        self.routers = [
            Router(
                self.timeline,
                self.network,
                config.router,
                make(config.policy, config.router.policy, random.Random(f"{config.seed}/policy/{number}")),
                random.Random(f"{config.seed}/roster/{number}"),
                exact=config.policy == ORACLE,
                block_size=config.limits.block_size,
                token_bytes=config.cost.kv_token_bytes,
                fetching=config.fetching,
                on_placed=self._placed,
                on_end=self._ended,
                read_snapshot=self._read_snapshot,
            )
            for number in range(config.routers)
        ]
        for number in range(total):
            self.workers.append(self._new_worker(number, epoch=1))
            self._register(self.workers[number])
        for job in self.jobs:
            if job.asked.after is not None:
                self._followers.setdefault(job.asked.after, []).append(job)

    # --- running ----------------------------------------------------------------------------------------------------

    def run(self, speed: float = 1.0) -> None:
        """Requests come `speed` times as fast as in the trace (the pauses inside sessions stay)."""
        last = 0.0
        for job in self.jobs:
            if job.asked.after is None:
                last = max(last, job.asked.at_s / speed)
                self.timeline.at(job.asked.at_s / speed, self._arrive, job)
        self._run(last)

    def run_saturated(self, waiting: int) -> None:
        """So many requests always wait for a place, in the order of the trace: what comes out is what can be done."""
        self._keep_waiting = waiting
        self._top_up()
        self._run(0.0)

    def _run(self, last_s: float) -> None:
        self._sample_s = max(last_s / _SAMPLES, _MIN_SAMPLE_S)
        self._sample()
        for fault in self.config.faults:
            if fault.kind == "death":
                self.timeline.at(fault.at_s, self._die, fault)
            else:
                self.timeline.at(fault.at_s, self._went_away)
                self.timeline.at(fault.at_s + fault.for_s, self._came_back)
        heartbeat_s = self.config.router.heartbeat_s
        for number in range(len(self.workers)):
            self.timeline.at(self._rng.random() * heartbeat_s, self._beat, number)
        self.timeline.run(self._goes_on)

    def _goes_on(self) -> bool:
        """While requests are open. Heartbeats never end: raises RuntimeError when nothing else has happened for long."""
        if self._open <= 0:
            return False
        if self.timeline.num_events % _LOOK_EVERY == 0:
            done = (self._open, sum(w.output_tokens + w.prompt_tokens for w in self.workers), len(self.past))
            if self._in_flight and done == self._moved and self.timeline.now - self._moved_s > _STUCK_S:
                raise RuntimeError(f"{self._open} requests make no progress, at {self.timeline.now:.0f} s")
            if done != self._moved or not self._in_flight:
                self._moved, self._moved_s = done, self.timeline.now
        return True

    def settle(self, seconds: float = 2.0) -> None:
        """Let what is under way arrive: afterwards indexes hold what workers hold."""
        end = self.timeline.now + seconds
        over: list[None] = []
        self.timeline.at(end, lambda: over.append(None))
        self.timeline.run(lambda: not over)

    def check_at_rest(self) -> None:
        """Raise AssertionError unless no block, booking or place is held, and indexes are what workers hold."""
        for router in self.routers:
            router.check_at_rest()
        for worker in self.workers:
            if not worker.alive:
                continue
            left = (*worker.running, *worker.waiting, *range(worker.num_reserved))
            assert not left, worker.worker_id
            worker.pool.check(worker.tables())
            held = {block_hash for block_hash, _ in worker.pool.cached_hashes()}
            for router in self.routers:
                assert router.index.hashes(worker.worker_id) == held, worker.worker_id

    # --- requests ---------------------------------------------------------------------------------------------------

    def _arrive(self, job: Job) -> None:
        job.arrived_s = self.timeline.now
        self._in_flight += 1
        self._unplaced += 1
        self.routers[job.number % len(self.routers)].arrive(job)

    def _placed(self, job: Job) -> None:
        self._unplaced -= 1
        self._top_up()

    def _ended(self, job: Job) -> None:
        self._open -= 1
        self._in_flight -= 1
        if not job.placements:
            self._unplaced -= 1
        for follower in self._followers.get(job.number, ()):
            self.timeline.after(follower.asked.at_s, self._arrive, follower)
        self._top_up()

    def _top_up(self) -> None:
        due = self._keep_waiting - self._unplaced
        while due > 0 and self._next < len(self.jobs):
            job = self.jobs[self._next]
            self._next += 1
            if job.asked.after is None:
                self.timeline.after(0.0, self._arrive, job)
                due -= 1

    # --- workers ----------------------------------------------------------------------------------------------------

    def _name(self, number: int) -> str:
        first = self.config.prefill
        return f"p{number}" if number < first else f"d{number - first}"

    def _new_worker(self, number: int, epoch: int) -> Worker:
        role: Role = "prefill" if number < self.config.prefill else "decode"
        limits = self.config.limits
        if role == "prefill" and self.config.prefill_limits is not None:
            limits = self.config.prefill_limits
        worker = Worker(
            self._name(number),
            epoch,
            role,
            self.timeline,
            self.config.cost,
            limits,
            on_cache=self._cache_changed,
            on_room=self._tell_load,
        )
        self.publishers[worker.worker_id] = Publisher(
            worker,
            self.timeline,
            self.config.stream,
            self.routers,
            random.Random(f"{self.config.seed}/stream/{number}/{epoch}"),
            lambda: not self._redis_away,
        )
        return worker

    def _register(self, worker: Worker) -> None:
        if worker.alive:
            for router in self.routers:
                router.joined(worker)

    def _cache_changed(self, worker: Worker) -> None:
        publisher = self.publishers[worker.worker_id]
        if publisher.worker is worker:
            publisher.changed()

    def _read_snapshot(self, worker_id: str) -> tuple[int, int, list[Removed]] | None:
        publisher = self.publishers[worker_id]
        if not publisher.worker.alive:
            return None
        seq, held = publisher.snapshot()
        return publisher.worker.epoch, seq, held

    def _beat(self, number: int) -> None:
        worker = self.workers[number]
        if worker.alive:
            self._tell_load(worker)
        self.timeline.after(self.config.router.heartbeat_s, self._beat, number)

    def _tell_load(self, worker: Worker) -> None:
        load = worker.load()
        worker.cache_changed()  # streams have filled blocks since
        self.timeline.after(self.config.wires.message_s, self._hear, worker, load)

    def _hear(self, worker: Worker, load: Load) -> None:
        for router in self.routers:
            router.heard(worker, load)

    # --- faults -----------------------------------------------------------------------------------------------------

    def _die(self, fault: Fault) -> None:
        worker = self.workers[fault.worker]
        if not worker.alive:
            return
        worker.die()
        self.past.append(worker)
        for router in self.routers:
            self.timeline.after(self.config.detect_s, router.lost, worker)
        self.timeline.after(max(fault.for_s, self.config.detect_s), self._restart, fault.worker)

    def _restart(self, number: int) -> None:
        self.workers[number] = self._new_worker(number, self.workers[number].epoch + 1)
        self.timeline.after(self._rng.random() * POLL_S, self._register, self.workers[number])

    def _went_away(self) -> None:
        self._redis_away = True
        for router in self.routers:
            router.went_away()

    def _came_back(self) -> None:
        """It has lost everything."""
        self._redis_away = False
        for worker in self.workers:
            if worker.alive:
                self.publishers[worker.worker_id].republish()
        for router in self.routers:
            self.timeline.after(POLL_S, router.came_back)

    # --- looking ----------------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        alive = [worker for worker in self.workers if worker.alive]
        self.samples.append(
            Sample(
                at_s=self.timeline.now,
                line=sum(router.line.waiting for router in self.routers),
                waiting=sum(len(worker.waiting) for worker in alive),
                running=sum(len(worker.running) + worker.num_reserved for worker in alive),
                used_blocks=sum(w.pool.num_referenced for w in alive)
                / max(sum(w.limits.num_blocks for w in alive), 1),
            )
        )
        self.timeline.after(self._sample_s, self._sample)
