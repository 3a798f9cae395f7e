"""The life of a request (DESIGN §2, steps 4 to 12), and the object that http and grpc talk to."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from router.admission.turns import Admission, Turn
from router.attempt import Attempt, AttemptFailed
from router.config import RouterConfig
from router.discovery import Discovery
from router.dispatch_metrics import DispatchMetrics, default_metrics
from router.experts.entry import Experts
from router.explain import Decisions, Trace
from router.fleet import Fleet
from router.generation import Generation, GenerationError, InvalidRequest, ModelInfo, TokenChunk, Unavailable
from router.load import LoadBook
from router.member_status import describe
from router.policies import open_policy
from router.policy import Choice, Demand, Score, fetch_from
from router.prefix_index import PrefixIndex
from router.request import Request
from router.roster import Sorts
from router.tenants import shares
from router.worker_link import LinkDown, WorkerLink
from workers.protocol.messages import PrefixHolder, StatusReply, Ticket

log = logging.getLogger(__name__)

_EXCLUDED_S = 1.0  # how long a request avoids a worker that failed it
_METRICS_TIMEOUT_S = 1.0


class Dispatcher:
    """One router replica's way to the workers. Implements router.generation.Dispatcher.

    `lease_s`: how long a decode worker holds blocks without progress of the hand-over.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        cluster: str,
        secret: str,
        redis_url: str,
        router_id: str | None = None,
        lease_s: float = 10.0,
        poll_s: float = 0.25,
        metrics: DispatchMetrics | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.router_id = router_id or uuid.uuid4().hex[:8]
        self.metrics = metrics or default_metrics()
        self.book = LoadBook(window_s=config.policy.heat_window_s)
        self.index = PrefixIndex()
        self.decisions = Decisions(config.policy.keep_decisions, config.policy.name)
        self.admission = Admission(config.admission, shares(config), self.metrics)
        self._policy = open_policy(config.policy, rng or random.Random())
        self._fetch_min_tokens = config.policy.fetch_min_tokens
        self.fleet = Fleet(
            secret=secret.encode(),
            router_id=self.router_id,
            heartbeat_s=config.heartbeat_s,
            timeout_s=config.timeout_s,
            book=self.book,
            on_room=lambda room: self.admission.room(room.blocks, requests=room.requests, tokens=room.tokens),
            on_late=self.metrics.late_messages.inc,
            standing=self._policy.standing if isinstance(self._policy, Sorts) else None,
        )
        self.discovery = Discovery(
            redis_url, cluster, fleet=self.fleet, index=self.index, metrics=self.metrics, poll_s=poll_s
        )
        self.experts = Experts(
            config.experts,
            redis_url=redis_url,
            cluster=cluster,
            router_id=self.router_id,
            alive=lambda: {member.info.worker_id: member.info.epoch for member in self.fleet.members()},
        )
        self._max_attempts = config.admission.max_attempts
        self._lease_s = lease_s
        self._answer_timeout_s = 5 * config.timeout_s
        self._stall_timeout_s = config.admission.stall_timeout_s
        self._serials = itertools.count(1)
        self._in_flight = 0
        self.metrics.waiting.set_function(lambda: self.admission.waiting)
        for tenant in shares(config):
            self.metrics.waiting_of(tenant, self.admission.waiting_of)
        self.metrics.in_flight.set_function(lambda: self._in_flight)

    async def start(self) -> None:
        await self.discovery.start()
        await self.experts.start()

    async def stop(self) -> None:
        """Requests that are still open end with Unavailable; workers free what they hold for this replica."""
        self.admission.close()
        await self.experts.stop()
        await self.discovery.stop()
        await self.fleet.close()

    # --- the life of a request --------------------------------------------------------------------------------------

    async def generate(self, generation: Generation) -> AsyncIterator[TokenChunk]:
        """Stream the tokens of one sequence; raises GenerationError. Closing the iterator early cancels it everywhere.

        Each round of the loop is one attempt. Whatever ends it (success, a death, the client's leaving), the inner
        `finally` releases it; what was streamed so far is in `request`, and the next round goes on from there.
        """
        request = Request(generation)
        trace = self.decisions.open(generation.request_id, len(generation.prompt))
        turn: Turn | None = None
        placed_at: float | None = None  # while the first token of a placement is awaited
        self._in_flight += 1
        try:
            while request.finish_reason is None:
                attempt: Attempt | None = None
                outcome = "cancelled"
                try:
                    turn = turn or self._enter(request)
                    await turn.mine()
                    choice = self._choose(request, trace)
                    if choice is None:
                        await self._wait(request, turn)
                        continue
                    attempt = self._book(request, choice, trace)
                    holder = self._holder(choice.demand, attempt.decode)
                    ticket = await attempt.reserve(choice.local_prefill_max, holder)
                    self._placed(request, turn)
                    turn, placed_at = None, time.monotonic()
                    self._start_prefill(request, attempt, choice, ticket)
                    while request.finish_reason is None:
                        chunk = request.accept(await attempt.next_delta(len(request.output)))
                        if placed_at is not None:
                            self.admission.first_token(time.monotonic() - placed_at)
                            placed_at = None
                        if request.finish_reason is not None:
                            outcome = "finished"  # now: the reader need not come back after the last chunk
                        if chunk is not None:
                            yield chunk
                except AttemptFailed as failure:
                    outcome = failure.code
                    trace.failed(failure.message)
                    self._learn(request, failure)
                finally:
                    if attempt is not None:
                        self._release(attempt, outcome)
                        trace.left(outcome)
        except GenerationError as error:
            trace.ended(error.kind, error.message)
            raise
        finally:
            if turn is not None:
                turn.leave()
            trace.output_tokens = len(request.output)
            trace.ended(request.finish_reason or "cancelled")
            self._in_flight -= 1

    def _enter(self, request: Request) -> Turn:
        self._begin(request)
        return self.admission.enter(
            priority=request.generation.priority,
            need_blocks=request.num_blocks,
            resumed=request.placements > 0,
            tenant=request.generation.tenant,
            deadline=request.generation.deadline,
            work=lambda: self._work(request),
        )

    def _work(self, request: Request) -> float:
        """Tokens that workers will compute for it, as far as can be told: what tenants share by."""
        output = max(request.generation.expected_output - len(request.output), 1)
        if not request.hash_root:
            return request.num_tokens + output
        cached = max((prefix.blocks for prefix in self.index.match(request.hashes()).values()), default=0)
        return max(request.num_tokens - cached * request.block_size, 0) + output

    def _begin(self, request: Request) -> bool:
        """Fix the model that the request runs on. False: there is none yet."""
        reference = None if request.hash_root else self.fleet.reference()
        if reference is not None:
            request.begin(reference)
        return bool(request.hash_root)

    def _choose(self, request: Request, trace: Trace) -> Choice | None:
        """None: no decode worker can be given the request now."""
        if not self._begin(request):
            return None
        now = trace.choosing()
        excluded, avoided = request.excluded_now(now), request.avoided_now(now)
        views = self.fleet.views(request.hash_root, request.num_blocks)
        if next(iter(views.ranked("decode")), None) is None:
            return None  # spares the look-up: at overload this is what most find
        demand = self._demand(request)
        choice = self._policy.choose(demand, views, excluded | avoided)
        if choice is None and avoided:
            choice = self._policy.choose(demand, views, excluded)
        return choice

    async def _wait(self, request: Request, turn: Turn) -> None:
        """For room; or, when workers have room but this request must leave them alone, for that to end."""
        views = self.fleet.views(request.hash_root, request.num_blocks)
        excluded = [view.worker_id for _, view in views.ranked("decode")]
        if excluded:
            await turn.step_aside(request.excluded_for_s(excluded, time.monotonic()))
        else:
            await turn.no_room()

    def _demand(self, request: Request) -> Demand:
        return Demand(
            request.num_tokens,
            request.block_size,
            self.index.match(request.hashes()),
            request.token_bytes,
        )

    def _book(self, request: Request, choice: Choice, trace: Trace) -> Attempt:
        decode = self.fleet.link(choice.decode.worker_id)
        assert decode is not None, "the policy chose among live workers"
        attempt = Attempt(
            # Unique for each attempt, so that late messages of an earlier one can't be taken for this one's.
            request.work(f"{request.generation.request_id}#{self.router_id}-{next(self._serials)}"),
            decode,
            self.book.book(decode.worker_id, decode_blocks=request.num_blocks),
            trace.chosen(choice, len(request.output)),
            transfer_id=uuid.uuid4().hex,
            lease_s=self._lease_s,
            answer_timeout_s=self._answer_timeout_s,
            stall_timeout_s=self._stall_timeout_s,
        )
        self._book_prefill(attempt, choice.prefill or choice.decode)
        return attempt

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

    def _placed(self, request: Request, turn: Turn) -> None:
        turn.leave(placed=True)
        self.metrics.queue_seconds.observe(turn.age_s())
        if request.placements:
            self.metrics.replacements.inc()
        request.placements += 1

    def _start_prefill(
        self, request: Request, attempt: Attempt, choice: Choice, ticket: Ticket | None
    ) -> None:
        """D's answer decides, whatever the index believed: a ticket needs a P, no ticket needs none."""
        if ticket is None:
            attempt.step.prefill = attempt.decode.worker_id
            self.metrics.prefills.labels("local").inc()
            self._book_prefill(attempt, choice.decode)
            self._note_routed(request, attempt.decode)
            return
        prefill = choice.prefill
        if prefill is None or self.fleet.link(prefill.worker_id) is None:
            views = self.fleet.views(request.hash_root)
            excluded = request.excluded_now(time.monotonic())
            prefill = self._policy.choose_prefill(self._demand(request), views, excluded)
        link = None if prefill is None else self.fleet.link(prefill.worker_id)
        if prefill is None or link is None:
            message = f"{attempt.decode.worker_id} wants {ticket.num_blocks - ticket.first_block} blocks"
            raise AttemptFailed("no_prefill", None, f"{message}, and no prefill worker is left")
        attempt.step.prefill = prefill.worker_id
        self.metrics.prefills.labels("remote").inc()
        self._book_prefill(attempt, prefill)
        attempt.hand_over(link, ticket, self._holder(choice.demand, link))
        self._note_routed(request, attempt.decode)
        self._note_routed(request, link)

    def _holder(self, demand: Demand, link: WorkerLink) -> PrefixHolder | None:
        """Who has a much longer prefix than the worker behind this link."""
        found = fetch_from(
            demand,
            link.worker_id,
            lambda worker_id: self.fleet.link(worker_id) is not None,
            self._fetch_min_tokens,
        )
        if found is None:
            return None
        worker_id, num_blocks = found
        holder = self.fleet.link(worker_id)
        assert holder is not None, "the policy chose among live workers"
        info = holder.info
        return PrefixHolder(info.worker_id, info.epoch, num_blocks, info.endpoints, info.ranks)

    def _note_routed(self, request: Request, link: WorkerLink) -> None:
        info = link.info
        if not self.discovery.is_exact(info.worker_id, info.epoch):
            self.index.note_routed(info.worker_id, info.epoch, request.hashes(), capacity=info.num_blocks)

    def _learn(self, request: Request, failure: AttemptFailed) -> None:
        """What the failure means for the next attempt. Raises InvalidRequest, Unavailable when there is none."""
        if failure.code == "invalid":
            raise InvalidRequest(failure.message)
        log.info("request %s: %s", request.generation.request_id, failure)
        if failure.code in ("busy", "draining"):
            return  # its link is marked: the policy does not see the worker until it says that there is room
        request.failures += 1
        until = time.monotonic() + _EXCLUDED_S
        if failure.blamed is not None:
            request.exclude(failure.blamed.worker_id, until)
        if failure.suspect is not None:
            request.avoid(failure.suspect.worker_id, until)
        if request.failures >= self._max_attempts:
            raise Unavailable(
                f"{request.failures} placements of the request failed (admission.max_attempts), "
                f"the last one with {failure}",
                retry_after_s=self.admission.retry_after_s(),
            )

    def _release(self, attempt: Attempt, outcome: str) -> None:
        attempt.release()
        self.metrics.placements.labels(outcome).inc()
        self.metrics.stages(attempt.step)
        done = attempt.step.times.prefill
        if done is not None:
            self.metrics.transfer_seconds.observe(done.transfer_s)
            self.metrics.transfer_bytes.labels(done.channel).inc(done.transfer_bytes)

    # --- what http, grpc and the command line ask -------------------------------------------------------------------

    def model(self) -> ModelInfo | None:
        """None until a decode worker has registered."""
        return self.fleet.model()

    def ready(self) -> bool:
        """True when a decode worker is connected."""
        return self.fleet.ready()

    async def status(self) -> dict[str, Any]:
        """What `headrace status --json` prints."""
        model = self.model()
        return {
            "model": None if model is None else dataclasses.asdict(model),
            "router": self.router_id,
            "redis": self.discovery.redis,
            "index": {"blocks": len(self.index), "approximate": self.discovery.approximate},
            "queue": self.admission.waiting,
            "in_flight": self._in_flight,
            "planner": msgspec.to_builtins(self.discovery.planned),
            "experts": self.experts.status(),
            "workers": [
                describe(member, self.book, self.index)
                for member in sorted(self.fleet.members(), key=lambda m: m.info.worker_id)
            ],
        }

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """What `headrace explain --json` prints. None: this replica has not seen the request, or forgot it."""
        traces = self.decisions.of(request_id)
        if not traces:
            return None
        return {"router_id": self.router_id, "requests": [trace.as_dict() for trace in traces]}

    async def experts_view(self) -> dict[str, Any]:
        """What `headrace experts --json` prints."""
        return await self.experts.view()

    async def worker_metrics(self) -> list[bytes]:
        """Prometheus text of each connected worker; one that does not answer in time is left out."""
        links = [member.link for member in self.fleet.members() if member.link.state == "up"]
        replies = await asyncio.gather(
            *(link.query(want_metrics=True, timeout_s=_METRICS_TIMEOUT_S) for link in links),
            return_exceptions=True,
        )
        texts = []
        for link, reply in zip(links, replies, strict=True):
            if isinstance(reply, StatusReply):
                texts.append(reply.metrics)
            elif isinstance(reply, TimeoutError | LinkDown):
                log.info("no metrics from worker %s: %s", link.worker_id, reply or "time-out")
            else:
                raise reply
        return texts
