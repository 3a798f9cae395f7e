"""Which tokens are computed in the next step.

Pure Python. There is no prefill phase and no decode phase: a request has tokens that are known and tokens that are
computed, and each step spends a budget of tokens on letting requests catch up. Prompts longer than the budget are
thereby cut into chunks, prefix hits and blocks received from a prefill worker are tokens already computed, and
preemption sets a request's computed tokens back to zero. Speculated tokens are tokens to catch up with as well, behind
the last known one; a token is sampled at each of them, and those that were guessed right need not be computed again.

The engine calls `schedule`, runs the plan, and calls `update`; between the two calls the plan is *in flight*: blocks of
its requests are being written, so whoever leaves meanwhile keeps them until then. A second plan may be made while one is
in flight, for the runner to have it at hand. What the first samples is then scheduled before anybody knows it, and a
request that turns out to have ended with it takes part in the second for nothing. Plans are updated in their order.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from workers.engine.block_pool import BlockPool
from workers.engine.fill import Fill
from workers.engine.plan import NOT_A_NUMBER, Plan, Sampled, Scheduled, StepResult, Verified
from workers.engine.request import NewToken, Request, State
from workers.protocol.hashes import extend_hashes
from workers.protocol.messages import Room, TokenLogprobs, prefill_pairs

# Seconds of work for a worker that reads prompts. With a few steps' worth only, requests run from the worker that has
# their prefix as soon as two of them come at once: in simulated sessions (8 workers, 80% load, no fetching) p99 TTFT was
# 10.3 s with 2, 5.2 s with 8, 2.7 s with 32. What waits here is past the router's priorities, so there is a bound at all.
QUEUED_STEPS = 32


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        hash_root: bytes,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_queued_tokens: int | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_queued_tokens`: prompt tokens that may wait here; None: those of QUEUED_STEPS full steps."""
        self.pool = pool
        self.block_size = block_size
        self.hash_root = hash_root
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_queued_tokens = max_queued_tokens or QUEUED_STEPS * max_num_batched_tokens
        self.eos_token_ids = eos_token_ids
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []  # oldest first
        self.waiting: list[Request] = []  # sorted by _urgency
        self.preemptions = 0
        self.hit_tokens = 0
        self.query_tokens = 0
        self.drafted_tokens = 0  # speculated and verified
        self.accepted_tokens = 0  # of these: guessed right
        self.num_flying = 0  # plans in flight
        self._clock = clock
        self._num_reserved = 0
        self.fills: list[Fill] = []  # begun and not ended

    # --- in and out -------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request that is computed here from its first uncached token on."""
        self._admit(request)
        self._enqueue(request)

    def reserve(self, request: Request) -> int | None:
        """Hold blocks for all known tokens of a request whose KV comes from elsewhere.

        Returns the number of leading blocks that the prefix cache already holds, or None when something is lacking.
        """
        if self.lacks(request, computed_here=False) is not None:
            return None
        self._admit(request)
        matched = self._match(request)
        self._take(request, matched)
        grown = self._grow(request, request.num_tokens)
        assert grown
        request.state = State.RESERVED
        self._num_reserved += 1
        return len(matched)

    def commit(
        self, request: Request, token: int, logprobs: TokenLogprobs | None, cached_tokens: int
    ) -> NewToken:
        """All bytes have arrived: the known tokens are computed, and `token` is the first that was sampled."""
        if request.state is not State.RESERVED:
            raise RuntimeError(f"commit of {request}")
        request.num_computed_tokens = request.num_tokens
        request.num_cached_tokens = max(request.num_cached_tokens, cached_tokens)
        self._store_full_blocks(request)
        index = request.num_output_tokens
        now = self._clock()
        request.times.scheduled = request.times.scheduled or now
        request.times.prefilled = request.times.last_token = now
        request.append(token, self.eos_token_ids)
        request.state = State.RUNNING
        self._num_reserved -= 1
        self.running.append(request)
        if request.finish_reason is not None:
            self._finish(request)
        return NewToken(request, index, token, logprobs)

    @property
    def room(self) -> Room:
        """What is left beside those that were taken, each of which is promised blocks for all its known tokens."""
        return Room(
            requests=max(self.max_num_seqs - self.num_seats_taken - len(self.waiting), 0),
            blocks=max(self.pool.num_free - self._num_promised_blocks, 0),
            tokens=max(self.max_queued_tokens - self.queued_prefill_tokens, 0),
        )

    def lacks(self, request: Request, *, computed_here: bool) -> Room | None:
        """What keeps a request that was not added yet from being taken; None: nothing.

        Blocks that those who wait need are not given away: else those that were preempted would wait for as long as new
        ones come. A request that is computed here may wait for a few steps, so that the engine never does, but no longer:
        the router's line is the one that is fair.
        """
        self._hash(request)
        need = self._num_blocks_taken(request, self._match(request))
        fits = need + self._num_promised_blocks <= self.pool.num_free
        is_long = computed_here and self.queued_prefill_tokens >= self.max_queued_tokens
        if self.has_seat and fits and not is_long:
            return None
        return Room(requests=int(not self.has_seat), blocks=0 if fits else need, tokens=int(is_long))

    def has_room(self, request: Request) -> bool:
        """Whether a request that was not added yet could be added now."""
        return self.lacks(request, computed_here=True) is None

    def uncached_tokens(self, request: Request) -> int:
        """Tokens that this engine would have to compute for a request that was not added yet."""
        self._hash(request)
        return request.num_tokens - len(self._match(request)) * self.block_size

    def missing_hashes(self, request: Request) -> list[bytes]:
        """Hashes of the prefix behind what the cache holds, for a request that was not added yet.

        Without that of a block in which the last token lies: there would be nothing left to compute.
        """
        self._hash(request)
        return request.block_hashes[len(self._match(request)) : self._num_usable(request)]

    def begin_fill(self, request: Request, count: int) -> Fill | None:
        """Hold the cached prefix of a request that was not added yet, and `count` fresh blocks for what comes next.

        None when nothing is missing, and when the request as a whole finds no room beside those that wait. Somebody
        writes the bytes now, outside the lock, and `end_fill` follows whatever happens.
        """
        hashes = self.missing_hashes(request)[:count]
        matched = self._match(request)
        need = self._num_blocks_taken(request, matched)
        if not hashes or need + self._num_promised_blocks > self.pool.num_free:
            return None
        self.pool.acquire(matched)
        blocks = self.pool.allocate(len(hashes))
        assert blocks is not None
        parent = request.block_hashes[len(matched) - 1] if matched else self.hash_root
        fill = Fill(matched, blocks, hashes, parent)
        self.fills.append(fill)
        return fill

    def end_fill(self, fill: Fill, num_good: int) -> None:
        """The first `num_good` blocks hold the bytes of their hashes: requests find them from now on."""
        self.fills.remove(fill)
        parents = [fill.parent, *fill.hashes]
        for block, block_hash, parent in zip(fill.blocks[:num_good], fill.hashes, parents, strict=False):
            self.pool.store(block, block_hash, parent)
        self.pool.release(fill.table)

    def cancel(self, request_id: str) -> None:
        """Idempotent. Blocks are free on return, or after the steps in flight."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request)

    @property
    def has_work(self) -> bool:
        """Whether a step is to be made or to be ended."""
        return bool(self.running or self.waiting or self.num_flying)

    @property
    def num_seats_taken(self) -> int:
        """Requests that take part in steps, now or as soon as their blocks have arrived."""
        return len(self.running) + self._num_reserved

    @property
    def has_seat(self) -> bool:
        """Whether one more request could take part, after those that wait."""
        return self.num_seats_taken + len(self.waiting) < self.max_num_seqs

    @property
    def num_reserved(self) -> int:
        return self._num_reserved

    @property
    def queued_prefill_tokens(self) -> int:
        """Known tokens that are to be computed, without the one token that every running stream is ahead."""
        return sum(count for count, _ in self._queued())

    @property
    def queued_prefill_pairs(self) -> int:
        """Of these and the positions that each will attend to."""
        return sum(prefill_pairs(count, known) for count, known in self._queued())

    def _queued(self) -> Iterator[tuple[int, int]]:
        """(known tokens that are to be computed, known tokens)"""
        for request in self.waiting:
            yield request.num_tokens - request.num_found_tokens, request.num_tokens
        for request in self.running:
            behind = request.num_tokens - request.num_computed_tokens
            if behind > 1:
                yield behind, request.num_tokens

    # --- the step ---------------------------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """Running requests first, then waiting ones as long as there is room.

        With a plan in flight this one is empty where it takes what is not known yet: which token a request's penalties
        count, or who is to be preempted, for what is in flight may make room, and writes into the victim's blocks.
        """
        if self.num_flying == 2:
            raise RuntimeError("two plans are in flight")
        budget = self.max_num_batched_tokens
        planned: dict[str, Scheduled] = {}
        preempted = False
        for request, lacking in self._running_by_need():
            if self.num_flying and request.num_flying_samples and request.reads_history:
                return Plan(())
            if request.state is not State.RUNNING or budget == 0:
                continue
            start = request.num_computed_tokens + request.num_flying_tokens
            count = min(lacking, budget)
            while not self._grow(request, start + count):
                if self.num_flying:
                    return Plan(())
                preempted = True
                victim = self.running[-1]
                self._preempt(victim)
                dropped = planned.pop(victim.request_id, None)
                budget += dropped.count if dropped else 0
                if victim is request:
                    break
            if request.state is State.RUNNING:
                planned[request.request_id] = self._item(request, start, count)
                budget -= count
        while self.waiting and budget > 0 and self.num_seats_taken < self.max_num_seqs and not preempted:
            request = self.waiting[0]
            matched = self._match(request)
            # For all its known tokens, beside those who still read theirs: nobody begins what it would have to give up.
            need = self._num_blocks_taken(request, matched)
            if need + self._num_blocks_owed(self.running) > self.pool.num_free:
                break
            cached = len(matched) * self.block_size
            count = min(request.num_tokens - cached, budget)
            self.waiting.pop(0)
            self._take(request, matched)
            request.num_computed_tokens = cached
            request.state = State.RUNNING
            self.running.append(request)
            grown = self._grow(request, cached + count)
            assert grown
            request.times.scheduled = request.times.scheduled or self._clock()
            planned[request.request_id] = self._item(request, cached, count)
            budget -= count
        plan = Plan(tuple(planned.values()))
        self._take_off(plan)
        return plan

    def extend(self, plan: Plan, drafts: Mapping[str, Sequence[int]]) -> Plan:
        """The plan with drafts, by request id, as far as budget, blocks and max_tokens allow. Nobody is preempted."""
        budget = self.max_num_batched_tokens - plan.num_tokens
        items = []
        for item in plan.items:
            request, end = item.request, item.start + item.count
            draft = drafts.get(request.request_id, ())
            if draft and item.samples and not request.prefill_only:
                # Behind the last token that it may have there is nothing to verify.
                length = min(len(draft), budget, request.max_total_tokens - end - 1)
                if self.waiting or not self._grow(
                    request, end + length
                ):  # those that wait need the blocks more
                    length = min(length, len(request.block_table) * self.block_size - end)
                item = replace(item, draft=tuple(draft[: max(length, 0)]))
                budget -= len(item.draft)
            items.append(item)
        return Plan(tuple(items))

    def update(self, plan: Plan, sampled: Sequence[Sampled]) -> StepResult:
        """The older plan has run: `sampled` has an entry for each position that its items sample, in order."""
        result = StepResult([], [], [], [])
        now = self._clock()
        self._land(plan)
        row = 0
        for item in plan.items:
            request, draft, first_row = item.request, item.draft, row
            row += item.num_samples
            if request.state is State.LEAVING:  # what it has computed is void
                self._finish(request)
                continue
            request.num_computed_tokens = item.start + item.count
            if item.samples:
                request.times.sampled(now)
                if draft:
                    good = self._verify(request, draft, sampled[first_row:row], result)
                else:
                    good = self._accept(request, sampled[first_row], result)
                if not good:
                    continue
            if request.num_computed_tokens >= (request.num_stored_blocks + 1) * self.block_size:
                self._store_full_blocks(request)
            if request.prefill_only:
                result.progressed.append(request)
                if item.samples:
                    self.running.remove(request)
                    request.state = State.PREFILLED
            elif request.finish_reason is not None:
                self._finish(request)
        return result

    def _accept(self, request: Request, choice: Sampled, result: StepResult) -> bool:
        """Its next token; False when that is not a number and the request has failed."""
        token, logprobs = choice
        if token == NOT_A_NUMBER:
            self._finish(request)  # its last blocks are not stored: nobody else shall find a NaN in them
            result.failed.append(request)
            return False
        index = len(request.token_ids) - request.num_prompt_tokens
        request.append(token, self.eos_token_ids)
        result.tokens.append(NewToken(request, index, token, logprobs))
        return True

    def _verify(
        self, request: Request, draft: Sequence[int], chosen: Sequence[Sampled], result: StepResult
    ) -> bool:
        """Take what was sampled, up to the first place where the draft had guessed another token.

        What is sampled behind a wrong guess hangs on it and is void. Up to there every token was sampled from the
        logits that it would have had without the draft, so speculation changes no token.
        """
        accepted = 0
        for guess, choice in zip((*draft, None), chosen, strict=True):
            if not self._accept(request, choice, result):
                return False
            if request.finish_reason is not None or choice.token != guess:
                break
            accepted += 1
        request.num_computed_tokens += accepted
        self.drafted_tokens += len(draft)
        self.accepted_tokens += accepted
        result.verified.append(Verified(request, len(draft), accepted))
        return True

    def abandon(self, plan: Plan) -> None:
        """The plan has not run, nor has one behind it: its requests are as they were before it, but for their blocks."""
        self._land(plan)
        for item in plan.items:
            if item.request.state is State.LEAVING:
                self._finish(item.request)

    # --- parts ------------------------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        if request.request_id in self.requests:
            raise ValueError(f"request {request.request_id} is already here")
        self._hash(request)
        self.requests[request.request_id] = request

    def _hash(self, request: Request) -> None:
        """Bring the hashes up to its tokens; only full blocks that are new cost anything."""
        if len(request.token_ids) < (len(request.block_hashes) + 1) * self.block_size:
            return
        extend_hashes(
            request.block_hashes, request.token_ids, self.block_size, self.hash_root, request.work.cache_salt
        )

    def _running_by_need(self) -> list[tuple[Request, int]]:
        """Running requests and how many tokens they lack, those that a step in flight samples included.

        Those that only need their next token go before those that still read their prompt: a long prompt must not stall
        running streams. Within both the oldest goes first, and the youngest of all is the one to preempt.
        """
        few: list[tuple[Request, int]] = []
        many: list[tuple[Request, int]] = []
        for request in self.running:
            total = len(request.token_ids)
            if request.num_flying_samples:
                total += request.num_flying_samples
                if request.prefill_only or total >= request.max_total_tokens:
                    continue  # the token to come is its last
            lacking = total - request.num_computed_tokens - request.num_flying_tokens
            (few if lacking == 1 else many).append((request, lacking))
        return few + many

    @staticmethod
    def _urgency(request: Request) -> tuple[int, float]:
        return (request.work.priority, request.times.arrived)

    def _enqueue(self, request: Request) -> None:
        request.state = State.WAITING
        request.num_found_tokens = len(self._match(request)) * self.block_size
        position = len(self.waiting)
        while position and self._urgency(self.waiting[position - 1]) > self._urgency(request):
            position -= 1
        self.waiting.insert(position, request)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _match(self, request: Request) -> list[int]:
        """Held blocks of the request's prefix; at least one token is left to compute, or none could be sampled."""
        return self.pool.match(request.block_hashes[: self._num_usable(request)])

    def _num_usable(self, request: Request) -> int:
        return (request.num_tokens - 1) // self.block_size

    def _num_blocks_taken(self, request: Request, matched: list[int]) -> int:
        """Free blocks that a request with this prefix takes for all its known tokens."""
        cached = self.pool.num_free - self.pool.num_available(matched)
        return self._blocks_for(request.num_tokens) - len(matched) + cached

    @property
    def _num_promised_blocks(self) -> int:
        return self._num_blocks_owed(self.waiting) + self._num_blocks_owed(self.running)

    def _num_blocks_owed(self, requests: Iterable[Request]) -> int:
        """What they lack for their known tokens. Of those that wait all: what is cached for them may go meanwhile."""
        size = self.block_size
        return sum(max(-(-len(r.token_ids) // size) - len(r.block_table), 0) for r in requests)

    def _take(self, request: Request, matched: list[int]) -> None:
        self.pool.acquire(matched)
        request.block_table = array("i", matched)
        request.num_stored_blocks = len(matched)
        if request.preemptions == 0:
            request.num_cached_tokens = len(matched) * self.block_size
            self.hit_tokens += request.num_cached_tokens
            self.query_tokens += request.num_tokens

    def _grow(self, request: Request, num_tokens: int) -> bool:
        held = len(request.block_table)
        if num_tokens <= held * self.block_size:
            return True
        fresh = self.pool.allocate(self._blocks_for(num_tokens) - held)
        if fresh is None:
            return False
        request.block_table.extend(fresh)
        return True

    @staticmethod
    def _item(request: Request, start: int, count: int) -> Scheduled:
        missing = len(request.token_ids) - start - count  # -1: the last of these tokens
        return Scheduled(request, start, count, missing <= 0, missing < 0)

    def _take_off(self, plan: Plan) -> None:
        """The plan is in flight now."""
        self.num_flying += bool(plan.items)
        for item in plan.items:
            request = item.request
            request.num_flying_steps += 1
            request.num_flying_tokens += item.count
            request.num_flying_samples += item.samples

    def _land(self, plan: Plan) -> None:
        """It is in flight no longer."""
        self.num_flying -= bool(plan.items)
        for item in plan.items:
            request = item.request
            request.num_flying_steps -= 1
            request.num_flying_tokens -= item.count
            request.num_flying_samples -= item.samples

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.release(request.block_table)
        request.block_table = array("i")
        request.num_stored_blocks = 0
        request.num_computed_tokens = 0
        request.preemptions += 1
        self.preemptions += 1
        self._hash(request)
        self._enqueue(request)

    def _store_full_blocks(self, request: Request) -> None:
        self._hash(request)
        full = min(request.num_computed_tokens // self.block_size, len(request.block_hashes))
        for index in range(request.num_stored_blocks, full):
            parent = request.block_hashes[index - 1] if index else self.hash_root
            self.pool.store(request.block_table[index], request.block_hashes[index], parent)
        request.num_stored_blocks = max(full, request.num_stored_blocks)

    def _finish(self, request: Request) -> None:
        """The one way out: leaves every list at once, and gives every block back when no step writes into it."""
        if request.state is State.RUNNING:
            self.running.remove(request)
        elif request.state is State.WAITING:
            self.waiting.remove(request)
        elif request.state is State.RESERVED:
            self._num_reserved -= 1
        request.state = State.LEAVING
        if request.num_flying_steps:
            return
        del self.requests[request.request_id]
        self.pool.release(request.block_table)
        request.block_table = array("i")
        request.state = State.FINISHED

    def check(self) -> None:
        """Raise AssertionError unless lists, states and blocks agree."""
        tables = [request.block_table for request in self.requests.values()]
        self.pool.check([*tables, *(fill.table for fill in self.fills)])
        reserved = sum(request.state is State.RESERVED for request in self.requests.values())
        assert reserved == self._num_reserved
        for request in self.requests.values():
            assert (request in self.running) == (request.state is State.RUNNING), request
            assert (request in self.waiting) == (request.state is State.WAITING), request
            assert request.num_computed_tokens <= request.num_tokens, request
            if request.state is State.WAITING:
                assert not request.block_table, request
            if request.state is State.RUNNING:
                computed = request.num_computed_tokens + request.num_flying_tokens
                assert len(request.block_table) >= self._blocks_for(computed), request
            else:
                assert request.num_flying_steps == 0 or request.state is State.LEAVING, request
            assert request.num_flying_steps > 0 or request.state is not State.LEAVING, request
            assert request.num_flying_steps <= self.num_flying, request
            flying = request.num_flying_tokens, request.num_flying_samples
            assert request.num_flying_steps > 0 or flying == (0, 0), request
