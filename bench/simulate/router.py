"""A router replica in simulated time: the steps of router/dispatch.py, with the real index, policy and book.

What is not here is what a network does between them: frames take a fixed time, and streams tell only of their first
token and of their end.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.simulate.jobs import Job
from bench.simulate.network import HandOver, Network, fetch
from bench.simulate.timeline import Timeline
from bench.simulate.worker import ROUTER_BLOCK, Seq, Worker
from router.admission.line import Entry, Line
from router.config import RouterConfig
from router.generation import GenerationError
from router.load import Booking, LoadBook
from router.policy import Choice, Demand, Policy, Score, WorkerView, fetch_from
from router.prefix_index import CachedPrefix, PrefixIndex
from router.room import Refusal
from router.roster import Listed, Roster, Sorts, Usable
from workers.protocol.messages import IndexBatch, KvLayout, Load, Room, WorkerInfo
from workers.protocol.tiers import Removed

_EXCLUDED_S = 1.0
POLL_S = 0.25  # between two looks at the registry
_MODEL = bytes(16)  # hash root: there is one model


@dataclass(slots=True, eq=False)
class Link:
    worker: Worker
    refusal: Refusal | None = None
    synced: bool = False  # the index holds what the worker published

    def may_take(self, num_blocks: int) -> bool:
        return self.refusal is None or not self.refusal.refuses(num_blocks)


class Attempt:
    """One placement of a job."""

    def __init__(
        self, job: Job, entry: Entry, choice: Choice, decode: Worker, seq: Seq, booking: Booking
    ) -> None:
        self.job = job
        self.entry = entry
        self.choice = choice
        self.decode = decode
        self.seq = seq
        self.prefill: Worker | None = None
        self.read: Seq | None = None
        self.taken = False
        self.ended = False
        self._booking = booking
        self._prefill_booking: Booking | None = None

    def book_prefill(self, booking: Booking) -> None:
        self.end_prefill()
        self._prefill_booking = booking

    def end_prefill(self) -> None:
        booking, self._prefill_booking = self._prefill_booking, None
        if booking is not None:
            booking.release()

    def release(self) -> None:
        self.ended = True
        self.end_prefill()
        self._booking.release()


class Router:
    def __init__(
        self,
        timeline: Timeline,
        network: Network,
        config: RouterConfig,
        policy: Policy,
        rng: random.Random,
        *,
        exact: bool,
        block_size: int,
        token_bytes: float,
        fetching: bool,
        on_placed: Callable[[Job], None],
        on_end: Callable[[Job], None],
        read_snapshot: Callable[[str], tuple[int, int, list[Removed]] | None],
    ) -> None:
        """`exact`: the policy sees caches and queues themselves. `read_snapshot`: (epoch, seq, held) of a worker."""
        self.index = PrefixIndex()
        self.book = LoadBook(clock=lambda: timeline.now, window_s=config.policy.heat_window_s)
        self.line = Line(config.admission)
        self.links: dict[str, Link] = {}
        self.decision_s: list[float] = []  # of the real processor: look-up, views and policy
        self.num_snapshots = 0
        self.redis_away = False
        self._timeline = timeline
        self._network = network
        self._message_s = network.wires.message_s
        self._config = config
        self._policy = policy
        standing = policy.standing if isinstance(policy, Sorts) else None
        self._roster = Roster(self.book, standing, rng)
        self._exact = exact
        self._block_size = block_size
        self._token_bytes = int(token_bytes)
        self._fetching = fetching
        self._on_placed = on_placed
        self._on_end = on_end
        self._read_snapshot = read_snapshot
        self._attempts: dict[Attempt, None] = {}
        self._entries: dict[Entry, Job] = {}

    # --- what workers and index tell --------------------------------------------------------------------------------

    def joined(self, worker: Worker) -> None:
        """It has registered, and its link is up."""
        self.links[worker.worker_id] = Link(worker)
        self._roster.enlist(self._info(worker))
        self.snapshot(worker.worker_id)
        self.heard(worker, Load(free_blocks=worker.limits.num_blocks * self._scale(worker)))

    def lost(self, worker: Worker) -> None:
        """The link has ended, and with it whatever ran there."""
        link = self.links.get(worker.worker_id)
        if link is None or link.worker is not worker:
            return
        del self.links[worker.worker_id]
        self._roster.strike(worker.worker_id)
        self.book.forget(worker.worker_id)
        self.index.drop(worker.worker_id)
        for attempt in list(self._attempts):
            read = attempt.read
            reading = attempt.prefill is worker and read is not None and read.state != "ended"
            if attempt.decode is worker or reading:
                self._failed(attempt, worker)

    def heard(self, worker: Worker, load: Load) -> None:
        link = self.links.get(worker.worker_id)
        if link is None or link.worker is not worker:
            return
        if link.refusal is not None and link.refusal.is_over(load):
            link.refusal = None
        self.book.report(worker.worker_id, load)
        if worker.role == "decode" and link.refusal is None:
            self._room(load.room or worker.room())

    def index_batch(self, batch: IndexBatch) -> None:
        if self.index.apply(batch):
            self.snapshot(batch.worker_id)

    def index_lost(self, worker_id: str, epoch: int, seq: int) -> None:
        def look() -> None:
            position = self.index.position(worker_id, epoch)
            if position is not None and position < seq:
                self.snapshot(worker_id)

        self._timeline.after(2 * POLL_S, look)

    def snapshot(self, worker_id: str) -> None:
        found = None if self.redis_away else self._read_snapshot(worker_id)
        link = self.links.get(worker_id)
        if found is None or link is None:
            return
        epoch, seq, held = found
        if epoch == link.worker.epoch and self.index.load_snapshot(worker_id, epoch, seq, held):
            link.synced = True
            self.num_snapshots += 1

    def went_away(self) -> None:
        """Redis."""
        self.redis_away = True
        for link in self.links.values():
            link.synced = False

    def came_back(self) -> None:
        self.redis_away = False
        for worker_id in list(self.links):
            self.snapshot(worker_id)

    # --- the life of a request --------------------------------------------------------------------------------------

    def arrive(self, job: Job) -> None:
        entry = Entry(
            need_blocks=job.known_tokens // ROUTER_BLOCK + 1,
            work=lambda: self._work(job),
            resumed=job.placements > 0,
        )
        self._entries[entry] = job
        try:
            if self.line.enter(entry, self._timeline.now):
                self._place(entry)
        except GenerationError:
            self._refused(entry)

    def _work(self, job: Job) -> float:
        found = self.index.match(job.hashes(self._block_size)).values()
        cached = max((prefix.blocks for prefix in found), default=0) * self._block_size
        return max(job.known_tokens - cached, 0) + job.asked.output_tokens - job.done

    def _place(self, entry: Entry) -> None:
        """It is let try."""
        job = self._entries[entry]
        choice = self._choose(job)
        if choice is None:
            self._wait(entry, job)
            return
        link = self.links[choice.decode.worker_id]
        seq = Seq(job, self._block_size, self._timeline.now)
        booking = self.book.book(choice.decode.worker_id, decode_blocks=job.known_tokens // ROUTER_BLOCK + 1)
        attempt = Attempt(job, entry, choice, link.worker, seq, booking)
        self._book_prefill(attempt, choice.prefill or choice.decode)
        self._attempts[attempt] = None
        self._timeline.after(self._message_s, self._reserve, attempt)

    def _choose(self, job: Job) -> Choice | None:
        began = time.thread_time()
        now = self._timeline.now
        excluded = {worker for worker, until in job.excluded.items() if until > now}
        need = job.known_tokens // ROUTER_BLOCK + 1
        if not any(link.worker.role == "decode" and link.may_take(need) for link in self.links.values()):
            return None
        choice = self._policy.choose(self._demand(job), self.views(need), excluded)
        self.decision_s.append(time.thread_time() - began)
        return choice

    def _demand(self, job: Job) -> Demand:
        hashes = job.hashes(self._block_size)
        found = self._look(hashes) if self._exact else self.index.match(hashes)
        return Demand(job.known_tokens, self._block_size, found, self._token_bytes)

    def views(self, num_blocks: int = 1) -> Usable | Listed:
        if self._exact:
            links = [link for link in self.links.values() if link.may_take(num_blocks)]
            seen = [self._exact_view(link.worker) for link in links]
            return Listed(seen, lambda view, pool: 0.0, random.Random(0))
        return self._roster.views(_MODEL, lambda worker_id: self._is_usable(worker_id, num_blocks))

    def _is_usable(self, worker_id: str, num_blocks: int) -> bool:
        link = self.links.get(worker_id)
        return link is not None and link.may_take(num_blocks)

    def _info(self, worker: Worker) -> WorkerInfo:
        limits = worker.limits
        return WorkerInfo(
            worker_id=worker.worker_id,
            epoch=worker.epoch,
            role=worker.role,
            address=f"{self._network.host(worker.worker_id)}:1",
            model="simulated",
            layout=KvLayout(1, 1, 1, limits.block_size, "bfloat16", ""),
            hash_root=_MODEL,
            num_blocks=limits.num_blocks,
            max_model_len=limits.num_blocks * limits.block_size,
            max_num_seqs=limits.max_num_seqs,
            vocab_size=1,
            device="simulated",
            pid=0,
        )

    def _exact_view(self, worker: Worker) -> WorkerView:
        load = worker.load()
        # What was sent and has not arrived is known as well.
        booked = self.book.booked(worker.worker_id)
        return WorkerView(
            worker_id=worker.worker_id,
            role=worker.role,
            queued_prefill_tokens=max(load.queued_prefill_tokens, booked.prefill_tokens),
            active_blocks=max(load.active_blocks, booked.decode_blocks),
        )

    def _look(self, hashes: Sequence[bytes]) -> dict[str, CachedPrefix]:
        found = {}
        for worker_id, link in self.links.items():
            if (depth := longest(link.worker, hashes)) > 0:
                found[worker_id] = CachedPrefix(depth)
        return found

    def _wait(self, entry: Entry, job: Job) -> None:
        now = self._timeline.now
        excluded = [
            job.excluded.get(worker_id, 0.0)
            for worker_id, link in self.links.items()
            if link.worker.role == "decode" and link.may_take(job.known_tokens // ROUTER_BLOCK + 1)
        ]
        pause_s = min(excluded) - now if excluded else 0.0
        if excluded and pause_s > 0:
            self._try_all(self.line.aside(entry, now))
            self._timeline.after(pause_s, self._again, entry)
            return
        try:
            self.line.no_room(entry, now)
        except GenerationError:
            self._refused(entry)

    def _again(self, entry: Entry) -> None:
        if entry in self._entries and self.line.again(entry, self._timeline.now):
            self._place(entry)

    def _room(self, room: Room) -> None:
        reads_elsewhere = any(link.worker.role == "prefill" for link in self.links.values())
        woken = self.line.room(
            room.blocks,
            self._timeline.now,
            requests=room.requests,
            tokens=math.inf if reads_elsewhere else room.tokens,
        )
        self._drop_late()
        self._try_all(woken)

    def _try_all(self, woken: list[Entry]) -> None:
        for entry in woken:
            self._timeline.after(
                0.0, self._place, entry
            )  # not here: whoever called is in the middle of something

    def _drop_late(self) -> None:
        for entry in self.line.expired(self._timeline.now):
            self._refused(entry)

    def _refused(self, entry: Entry) -> None:
        job = self._entries.pop(entry)
        self._end(job, "refused")

    def _end(self, job: Job, outcome: str) -> None:
        job.outcome = outcome
        job.ended_s = self._timeline.now
        self._on_end(job)

    # --- at D (after a frame's time) --------------------------------------------------------------------------------

    def _reserve(self, attempt: Attempt) -> None:
        """Serving.reserve: the decode worker looks whether a prefix elsewhere is worth fetching, then takes it or not."""
        if attempt.ended:
            return
        decode, seq = attempt.decode, attempt.seq
        holder = self._holder(attempt.choice.demand, decode)
        if holder is not None:
            rest = seq.known - holder[1] * self._block_size
            enough = rest <= attempt.choice.local_prefill_max
            if enough and fetch(
                self._network, self._timeline, decode, seq, holder[0], lambda: self._at_decode(attempt)
            ):
                return
        self._at_decode(attempt)

    def _at_decode(self, attempt: Attempt) -> None:
        decode, seq = attempt.decode, attempt.seq
        if attempt.ended or not decode.alive:
            return
        here = decode.uncached_tokens(seq) <= attempt.choice.local_prefill_max
        lacks = decode.lacks(seq, computed_here=here)
        first_block: int | None = None
        if lacks is not None:
            decode.refuse(lacks)
        else:
            self._watch(attempt)
            if here:
                decode.add(seq)
            else:
                first_block = decode.reserve(seq)
        self._timeline.after(self._message_s, self._answered, attempt, lacks, first_block)

    def _watch(self, attempt: Attempt) -> None:
        attempt.seq.on_first = lambda seq: self._first(attempt)
        attempt.seq.on_end = lambda seq: self._last(attempt)

    def _first(self, attempt: Attempt) -> None:
        self._timeline.after(self._message_s, self._first_token, attempt)

    def _last(self, attempt: Attempt) -> None:
        self._timeline.after(self._message_s, self._finished, attempt)

    # --- back at the router -----------------------------------------------------------------------------------------

    def _answered(self, attempt: Attempt, lacks: Room | None, first_block: int | None) -> None:
        if attempt.ended:
            return
        if lacks is not None:
            link = self.links.get(attempt.decode.worker_id)
            if link is not None:
                link.refusal = Refusal.of(lacks, link.refusal)
            self._drop(attempt)
            self._place(attempt.entry)
            return
        job = attempt.job
        attempt.taken = True
        self._entries.pop(attempt.entry)
        self._try_all(self.line.placed(attempt.entry, self._timeline.now))
        if not job.placements:
            job.placed_s = self._timeline.now
            self._ask_oracle(attempt)
            self._on_placed(job)
        job.placements += 1
        job.worker = attempt.decode.worker_id
        if first_block is None:
            if attempt.seq.done == job.done:  # its first token is not there yet
                self._book_prefill(attempt, attempt.choice.decode)
            self._note_routed(job, attempt.decode)
            return
        self._start_prefill(attempt, first_block)

    def _start_prefill(self, attempt: Attempt, first_block: int) -> None:
        job, now = attempt.job, self._timeline.now
        score = attempt.choice.prefill
        if score is None or score.worker_id not in self.links:
            excluded = {worker for worker, until in job.excluded.items() if until > now}
            score = self._policy.choose_prefill(self._demand(job), self.views(), excluded)
        if score is None:
            self._failed(attempt, None)
            return
        prefill = self.links[score.worker_id].worker
        self._book_prefill(attempt, score)
        read = Seq(job, self._block_size, now, prefill_only=True)
        attempt.prefill, attempt.read = prefill, read
        HandOver(self._network, prefill, read, attempt.decode, attempt.seq, first_block, lambda: None)
        self._timeline.after(self._message_s, self._at_prefill, attempt)
        self._note_routed(job, attempt.decode)
        self._note_routed(job, prefill)

    def _at_prefill(self, attempt: Attempt) -> None:
        """Serving.prefill."""
        prefill, read = attempt.prefill, attempt.read
        assert prefill is not None
        assert read is not None
        if attempt.ended or not prefill.alive:
            return

        def compute() -> None:
            if not attempt.ended and prefill.alive:
                prefill.add(read)

        holder = self._holder(attempt.choice.demand, prefill)
        if holder is None or not fetch(self._network, self._timeline, prefill, read, holder[0], compute):
            compute()

    def _first_token(self, attempt: Attempt) -> None:
        if attempt.ended:
            return
        attempt.end_prefill()
        job = attempt.job
        if job.first_token_s < 0:
            job.first_token_s = self._timeline.now
            seq = attempt.read or attempt.seq
            job.cached_tokens, job.fetched_tokens = seq.cached_tokens, seq.fetched_tokens

    def _finished(self, attempt: Attempt) -> None:
        if attempt.ended:
            return
        attempt.job.done = attempt.seq.done
        self._drop(attempt)
        self._end(attempt.job, "finished")

    def _drop(self, attempt: Attempt) -> None:
        """The attempt has ended: dispatch._release."""
        del self._attempts[attempt]
        attempt.release()

    def _failed(self, attempt: Attempt, blamed: Worker | None) -> None:
        """Go on elsewhere with what the client has seen."""
        job, now = attempt.job, self._timeline.now
        if attempt.taken:
            job.done = max(job.done, attempt.seq.done)
        self._drop(attempt)
        for worker, seq in ((attempt.decode, attempt.seq), (attempt.prefill, attempt.read)):
            if worker is not None and seq is not None and worker.alive:
                worker.cancel(seq)
        job.failures += 1
        if blamed is not None:
            job.excluded[blamed.worker_id] = now + _EXCLUDED_S
        if job.done >= job.asked.output_tokens:
            self._end(job, "finished")  # its last token was on its way
        elif job.failures >= self._config.admission.max_attempts:
            if not attempt.taken:
                self._give_up(attempt.entry)
            self._end(job, "failed")
        elif attempt.taken:
            self.arrive(job)
        else:
            self._place(attempt.entry)

    def _give_up(self, entry: Entry) -> None:
        self._entries.pop(entry, None)
        self._try_all(self.line.leave(entry, self._timeline.now))

    # --- parts ------------------------------------------------------------------------------------------------------

    def _book_prefill(self, attempt: Attempt, score: Score) -> None:
        elsewhere = score.worker_id != attempt.decode.worker_id
        attempt.book_prefill(
            self.book.book(
                score.worker_id,
                prefill_tokens=score.prefill_tokens,
                prompt_tokens=score.prompt_tokens,
                requests=int(elsewhere),
            )
        )

    def _holder(self, demand: Demand, worker: Worker) -> tuple[Worker, int] | None:
        if not self._fetching:
            return None
        least = self._config.policy.fetch_min_tokens
        found = fetch_from(demand, worker.worker_id, lambda other: other in self.links, least)
        return None if found is None else (self.links[found[0]].worker, found[1])

    def _note_routed(self, job: Job, worker: Worker) -> None:
        link = self.links.get(worker.worker_id)
        if link is not None and not link.synced:
            self.index.note_routed(
                worker.worker_id, worker.epoch, job.hashes(self._block_size), worker.limits.num_blocks
            )

    def _ask_oracle(self, attempt: Attempt) -> None:
        """What somebody who knows all caches at this moment could have had for the request without computing it."""
        job, size = attempt.job, self._block_size
        usable = job.prompt_hashes[: (job.known_tokens - 1) // size]
        best = {"prefill": 0, "decode": 0}
        for link in self.links.values():
            best[link.worker.role] = longest(link.worker, usable, best[link.worker.role])
        if self._fetching or job.known_tokens - best["decode"] * size <= attempt.choice.local_prefill_max:
            job.oracle_tokens = max(best.values()) * size
        else:
            job.oracle_tokens = best["prefill"] * size

    @staticmethod
    def _scale(worker: Worker) -> int:
        return max(worker.limits.block_size // ROUTER_BLOCK, 1)

    def check_at_rest(self) -> None:
        """Raise AssertionError unless everything was given back."""
        assert not self._attempts, self._attempts
        assert not self._entries, self._entries
        assert self.book.num_open == 0, self.book.num_open
        assert self.line.waiting == 0, self.line.waiting


def longest(worker: Worker, hashes: Sequence[bytes], known: int = 0) -> int:
    """Blocks of the prefix that a worker holds, if more than `known`; what a pool holds is prefix-closed."""
    holds = worker.holds
    if known >= len(hashes) or not holds(hashes[known]):
        return known
    low, high = known + 1, len(hashes)  # hashes[low - 1] is held
    while low < high:
        middle = (low + high) // 2
        if holds(hashes[middle]):
            low = middle + 1
        else:
            high = middle
    return low
