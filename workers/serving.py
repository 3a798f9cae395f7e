"""The requests of one worker: from a router's messages to the engine, and from the engine's steps back.

Everything here runs under the engine's lock, so an answer is sent before anybody can see the next state, and tokens of
a request leave in order whichever thread made them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Protocol

import msgspec

from workers.config import WorkerConfig
from workers.engine.engine import CannotServe, Engine, StepFailed
from workers.engine.plan import StepResult
from workers.engine.request import NewToken, Request, State
from workers.metrics import WorkerMetrics
from workers.prefix_loader import Loaded, PrefixLoader
from workers.protocol.messages import (
    Accepted,
    Failed,
    FailureCode,
    Load,
    Prefill,
    PrefillDone,
    PrefixHolder,
    Reserve,
    Room,
    Ticketed,
    TokenDelta,
    Tokens,
)
from workers.protocol.tiers import Removed, Stored
from workers.transfer.block_memory import BlockMemory
from workers.transfer.compatibility import mismatch
from workers.transfer.handoff import Handoff, Handoffs
from workers.transfer.remote_prefix import RemotePrefix
from workers.transfer.tickets import Arrival, Tickets

logger = logging.getLogger(__name__)

_IDLE_S = 0.1  # a queue that could not move is looked at again after this, whatever happens
_STUCK_S = (
    120.0  # a step that takes longer will not end: a chunk of an 8B model on one core takes about one minute
)

CacheSink = Callable[[list[Stored], list[Removed]], None]


class Owner(Protocol):
    """The connection of the router that a request belongs to."""

    def send(self, message: Any) -> None:
        """From any thread; never blocks; messages arrive in the order of the calls."""


class Serving:
    def __init__(
        self,
        config: WorkerConfig,
        engine: Engine,
        memories: Sequence[BlockMemory],
        metrics: WorkerMetrics,
        *,
        publish: CacheSink = lambda stored, removed: None,
        on_room: Callable[[], None] = lambda: None,  # there is room for what a router was refused
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._publish = publish
        self._on_room = on_room
        self._refused: set[Room] = (
            set()
        )  # what it was that requests found too little of, since routers were told of room
        self._draining = False
        self._stranded = ""  # why nothing can be computed for now
        self._owners: dict[str, Owner] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._last_turn = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure: BaseException | None = None  # what ended the engine thread
        self.loader = PrefixLoader(
            engine.lock,
            engine.scheduler,
            [] if engine.tiers is None else engine.tiers.sources,
            compute_token_s=lambda: engine.compute_token_s,
            on_loaded=self._loaded,
        )
        self.tickets = Tickets(engine, config.worker_id, config.epoch, self._committed, self._ticket_lost)
        self.handoffs = Handoffs(
            engine,
            memories,
            config.transfer,
            worker_id=config.worker_id,
            secret=config.secret.encode(),
            on_end=self._handoff_ended,
            computing=self._computing,
        )

    def start(self) -> None:
        self.tickets.start()
        self.handoffs.start()
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        self.loader.stop()
        self.tickets.stop()
        self.handoffs.stop()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def load(self) -> Load:
        with self._engine.lock:
            handoffs, load = self.handoffs, self._engine.load()
            room = Room() if self._stranded else load.room
            return msgspec.structs.replace(load, sending=len(handoffs), peers=handoffs.peers(), room=room)

    def num_requests(self) -> int:
        with self._engine.lock:
            return len(self._owners)

    # --- what routers ask for ---------------------------------------------------------------------------------------

    def reserve(self, owner: Owner, message: Reserve) -> None:
        """Take a request for decoding; answers Accepted, Ticketed or Failed."""
        work = message.work
        with self._engine.lock:
            if not self._may_take(owner, work.request_id):
                return
            try:
                self._engine.check(work)
            except CannotServe as error:
                owner.send(Failed(work.request_id, "invalid", str(error)))
                return
            request = Request(work)

            def loaded() -> None:
                del self._owners[work.request_id]
                self._place(owner, message, request)

            # What can be loaded need not be computed, here or elsewhere: load first, then decide. A prefix of another
            # worker helps only where no prefill worker is needed for the rest: else that one fetches it.
            more = self._elsewhere(request, message.holder)
            if more and request.num_tokens - more[0].num_tokens > message.local_prefill_max:
                more = []
            if self._engine.scheduler.has_seat and self.loader.load(request, loaded, more):
                self._owners[work.request_id] = owner
            else:
                self._place(owner, message, request)

    def _place(self, owner: Owner, message: Reserve, request: Request) -> None:
        scheduler = self._engine.scheduler
        uncached = scheduler.uncached_tokens(request)
        if uncached <= message.local_prefill_max:
            lacks = scheduler.lacks(request, computed_here=True)
            if lacks is not None:
                self._busy(owner, request, lacks)
                return
            scheduler.add(request)
            owner.send(Accepted(request.request_id, request.num_tokens - uncached))
            self._wake.set()
        else:
            ticket = self.tickets.open(request, message.transfer_id, message.lease_s)
            if ticket is None:
                self._busy(owner, request, scheduler.lacks(request, computed_here=False) or Room())
                return
            owner.send(Ticketed(request.request_id, ticket))
        self._owners[request.request_id] = owner

    def prefill(self, owner: Owner, message: Prefill) -> None:
        """Compute a prompt for a decode worker; answers PrefillDone or Failed when the hand-over has ended."""
        work, ticket = message.work, message.ticket
        with self._engine.lock:
            if not self._may_take(owner, work.request_id):
                return
            try:
                self._engine.check(work, prefill_only=True)
            except CannotServe as error:
                # Not "invalid": the decode worker could serve it, so the client has made no mistake.
                owner.send(Failed(work.request_id, "transfer_failed", str(error)))
                return
            if reason := mismatch(self._engine.layout, ticket.layout, ticket.worker_id):
                owner.send(Failed(work.request_id, "transfer_failed", reason))
                return
            request = Request(work, prefill_only=True)
            expected = -(-request.num_tokens // self._engine.layout.block_size)
            if not 0 <= ticket.first_block < ticket.num_blocks == expected:
                reason = f"the ticket is for blocks {ticket.first_block}..{ticket.num_blocks}, the prompt has {expected}"
                owner.send(Failed(work.request_id, "transfer_failed", reason))
                return
            try:
                self.handoffs.open(request, ticket)
            except ValueError as error:
                owner.send(Failed(work.request_id, "transfer_failed", str(error)))
                return
            self._owners[work.request_id] = owner

            def compute() -> None:
                self._engine.scheduler.add(request)
                self._wake.set()

            if not self.loader.load(request, compute, self._elsewhere(request, message.holder)):
                compute()

    def _elsewhere(self, request: Request, holder: PrefixHolder | None) -> list[RemotePrefix]:
        if holder is None:
            return []
        size = self._engine.layout.block_size
        return [RemotePrefix(request, holder, size, self.tickets, self.handoffs)]

    def cancel(self, request_id: str) -> None:
        """Idempotent, in any state, on either role."""
        with self._engine.lock:
            self._owners.pop(request_id, None)
            self.loader.cancel(request_id)
            self.tickets.cancel(request_id)
            self.handoffs.cancel(request_id)
            self._engine.scheduler.cancel(request_id)
            self._room()
            self._wake.set()

    def drop_owner(self, owner: Owner) -> None:
        """The connection is gone: so is everything that it owned."""
        with self._engine.lock:
            for request_id in [r for r, o in self._owners.items() if o is owner]:
                self.cancel(request_id)

    def drain(self) -> None:
        """Take nothing new; what is here goes on."""
        self._draining = True

    def strand(self, reason: str) -> None:
        """Nothing can be computed for now: what is here goes on elsewhere, and nothing new is taken."""
        with self._engine.lock:
            self._stranded = reason
            for request_id in list(self._owners):
                for holder in (self.tickets, self.handoffs, self._engine.scheduler):
                    holder.cancel(request_id)
                self._fail(request_id, "busy", reason)

    def unstrand(self) -> None:
        with self._engine.lock:
            self._stranded = ""
            self._room()
            self._wake.set()

    def wake(self) -> None:
        """The engine has something to do that is not in its queue."""
        self._wake.set()

    def _may_take(self, owner: Owner, request_id: str) -> bool:
        if self._draining:
            owner.send(Failed(request_id, "draining", "this worker is about to stop"))
        elif self._stranded:
            self._refused.add(lacks := Room(requests=1))
            owner.send(Failed(request_id, "busy", self._stranded, lacks))
        elif request_id in self._owners or request_id in self._engine.scheduler.requests:
            owner.send(Failed(request_id, "internal", f"request {request_id} is already here"))
        else:
            return True
        return False

    def _busy(self, owner: Owner, request: Request, lacks: Room) -> None:
        self._refused.add(lacks)
        scheduler, pool = self._engine.scheduler, self._engine.pool
        need = -(-request.num_tokens // self._engine.layout.block_size)
        reason = (
            f"{need} blocks wanted, {pool.num_free} of {pool.num_blocks} are free; {scheduler.room.requests} of "
            f"{scheduler.max_num_seqs} places; {scheduler.queued_prefill_tokens} prompt tokens wait"
        )
        owner.send(Failed(request.request_id, "busy", reason, lacks))

    def _room(self) -> None:
        """At most one message for each request that was refused."""
        if not self._refused or self._stranded:
            return
        room = self._engine.scheduler.room
        if any(room.covers(lacks) for lacks in self._refused):
            self._refused.clear()
            self._on_room()

    # --- what the engine and the transfer report --------------------------------------------------------------------

    def _deliver(self, result: StepResult) -> None:
        """Under the lock, right after a step."""
        for request in result.failed:
            reason = "the model's output for this request is not a number"
            self.handoffs.cancel(request.request_id, reason)
            self._fail(request.request_id, "internal", reason)
        first_tokens = {new.request.request_id: new for new in result.tokens if new.request.prefill_only}
        for request in result.progressed:
            self.handoffs.advance(request, first_tokens.get(request.request_id))
            if request.state is State.PREFILLED:
                self._engine.scheduler.cancel(request.request_id)
        self._send_tokens([new for new in result.tokens if not new.request.prefill_only])
        self._room()

    def _committed(self, arrival: Arrival) -> None:
        self._metrics.received(arrival.transfer_s, arrival.num_bytes)
        self._send_tokens([arrival.new])
        self._room()
        self._wake.set()

    def _loaded(self, loaded: Loaded) -> None:
        """On a thread of the loader, without the lock."""
        layout = self._engine.layout
        self._metrics.loaded(
            loaded, loaded.num_blocks * layout.block_size, loaded.num_blocks * layout.block_bytes
        )

    def _send_tokens(self, tokens: list[NewToken]) -> None:
        frames: dict[Owner, list[TokenDelta]] = {}
        for request_id, group in groupby(tokens, lambda new: new.request.request_id):
            owner = self._owners.get(request_id)
            if owner is None:
                continue
            news = list(group)  # a request has several tokens in a step when guesses were right
            request = news[0].request
            frames.setdefault(owner, []).append(
                TokenDelta(
                    request_id=request_id,
                    index=news[0].index,
                    tokens=[new.token for new in news],
                    logprobs=[new.logprobs for new in news if new.logprobs is not None],
                    finish_reason=request.finish_reason,
                    stop_token=request.stop_token,
                    cached_tokens=min(request.num_cached_tokens, request.num_prompt_tokens),
                )
            )
            if request.finish_reason is not None:
                del self._owners[request_id]
                self._metrics.finished(request)
        for owner, deltas in frames.items():
            owner.send(Tokens(deltas))

    def _ticket_lost(self, request: Request, code: FailureCode, reason: str) -> None:
        self._fail(request.request_id, code, reason)

    def _handoff_ended(
        self, request: Request, handoff: Handoff, code: FailureCode | None, reason: str
    ) -> None:
        if code is not None:
            self._fail(request.request_id, code, reason)
            return
        times = request.times
        done = PrefillDone(
            request_id=request.request_id,
            cached_tokens=request.num_cached_tokens,
            queue_s=times.scheduled - times.arrived,
            prefill_s=times.prefilled - times.scheduled,
            transfer_s=handoff.ended_at - times.prefilled,
            transfer_bytes=handoff.num_bytes,
            channel=handoff.road,
        )
        self._metrics.prefilled(done)
        owner = self._owners.pop(request.request_id, None)
        if owner is not None:
            owner.send(done)

    def _fail(self, request_id: str, code: FailureCode, reason: str) -> None:
        self.loader.cancel(request_id)
        owner = self._owners.pop(request_id, None)
        if owner is not None:
            self._metrics.failed(code)
            owner.send(Failed(request_id, code, reason))
        self._room()
        self._wake.set()

    # --- the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                began = self._last_turn = time.monotonic()
                try:
                    worked = self._engine.step(self._deliver, self.handoffs.begin)
                except StepFailed as error:
                    self._step_failed(error)
                    continue
                if worked:
                    self._metrics.step(time.monotonic() - began)
                self.publish_cache()
                if not worked:
                    self._wake.wait(_IDLE_S)
        except BaseException as error:
            self.failure = error
            logger.exception("the engine thread died")
            raise

    def _computing(self) -> bool:
        return time.monotonic() - self._last_turn < _STUCK_S

    def _step_failed(self, error: StepFailed) -> None:
        """A request must not take the worker down with it: those of the step fail aloud, the others go on."""
        logger.error("a step of %d requests failed", len(error.requests), exc_info=error.__cause__)
        reason = f"the step failed: {error.__cause__}"
        with self._engine.lock:
            for request in error.requests:
                self.handoffs.cancel(request.request_id, reason)
                self._engine.scheduler.cancel(request.request_id)
                self._fail(request.request_id, "internal", reason)

    def publish_cache(self) -> None:
        """Tell the index what the prefix cache has gained and lost since the last call."""
        with self._engine.lock:
            stored, removed = self._engine.drain_events()
            if stored or removed:
                self._publish(stored, removed)

    def check(self) -> None:
        """Raise AssertionError unless blocks, leases and owners agree."""
        with self._engine.lock:
            scheduler = self._engine.scheduler
            tables = [request.block_table for request in scheduler.requests.values()]
            fills = [fill.table for fill in scheduler.fills]
            self._engine.pool.check([*tables, *fills, *self.tickets.writing, *self.handoffs.holding])
            assert set(scheduler.requests) <= set(self._owners) | {
                r for r, q in scheduler.requests.items() if q.state is State.LEAVING
            }
