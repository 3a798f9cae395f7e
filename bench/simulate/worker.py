"""A worker of the simulated cluster: the rules of workers/engine/scheduler.py, steps that only take time.

The block pool is the real one. A step spends its budget as the scheduler does: streams that need their next token
first, then prompts that are being read, then those that wait; the youngest is preempted when blocks run out. Steps in
which nothing but streams go on are taken together, up to the next that changes the batch, so a token costs nothing by
itself: streams are counted by the number of the step at which they joined.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.simulate.cost import StepCost
from bench.simulate.jobs import Job
from bench.simulate.timeline import Event, Timeline
from workers.engine.block_pool import BlockPool
from workers.engine.pace import Pace
from workers.engine.scheduler import QUEUED_STEPS
from workers.protocol.messages import Load, PeerStatus, Role, Room, prefill_pairs

ROOT = bytes(16)  # the parent of a first block
# Tokens: blocks are told to the router in this unit, so that its weights mean what they always mean.
ROUTER_BLOCK = 16


@dataclass(frozen=True)
class Limits:
    num_blocks: int
    block_size: int  # tokens
    max_num_seqs: int
    max_num_batched_tokens: int

    @property
    def max_queued_tokens(self) -> int:
        """The engine's default."""
        return QUEUED_STEPS * self.max_num_batched_tokens

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs})"
            )


class Seq:
    """One request on one worker."""

    __slots__ = (
        "arrived_s",
        "cached_tokens",
        "computed",
        "decode_serial",
        "done",
        "fetched_tokens",
        "found",
        "hashes",
        "job",
        "join_computed",
        "join_done",
        "join_step",
        "known",
        "on_computed",
        "on_end",
        "on_first",
        "preemptions",
        "prefill_only",
        "state",
        "stored",
        "table",
        "turn",
    )

    def __init__(self, job: Job, block_size: int, now: float, *, prefill_only: bool = False) -> None:
        self.job = job
        self.done = job.done  # output tokens, those of earlier placements included
        self.known = job.known_tokens  # to be computed before the next token; grows when it is preempted
        self.computed = 0  # while it does not decode
        self.hashes = job.asked.hashes
        self.table: list[int] = []
        self.stored = 0  # blocks of the table that the prefix cache knows
        self.state = "new"  # waiting, reserved, committed, prefill, decode, prefilled, ended
        self.arrived_s = now
        self.prefill_only = prefill_only
        self.cached_tokens = 0  # found here when it was first taken up
        self.fetched_tokens = 0
        self.found = 0  # while it waits: tokens that the cache held when it began to
        self.preemptions = 0
        self.turn = -1  # its place among the running, unique; the youngest is preempted first
        self.decode_serial = (
            -1
        )  # `turn` while it decodes: of its entries in the worker's heaps; others are stale
        self.join_step = self.join_computed = self.join_done = 0
        self.on_first: Callable[[Seq], None] | None = None
        self.on_computed: Callable[[Seq], None] | None = None  # after each chunk
        self.on_end: Callable[[Seq], None] | None = None


class _Segment:
    """Steps that only go on with streams: when each of them ends, from what the first takes and each one adds."""

    __slots__ = ("event", "first_s", "more_s", "start_s", "steps", "taken")

    def __init__(self, start_s: float, steps: int, first_s: float, more_s: float) -> None:
        self.start_s = start_s
        self.steps = steps
        self.first_s = first_s
        self.more_s = more_s
        self.taken = 0  # steps that were taken into account
        self.event: Event | None = None

    def end_of(self, step: int) -> float:
        return self.start_s + step * self.first_s + self.more_s * (step * (step - 1) / 2)

    def ended_by(self, now: float) -> int:
        """Steps that have ended."""
        passed = now - self.start_s
        if self.more_s * self.steps < 1e-9 * self.first_s:
            guess = int(passed / self.first_s)
        else:
            half = self.first_s / self.more_s - 0.5
            guess = int(math.sqrt(half * half + 2 * passed / self.more_s) - half)
        guess = min(max(guess, self.taken), self.steps)
        while guess < self.steps and self.end_of(guess + 1) <= now:
            guess += 1
        while guess > self.taken and self.end_of(guess) > now:
            guess -= 1
        return guess


class Worker:
    """One life of one worker."""

    def __init__(
        self,
        worker_id: str,
        epoch: int,
        role: Role,
        timeline: Timeline,
        cost: StepCost,
        limits: Limits,
        *,
        on_cache: Callable[[Worker], None],
        on_room: Callable[[Worker], None],
    ) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.role = role
        self.limits = limits
        self.cost = cost
        self.pool = BlockPool(limits.num_blocks)
        self.alive = True
        self.running: dict[Seq, None] = {}  # oldest first
        self.prefilling: dict[Seq, None] = {}  # of these: those that read their prompt
        self.waiting: list[Seq] = []  # by arrival
        self.num_reserved = 0
        self.busy_s = 0.0
        self.preemptions = 0
        self.prompt_tokens = 0  # computed
        self.output_tokens = 0  # sampled
        self.refused: set[Room] = set()
        self.peers: dict[str, PeerStatus] = {}  # to whom it has sent
        self.pace = Pace()
        self.fills: list[list[int]] = []  # blocks held by those who load them, or send them elsewhere
        self._timeline = timeline
        self._on_cache = on_cache
        self._on_room = on_room
        self._size = limits.block_size
        self._scale = max(limits.block_size // ROUTER_BLOCK, 1)
        self._num_decoding = 0
        self._context = 0  # positions that the next step of all streams attends to
        self._steps = 0  # that streams have taken here
        self._turns = itertools.count()
        self._finishes: list[tuple[int, int, Seq]] = []  # (step, serial, stream)
        self._growths: list[tuple[int, int, Seq]] = []  # before the step after this one it needs a block
        self._segment: _Segment | None = None
        self._step: Event | None = None  # the end of a step that computes prompts
        self._chunks: list[tuple[Seq, int]] = []
        self._kicked: Event | None = None

    # --- what routers ask -------------------------------------------------------------------------------------------

    def uncached_tokens(self, seq: Seq) -> int:
        return seq.known - len(self._match(seq)) * self._size

    def lacks(self, seq: Seq, *, computed_here: bool) -> Room | None:
        """Scheduler.lacks."""
        self.sync()
        need = self._blocks_taken(seq, self._match(seq))
        owed = self._blocks_owed(self.waiting) + self._blocks_owed(self.prefilling)
        fits = need + owed <= self.pool.num_free
        is_long = computed_here and self._queued_tokens() >= self.limits.max_queued_tokens
        if self._has_seat and fits and not is_long:
            return None
        return Room(int(not self._has_seat), 0 if fits else need * self._scale, int(is_long))

    def add(self, seq: Seq) -> None:
        """Compute it here from its first uncached token on."""
        self.sync()
        self._enqueue(seq)
        self._kick()

    def reserve(self, seq: Seq) -> int | None:
        """Blocks for all its known tokens; answers how many are cached, None when something is lacking."""
        if self.lacks(seq, computed_here=False) is not None:
            return None
        matched = self._match(seq)
        self._take(seq, matched)
        grown = self._grow(seq, seq.known)
        assert grown
        seq.state = "reserved"
        self.num_reserved += 1
        self._kick()
        return len(matched)

    def commit(self, seq: Seq) -> None:
        """All its blocks have arrived, and its next token with them."""
        assert seq.state == "reserved", seq.state
        self.sync()
        self.num_reserved -= 1
        seq.state = "committed"
        seq.computed = seq.known
        self._store(seq, seq.computed)
        seq.done += 1
        self._run(seq)
        if seq.on_first is not None:
            seq.on_first(seq)
        if seq.done >= seq.job.asked.output_tokens:
            self._end(seq)
        else:
            self._join(seq)
        self._on_cache(self)
        self._kick()

    def cancel(self, seq: Seq) -> None:
        """Idempotent. Tokens of a step that runs are lost."""
        if seq.state in ("ended", "new"):
            seq.state = "ended"
            return
        self.sync()
        seq.on_end = seq.on_first = seq.on_computed = None
        self._chunks = [(other, count) for other, count in self._chunks if other is not seq]
        self._end(seq)
        self._tell_room()
        self._kick()

    def refuse(self, lacks: Room) -> None:
        self.refused.add(lacks)

    def room(self) -> Room:
        """Scheduler.room."""
        owed = self._blocks_owed(self.waiting) + self._blocks_owed(self.prefilling)
        seats = self.limits.max_num_seqs - len(self.running) - self.num_reserved - len(self.waiting)
        return Room(
            requests=max(seats, 0),
            blocks=max(self.pool.num_free - owed, 0) * self._scale,
            tokens=max(self.limits.max_queued_tokens - self._queued_tokens(), 0),
        )

    def _tell_room(self) -> None:
        """Serving._room."""
        if not self.refused:
            return
        room = self.room()
        if any(room.covers(lacks) for lacks in self.refused):
            self.refused.clear()
            self._on_room(self)

    def load(self) -> Load:
        self.sync()
        scale = self._scale
        queued = [(seq.known - seq.found, seq.known) for seq in self.waiting]
        queued += [(seq.known - seq.computed, seq.known) for seq in self.prefilling]
        return Load(
            running=len(self.running),
            waiting=len(self.waiting),
            reserved=self.num_reserved,
            queued_prefill_tokens=sum(count for count, _ in queued if count > 1),
            queued_prefill_pairs=sum(prefill_pairs(count, known) for count, known in queued if count > 1),
            active_blocks=self.pool.num_referenced * scale,
            cached_blocks=self.pool.num_cached * scale,
            free_blocks=self.pool.num_free * scale,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            preemptions=self.preemptions,
            prefill_token_s=self.pace.token_s or 0.0,
            prefill_pair_s=self.pace.pair_s,
            decode_step_s=self.pace.decode_step_s or 0.0,
            peers=self.peers,
            room=self.room(),
        )

    def holds(self, block_hash: bytes) -> bool:
        return bool(self.pool.match((block_hash,)))

    def cache_changed(self) -> None:
        self._on_cache(self)

    def die(self) -> None:
        """Nothing of this life happens any more. What its streams have written so far is told right."""
        self.sync()
        for seq in self.running:
            if seq.state == "decode":
                self._materialize(seq)
        if self._segment is not None:
            self.busy_s += self._timeline.now - self._segment.end_of(self._segment.taken)
        if self._step is not None:
            self.busy_s -= self._step.when - self._timeline.now
        self.alive = False
        for event in (self._step, self._kicked, None if self._segment is None else self._segment.event):
            if event is not None:
                event.cancel()
        self._segment = None

    # --- steps ------------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Take into account the steps that have ended by now."""
        segment = self._segment
        if segment is not None:
            self._take_steps(segment, segment.ended_by(self._timeline.now))

    def _take_steps(self, segment: _Segment, ended: int) -> None:
        steps = ended - segment.taken
        if steps > 0:
            taken_s = segment.end_of(ended) - segment.end_of(segment.taken)
            self.busy_s += taken_s
            self.pace.decodes(taken_s / steps, steps)
            segment.taken = ended  # first: what follows from it may ask again
            self._advance(steps)

    def _kick(self) -> None:
        """The batch may change: a segment ends with the step that runs, and an idle worker begins at once."""
        segment = self._segment
        if segment is not None:
            if segment.taken + 1 < segment.steps:
                assert segment.event is not None
                segment.event.cancel()
                segment.steps = segment.taken + 1
                segment.event = self._timeline.at(segment.end_of(segment.steps), self._segment_ended)
        elif self._step is None and self._kicked is None:
            # Not here and now: whoever called is in the middle of something.
            self._kicked = self._timeline.at(self._timeline.now, self._start)

    def _start(self) -> None:
        self._kicked = None
        if self._segment is None and self._step is None:
            self._next_step()

    def _segment_ended(self) -> None:
        segment = self._segment
        assert segment is not None
        self._take_steps(segment, segment.steps)
        self._segment = None
        self._on_cache(self)
        self._next_step()

    def _next_step(self) -> None:
        """scheduler.schedule(), and how long it takes."""
        preempted = self._grow_streams()
        budget = self.limits.max_num_batched_tokens - self._num_decoding
        chunks: list[tuple[Seq, int]] = []
        pairs = 0.0
        for seq in list(self.prefilling):
            if seq.state != "prefill" or budget <= 0:
                continue
            count = min(seq.known - seq.computed, budget)
            while not self._grow(seq, seq.computed + count):
                preempted = True
                victim = next(reversed(self.running))
                budget += 1 if victim.state == "decode" else sum(c for s, c in chunks if s is victim)
                chunks = [(other, c) for other, c in chunks if other is not victim]
                self._preempt(victim)
                if victim is seq:
                    break
            if seq.state == "prefill":
                chunks.append((seq, count))
                budget -= count
        seats = self.limits.max_num_seqs - self.num_reserved
        while self.waiting and budget > 0 and len(self.running) < seats and not preempted:
            seq = self.waiting[0]
            matched = self._match(seq)
            if self._blocks_taken(seq, matched) + self._blocks_owed(self.prefilling) > self.pool.num_free:
                break
            cached = len(matched) * self._size
            count = min(seq.known - cached, budget)
            del self.waiting[0]
            self._take(seq, matched)
            seq.computed = cached
            seq.state = "prefill"
            self.prefilling[seq] = None
            self._run(seq)
            grown = self._grow(seq, cached + count)
            assert grown
            chunks.append((seq, count))
            budget -= count
        if chunks:
            tokens = 0
            for seq, count in chunks:
                tokens += count
                pairs += count * (seq.computed + count / 2)
            seconds = self.cost.step_s(tokens, pairs, self._num_decoding, self._context)
            self.busy_s += seconds
            samples = self._num_decoding + sum(seq.computed + count >= seq.known for seq, count in chunks)
            if tokens + self._num_decoding - samples >= max(samples, self._size):
                self.pace.prompts(tokens + self._num_decoding, pairs + self._context, seconds)
            self._chunks = chunks
            self._step = self._timeline.after(seconds, self._step_ended)
        elif self._num_decoding:
            # Nobody who waits was let in beside a preemption; the step after it looks again.
            self._begin_segment(1 if preempted else None)

    def _step_ended(self) -> None:
        self._step = None
        chunks, self._chunks = self._chunks, []
        if self._num_decoding:
            self._advance(1)
        for seq, count in chunks:
            if seq.state != "prefill":
                continue  # it was cancelled meanwhile
            seq.computed += count
            self.prompt_tokens += count
            self._store(seq, seq.computed)
            if seq.computed >= seq.known:
                self._sampled(seq)
            elif seq.on_computed is not None:
                seq.on_computed(seq)
        self._on_cache(self)
        self._tell_room()
        self._next_step()

    def _sampled(self, seq: Seq) -> None:
        """The last known token is computed: one more is there."""
        del self.prefilling[seq]
        seq.done += 1
        self.output_tokens += 1
        if seq.prefill_only:
            del self.running[seq]
            seq.state = "prefilled"
            if seq.on_computed is not None:
                seq.on_computed(seq)
            return
        if seq.on_first is not None:
            seq.on_first(seq)
        if seq.done >= seq.job.asked.output_tokens:
            self._end(seq)
        else:
            self._join(seq)

    def _begin_segment(self, most: int | None) -> None:
        """As many steps as change nothing but the lengths of the streams; at most so many."""
        while self._finishes[0][2].decode_serial != self._finishes[0][1]:
            heapq.heappop(self._finishes)
        steps = self._finishes[0][0] - self._steps
        if most is not None:
            steps = min(steps, most)
        # Within so many steps every stream finds its blocks; beyond, one after the other is looked at.
        safe = (self.pool.num_free // self._num_decoding - 1) * self._size
        if safe < steps:
            while self._growths and self._growths[0][2].decode_serial != self._growths[0][1]:
                heapq.heappop(self._growths)
            first = self._growths[0][0] - self._steps if self._growths else steps
            steps = min(steps, max(safe, first, 1))
        number = self._num_decoding
        segment = self._segment = _Segment(
            self._timeline.now,
            steps,
            self.cost.step_s(0, 0, number, self._context),
            self.cost.context_s * number,
        )
        segment.event = self._timeline.at(segment.end_of(steps), self._segment_ended)

    def _advance(self, steps: int) -> None:
        """All streams have gone on by so many tokens."""
        self._steps += steps
        self.output_tokens += steps * self._num_decoding
        self._context += steps * self._num_decoding
        ended = []
        while self._finishes and self._finishes[0][0] <= self._steps:
            _, serial, seq = heapq.heappop(self._finishes)
            if seq.decode_serial == serial:
                ended.append(seq)
        # Growths before the ends: within these steps both needed their blocks.
        while self._growths and self._growths[0][0] < self._steps:
            self._grow_stream(*heapq.heappop(self._growths))
        for seq in ended:
            self._materialize(seq)
            assert seq.done == seq.job.asked.output_tokens, (seq.done, seq.job.asked)
            self._store(seq, seq.computed)
            self._end(seq)
        if ended:
            self._tell_room()

    # --- streams ----------------------------------------------------------------------------------------------------

    def _join(self, seq: Seq) -> None:
        seq.state = "decode"
        serial = seq.decode_serial = seq.turn
        # A step that runs is not one of its own.
        segment = self._segment
        is_running = self._step is not None or (segment is not None and segment.taken < segment.steps)
        first = self._steps + (1 if is_running else 0)
        seq.join_step, seq.join_computed, seq.join_done = first, seq.computed, seq.done
        late = first - self._steps
        self._num_decoding += 1
        self._context += seq.computed + 1 - late
        self.output_tokens -= late  # the step that runs will count one for each stream
        heapq.heappush(self._finishes, (first + seq.job.asked.output_tokens - seq.done, serial, seq))
        heapq.heappush(self._growths, (first + len(seq.table) * self._size - seq.computed, serial, seq))

    def _run(self, seq: Seq) -> None:
        seq.turn = next(self._turns)
        self.running[seq] = None

    def _materialize(self, seq: Seq) -> None:
        """Its counters, from the number of steps."""
        steps = max(self._steps - seq.join_step, 0)
        seq.computed = seq.join_computed + steps
        seq.done = seq.join_done + steps

    def _leave(self, seq: Seq) -> None:
        self._materialize(seq)
        self._num_decoding -= 1
        self._context -= seq.join_computed + 1 + self._steps - seq.join_step
        self.output_tokens += max(seq.join_step - self._steps, 0)
        seq.decode_serial = -1

    def _grow_streams(self) -> bool:
        """Blocks for the next token of each stream. True: somebody had to be preempted."""
        before = self.preemptions
        growths = self._growths
        while growths and growths[0][0] <= self._steps:
            self._grow_stream(*heapq.heappop(growths))
        return self.preemptions > before

    def _grow_stream(self, step: int, serial: int, seq: Seq) -> None:
        if seq.decode_serial != serial:
            return
        self._store(seq, len(seq.table) * self._size)
        while True:
            fresh = self.pool.allocate(1)
            if fresh is not None:
                seq.table += fresh
                heapq.heappush(self._growths, (step + self._size, serial, seq))
                return
            victim = next(reversed(self.running))
            self._preempt(victim)
            if victim is seq:
                return

    # --- parts ------------------------------------------------------------------------------------------------------

    @property
    def _has_seat(self) -> bool:
        return len(self.running) + self.num_reserved + len(self.waiting) < self.limits.max_num_seqs

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._size)

    def _blocks_taken(self, seq: Seq, matched: list[int]) -> int:
        cached = self.pool.num_free - self.pool.num_available(matched)
        return self._blocks_for(seq.known) - len(matched) + cached

    def _blocks_owed(self, seqs: Iterable[Seq]) -> int:
        return sum(max(self._blocks_for(seq.known) - len(seq.table), 0) for seq in seqs)

    def _queued_tokens(self) -> int:
        behind = (seq.known - seq.computed for seq in self.prefilling)
        waiting = sum(seq.known - seq.found for seq in self.waiting)
        return waiting + sum(count for count in behind if count > 1)

    def _match(self, seq: Seq) -> list[int]:
        return self.pool.match(seq.hashes[: (seq.known - 1) // self._size])

    def _take(self, seq: Seq, matched: list[int]) -> None:
        self.pool.acquire(matched)
        seq.table = matched
        seq.stored = len(matched)
        if not seq.preemptions:
            seq.cached_tokens = len(matched) * self._size

    def _grow(self, seq: Seq, num_tokens: int) -> bool:
        missing = self._blocks_for(num_tokens) - len(seq.table)
        if missing <= 0:
            return True
        fresh = self.pool.allocate(missing)
        if fresh is None:
            return False
        seq.table += fresh
        return True

    def _store(self, seq: Seq, computed: int) -> None:
        full = min(computed // self._size, len(seq.hashes))
        store, hashes, table = self.pool.store, seq.hashes, seq.table
        for at in range(seq.stored, full):
            store(table[at], hashes[at], hashes[at - 1] if at else ROOT)
        seq.stored = max(seq.stored, full)

    def _enqueue(self, seq: Seq) -> None:
        seq.state = "waiting"
        seq.found = len(self._match(seq)) * self._size
        at = len(self.waiting)
        while at and self.waiting[at - 1].arrived_s > seq.arrived_s:
            at -= 1
        self.waiting.insert(at, seq)

    def _preempt(self, seq: Seq) -> None:
        if seq.state == "decode":
            self._leave(seq)
        else:
            del self.prefilling[seq]
        del self.running[seq]
        self.pool.release(seq.table)
        seq.table, seq.stored, seq.computed = [], 0, 0
        seq.known = seq.job.asked.prompt_tokens + seq.done
        seq.preemptions += 1
        seq.job.preemptions += 1
        self.preemptions += 1
        self._enqueue(seq)

    def _end(self, seq: Seq) -> None:
        """The one way out."""
        if seq.state == "decode":
            self._leave(seq)
        elif seq.state == "prefill":
            self.prefilling.pop(seq, None)
        elif seq.state == "waiting":
            self.waiting.remove(seq)
        elif seq.state == "reserved":
            self.num_reserved -= 1
        self.running.pop(seq, None)
        self.pool.release(seq.table)
        seq.table = []
        seq.state = "ended"
        if seq.on_end is not None:
            seq.on_end(seq)

    def tables(self) -> list[list[int]]:
        """For BlockPool.check at rest: nothing is reserved, and nothing is being sent."""
        return [*(seq.table for seq in self.running), *self.fills]
