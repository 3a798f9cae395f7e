"""The gRPC service headrace.v1.Inference."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import Any

import grpc

from router.chat.answer import AnswerReader, Piece
from router.chat.prompt import Prompts
from router.chat.stops import StopAutomaton
from router.generation import Dispatcher, Generation, GenerationError, ModelInfo
from router.grpc import headrace_pb2 as pb
from router.grpc.asked import asked_logprobs, asked_prompt, asked_sampling
from router.grpc.keys import caller_of
from router.grpc.refusals import abort
from router.metrics import RequestRecord, RouterMetrics
from router.sampling import checked_cache_salt, checked_priority, to_sampling, to_text_options
from router.sequences import Sequence, run
from router.serving import served_model
from router.sessions import Sessions
from router.tenants import Caller, Tenant, Tenants

logger = logging.getLogger(__name__)

_FINISH_REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


class InferenceService:
    """The methods are coroutines that write, not generators: a cancelled call runs their `finally` at once."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        prompts: Prompts,
        metrics: RouterMetrics,
        sessions: Sessions,
        tenants: Tenants,
    ) -> None:
        self._dispatcher = dispatcher
        self._prompts = prompts
        self._metrics = metrics
        self._sessions = sessions
        self._tenants = tenants

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        arrived = time.perf_counter()
        caller = await caller_of(context, self._tenants)
        try:
            model = served_model(self._dispatcher, request.model or None)
            record = self._metrics.request(model.name, "grpc", arrived)
            await self._measured(request, context, model, record, caller)
        except GenerationError as error:
            if error.reason is not None:
                self._metrics.refused(caller.tenant.name, error.reason)
            await abort(context, error, caller.tenant)
        except grpc.aio.AbortError:
            raise
        except Exception:
            logger.exception("Generate failed")
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.Model:
        try:
            model = served_model(self._dispatcher, request.model or None)
        except GenerationError as error:
            await abort(context, error)
        return pb.Model(name=model.name, max_model_len=model.max_model_len, vocab_size=model.vocab_size)

    async def _measured(
        self,
        request: pb.GenerateRequest,
        context: Any,
        model: ModelInfo,
        record: RequestRecord,
        caller: Caller,
    ) -> None:
        outcome = "internal_error"
        try:
            async with self._sessions.open() as session:
                if caller.timeout_s is None:  # else gRPC itself cancels the call
                    session.end_at(caller.deadline())
                sequence = await self._sequence(request, model, record, caller)
                record.prepared()
                outcome = await self._write_all(sequence, context, caller.tenant)
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except GenerationError as error:
            outcome = error.kind
            raise
        finally:
            record.end(outcome)

    async def _sequence(
        self, request: pb.GenerateRequest, model: ModelInfo, record: RequestRecord, caller: Caller
    ) -> Sequence:
        """Validates the request whole. Raises `Refusal`."""
        prompt = await asked_prompt(request, self._prompts, model)
        asked = asked_sampling(request)
        logprobs = asked_logprobs(request)
        sampling = to_sampling(
            asked, model, len(prompt), logprobs, prompt_param=request.WhichOneof("prompt") or "prompt"
        )
        text = to_text_options(asked)
        generation = Generation(
            f"grpc-{secrets.token_hex(16)}",
            prompt,
            sampling,
            caller.tenant.cache_salt(checked_cache_salt(asked)),
            caller.tenant.priority(checked_priority(asked)),
            caller.tenant.name,
            caller.deadline(),
            caller.tenant.quota.expected_output(sampling.max_tokens),
        )
        automaton = StopAutomaton(text.stop) if text.stop else None
        reader = AnswerReader(
            self._prompts.tokenizer, text, automaton, sampling.stop_token_ids, logprobs is not None
        )
        return Sequence(generation, reader, record.sequence(len(prompt)))

    async def _write_all(self, sequence: Sequence, context: Any, tenant: Tenant) -> str:
        """Returns the finish reason. Raises `TenantLimit` when the tenant may not ask for more now."""
        generation = sequence.generation
        permit = tenant.quota.enter(
            len(generation.prompt), [generation.sampling.max_tokens], time.monotonic()
        )
        finish_reason = ""
        usage = pb.Usage(prompt_tokens=len(sequence.generation.prompt))
        request_id = sequence.generation.request_id

        async def write(piece: Piece) -> None:
            nonlocal request_id, finish_reason
            usage.completion_tokens += len(piece.token_ids)
            usage.cached_tokens = max(usage.cached_tokens, piece.cached_tokens)
            await context.write(_response(piece, request_id, usage))
            request_id = ""
            finish_reason = piece.finish_reason or ""

        try:
            await run(self._dispatcher, sequence, write)
        finally:
            permit.settle(usage.completion_tokens, bool(finish_reason), time.monotonic())
            self._metrics.used(tenant.name, permit)
        return finish_reason


def _response(piece: Piece, request_id: str, usage: pb.Usage) -> pb.GenerateResponse:
    response = pb.GenerateResponse(request_id=request_id, text=piece.text, token_ids=piece.token_ids)
    for token in piece.logprobs:
        top = [pb.TopLogprob(token=data, logprob=logprob) for data, logprob in token.top]
        response.logprobs.append(pb.TokenLogprobs(token=token.data, logprob=token.logprob, top=top))
    if piece.finish_reason is not None:
        response.finish_reason = _FINISH_REASONS[piece.finish_reason]
        response.usage.CopyFrom(usage)
        if isinstance(piece.stop_reason, str):
            response.stop_string = piece.stop_reason
        elif piece.stop_reason is not None:
            response.stop_token_id = piece.stop_reason
    return response
