"""The engine: requests in, tokens out. Needs neither Ray nor Redis.

A step is: schedule, submit, wait, update. Where the runner overlaps steps, the next one is scheduled and submitted
before this one is waited for, so that the device never waits for this thread. `lock` guards requests and blocks and is
*not* held while the model runs, so that reservations, commits, cancels and the reaper act at once, even in the middle of
a long step.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from workers.config import EngineConfig
from workers.engine.backend import LayersDone, choose_device, open_backend
from workers.engine.block_pool import BlockPool
from workers.engine.pace import Pace
from workers.engine.pending import Pending, Ready
from workers.engine.plan import Plan, StepResult
from workers.engine.proposers import open_speculation
from workers.engine.request import Request
from workers.engine.scheduler import Scheduler
from workers.engine.step_input import StepInput
from workers.experts.exchange import GroupBroken
from workers.experts.membership import GroupClosed
from workers.experts.plane import ExpertPlane
from workers.models.catalog import PreparedModel
from workers.parallel.collectives import ALONE
from workers.parallel.team import Team
from workers.prefix_loader import PrefixLoader
from workers.protocol.hashes import hash_root
from workers.protocol.messages import FinishReason, Load, Sampling, TokenLogprobs, Work
from workers.protocol.tiers import DEVICE, Removed, Stored
from workers.tiers.tiers import Tiers

logger = logging.getLogger(__name__)


class CannotServe(ValueError):
    """The request can never run on this engine. The message is for the client."""


class StepFailed(RuntimeError):
    """A step raised. Its requests are as they were before it; the caller decides what becomes of them."""

    def __init__(self, requests: list[Request]) -> None:
        super().__init__(f"a step of {len(requests)} requests failed")
        self.requests = requests


@dataclass(slots=True, eq=False)
class Flight:
    """A step on its way from `schedule` to `update`."""

    plan: Plan
    began: float  # monotonic seconds
    step: StepInput | None = None
    pending: Pending | None = None  # None: the runner does not have it


@dataclass(slots=True)
class Completion:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Engine:
    def __init__(
        self,
        config: EngineConfig,
        model: PreparedModel,
        *,
        share_kv: bool = False,
        experts: ExpertPlane | None = None,
        team: Team | None = None,
    ) -> None:
        """`share_kv`: keep the KV cache in memory that other processes can map or open. `experts`: they are spread over
        ranks, of which this engine is one. `team`: of tensor-parallel ranks, which this engine leads."""
        if (config.max_model_len or 0) > model.max_model_len:
            raise ValueError(
                f"engine.max_model_len is {config.max_model_len}, but the model goes up to {model.max_model_len}"
            )
        backend = open_backend(config, model, experts, ALONE if team is None else team.group)
        if team is not None:
            backend = team.lead(backend)  # before anything is measured: all ranks do
        self.num_blocks = backend.num_blocks()
        self._experts = experts
        self.layout = backend.layout
        wanted, held = config.max_model_len or model.max_model_len, self.num_blocks * config.block_size
        self.max_model_len = min(wanted, held)
        if held < wanted:
            logger.warning(
                "the KV cache holds %d tokens, less than the context of %d: longer requests are refused; "
                "raise engine.kv_cache_memory, on a GPU engine.gpu_memory_utilization",
                held,
                wanted,
            )
        self.vocab_size = model.vocab_size
        self.max_num_seqs, step_tokens = config.batch(choose_device(config.device).type)
        self.hash_root = hash_root(self.layout.model_fingerprint, self.layout.dtype, config.block_size)
        self.lock = threading.RLock()
        self.pool = BlockPool(self.num_blocks, caching=config.prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            block_size=config.block_size,
            hash_root=self.hash_root,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=step_tokens,
            max_queued_tokens=config.max_queued_tokens,
            eos_token_ids=frozenset(model.eos_token_ids),
        )
        self.runner = backend.runner(self.num_blocks, share_kv)
        self.speculation = open_speculation(config, model, self.num_blocks, step_tokens)
        self.tiers: Tiers | None = None
        self.pace = Pace()
        self._flights: deque[Flight] = deque()  # oldest first, at most two
        self._last_end = 0.0  # monotonic seconds
        self._prompt_tokens = 0
        self._output_tokens = 0

    def attach(self, tiers: Tiers | None) -> None:
        """What the KV cache evicts from here on goes to these tiers."""
        self.tiers = tiers
        self.pool.on_evict = None if tiers is None else tiers.host.take

    def close(self) -> None:
        """Nothing is computed any more: the tiers keep what they can for a later life. Idempotent.

        A step may be in flight, and is not waited for: it writes into no block that is cached.
        """
        if self.tiers is not None:
            self.tiers.close(self.pool.cached_blocks())
            self.attach(None)

    @property
    def compute_token_s(self) -> float | None:
        """Seconds to compute a prompt token, as measured lately."""
        return self.pace.token_s

    @property
    def device(self) -> torch.device:
        return self.runner.device

    def step(
        self,
        deliver: Callable[[StepResult], None] = lambda result: None,
        begin: Callable[[Plan, LayersDone | None], None] = lambda plan, layers_done: None,
    ) -> bool:
        """One step of the whole batch comes to its end; False when there was nothing to compute.

        `deliver` is called under the lock, before anybody else can see the new state; `begin` under the lock too, right
        before a step runs, with a function that tells how many layers it has written. Raises StepFailed.
        """
        while len(self._flights) < self._most_flights:
            flight = self._schedule(begin)
            if flight is None:
                break
            try:
                flight.pending = self._submit(flight)
            except Exception as error:  # noqa: BLE001 - whatever it was, the plan is taken back
                return self._failed(flight, error)
            if flight.pending is None:
                self._flights.pop()
                break
        if not self._flights:
            return False
        flight = self._flights[0]
        assert flight.pending is not None
        try:
            sampled = flight.pending.wait()
        except Exception as error:  # noqa: BLE001 - as above
            return self._failed(flight, error)
        self._flights.popleft()
        plan, now = flight.plan, time.perf_counter()
        seconds = now - max(flight.began, self._last_end)  # while it was the one that ran
        self._last_end = now
        num_tokens = plan.num_tokens
        with self.lock:
            result = self.scheduler.update(plan, sampled)
            self._output_tokens += len(result.tokens)
            self._prompt_tokens += num_tokens - len(sampled)
            self._observe_pace(plan, num_tokens, len(sampled), seconds)
            deliver(result)
        if self.speculation is not None:
            self.speculation.observe(plan, result, seconds)
        return True

    @property
    def _most_flights(self) -> int:
        """Guesses hang on the tokens before them, and ranks with experts meet at every step."""
        return 2 if self.runner.overlaps and self.speculation is None and self._experts is None else 1

    def _schedule(self, begin: Callable[[Plan, LayersDone | None], None]) -> Flight | None:
        """The next step, in flight from here on; None when there is nothing to compute."""
        with self.lock:
            plan = self.scheduler.schedule()
            if not plan.items and self._experts is None:
                return None  # other ranks may have tokens for the experts that are here
            flight = Flight(plan, time.perf_counter())
            self._flights.append(flight)
            if plan.items:
                # A step with other ranks may be broken off, and of two in flight only the ends can be told apart: what
                # such a step has written counts at its end.
                watched = self._experts is None and self._most_flights == 1
                begin(plan, self.runner.watch_next() if watched else None)
            return flight

    def _submit(self, flight: Flight) -> Pending | None:
        """None when no rank of the group has anything to compute."""
        if self._experts is not None:
            if not self._experts.group.begin(bool(flight.plan.items)):
                return None
            if not flight.plan.items:
                self._experts.idle()
                return Ready([])
        flight.plan = self._speculate(flight.plan)
        flight.began = time.perf_counter()
        before = self._flights[0].step if len(self._flights) > 1 else None
        flight.step = StepInput.of(flight.plan, self.layout.block_size, before)
        return self.runner.submit(flight.step)

    def _failed(self, flight: Flight, error: Exception) -> bool:
        """`submit` or `wait` of this flight has raised: what `step` returns. Raises StepFailed."""
        plan = flight.plan
        self._abandon(flight)
        if self._experts is not None:
            what = "a step was broken off" if isinstance(error, GroupBroken) else "a step failed"
            self._experts.group.end_view("" if isinstance(error, GroupClosed) else f"{what}: {error}")
        if isinstance(error, GroupClosed):
            return False
        if isinstance(error, GroupBroken):
            return True  # it is made again, into the same blocks
        raise StepFailed([item.request for item in plan.items]) from error

    def _abandon(self, failed: Flight) -> None:
        """The failed step was never made, nor one behind it, which reads what that was to write."""
        while (last := self._flights.pop()) is not failed:
            assert last.pending is not None
            try:
                last.pending.wait()
            except Exception:
                logger.warning("the step behind one that failed has failed, too", exc_info=True)
            with self.lock:
                self.scheduler.abandon(last.plan)
        with self.lock:
            self.scheduler.abandon(failed.plan)

    def _observe_pace(self, plan: Plan, num_tokens: int, num_samples: int, seconds: float) -> None:
        """Of steps that mostly read prompts, and of those that only decode."""
        prompt_tokens = num_tokens - num_samples
        if prompt_tokens >= max(num_samples, self.layout.block_size):
            pairs = sum(item.count * (item.start + item.count / 2) for item in plan.items)
            self.pace.prompts(num_tokens, pairs, seconds)
        elif prompt_tokens == 0 and plan.items:
            self.pace.decodes(seconds)

    def _speculate(self, plan: Plan) -> Plan:
        drafts = self.speculation.propose(plan) if self.speculation is not None else {}
        if not drafts:
            return plan
        with self.lock:
            return self.scheduler.extend(plan, drafts)

    def check(self, work: Work, *, prefill_only: bool = False) -> None:
        """Raise CannotServe when the request could never run here, whatever the load."""
        given = len(work.prompt) + len(work.output)
        if given == 0:
            raise CannotServe("the prompt is empty")
        total = given + 1 if prefill_only else len(work.prompt) + work.sampling.max_tokens
        if total > self.max_model_len:
            raise CannotServe(
                f"prompt ({len(work.prompt)} tokens) and max_tokens ({work.sampling.max_tokens}) exceed the "
                f"{self.max_model_len} tokens that this worker can hold"
            )
        if len(work.output) >= work.sampling.max_tokens:
            raise CannotServe(
                f"{len(work.output)} output tokens given, max_tokens is {work.sampling.max_tokens}"
            )
        sampling = work.sampling  # kernels index by its tokens, too
        named = itertools.chain(work.prompt, work.output, sampling.logit_bias, sampling.stop_token_ids)
        bad = next((t for t in named if not 0 <= t < self.vocab_size), None)
        if bad is not None:
            raise CannotServe(f"token id {bad} is outside the vocabulary of {self.vocab_size}")

    def load(self) -> Load:
        """A consistent snapshot of what this engine holds."""
        with self.lock:
            scheduler, pool = self.scheduler, self.pool
            return Load(
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                reserved=scheduler.num_reserved,
                queued_prefill_tokens=scheduler.queued_prefill_tokens,
                queued_prefill_pairs=scheduler.queued_prefill_pairs,
                active_blocks=pool.num_referenced,
                cached_blocks=pool.num_cached,
                free_blocks=pool.num_free,
                prefix_hit_tokens=scheduler.hit_tokens,
                prefix_query_tokens=scheduler.query_tokens,
                prompt_tokens=self._prompt_tokens,
                output_tokens=self._output_tokens,
                preemptions=scheduler.preemptions,
                drafted_tokens=scheduler.drafted_tokens,
                accepted_tokens=scheduler.accepted_tokens,
                prefill_token_s=self.pace.token_s or 0.0,
                prefill_pair_s=self.pace.pair_s,
                decode_step_s=self.pace.decode_step_s or 0.0,
                room=scheduler.room,
            )

    def cached(self) -> list[Stored]:
        """(hash, parent, tier) of every block that a later prompt can take back. Under the lock."""
        below = [] if self.tiers is None else self.tiers.cached()
        return [(block_hash, parent, DEVICE) for block_hash, parent in self.pool.cached_hashes()] + below

    def drain_events(self) -> tuple[list[Stored], list[Removed]]:
        """What changed in `cached` since the last call; `removed` first. Under the lock."""
        stored, removed = ([], []) if self.tiers is None else self.tiers.drain_events()
        events = self.pool.drain_events()
        if events is not None:
            stored += [(block_hash, parent, DEVICE) for block_hash, parent in events.stored]
            removed += [(block_hash, DEVICE) for block_hash in events.removed]
        return stored, removed

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling | Sequence[Sampling]
    ) -> list[Completion]:
        """Run all prompts to their end in this thread. For tests, benchmarks and offline use."""
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        completions = {f"offline-{i}": Completion() for i in range(len(prompts))}
        todo: deque[Request] = deque()
        for (request_id, prompt), params in zip(zip(completions, prompts, strict=True), each, strict=True):
            work = Work(request_id=request_id, prompt=prompt, sampling=params)
            self.check(work)
            todo.append(Request(work))
        loader = PrefixLoader(self.lock, self.scheduler, [] if self.tiers is None else self.tiers.sources)

        def collect(result: StepResult) -> None:
            for new in result.tokens:
                completion = completions[new.request.request_id]
                completion.tokens.append(new.token)
                if new.logprobs is not None:
                    completion.logprobs.append(new.logprobs)
                completion.finish_reason = new.request.finish_reason

        while todo or self.scheduler.has_work:
            # What is loaded for a request should not be evicted before its turn: with tiers each comes when it fits.
            while todo and (self.tiers is None or self._is_next(todo[0])):
                request = todo.popleft()
                loader.load_now(request)
                with self.lock:
                    self.scheduler.add(request)
            self.step(collect)
        return list(completions.values())

    def _is_next(self, request: Request) -> bool:
        with self.lock:
            return not self.scheduler.has_work or self.scheduler.has_room(request)
