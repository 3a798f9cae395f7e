"""POST /v1/completions"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import Request
from starlette.responses import Response

from router.generation import ModelInfo
from router.http.asked import CompletionBody, check_completion, completion_decoder
from router.http.body import decode_body, read_body
from router.http.completion_format import CompletionFormat
from router.http.front import Front
from router.http.gate import caller_of
from router.http.plan import make_plan
from router.http.reply import Reply
from router.refusal import Refusal, shown
from router.sampling import MAX_SEQUENCES
from router.serving import served_model


class CompletionsEndpoint:
    def __init__(self, front: Front) -> None:
        self._front = front

    async def __call__(self, request: Request) -> Response:
        arrived = time.perf_counter()
        front = self._front
        body = decode_body(
            await read_body(request, front.config.max_body), CompletionBody, completion_decoder
        )
        check_completion(body)
        model = served_model(front.dispatcher, body.model)
        asked = _prompts(body.prompt)
        prompts = []
        for prompt in asked:
            prompts.append(await self._token_ids(prompt, model, body.add_special_tokens is not False))
            await asyncio.sleep(0)  # each is short, all of them together are not: streams go on meanwhile
        plan = make_plan(
            body,
            "cmpl",
            model,
            prompts,
            body.logprobs,
            caller_of(request.scope),
            echo=[self._text(prompt) for prompt in asked] if body.echo else [],
        )
        return Reply(plan, CompletionFormat(plan), "completions", arrived, front)

    async def _token_ids(
        self, prompt: str | list[int], model: ModelInfo, add_special_tokens: bool
    ) -> list[int]:
        if isinstance(prompt, str):
            return await self._front.prompts.of_text(
                prompt, model, "prompt", add_special_tokens=add_special_tokens
            )
        return self._front.prompts.of_ids(prompt, model, "prompt")

    def _text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return self._front.prompts.tokenizer.decode(prompt, skip_special_tokens=False)


def _prompts(asked: str | list[Any]) -> list[str | list[int]]:
    """A text, texts, token ids, or lists of token ids. Raises `Refusal`."""
    if isinstance(asked, str):
        return [asked]
    if not asked:
        raise Refusal("prompt must not be empty", "prompt")
    if _all(asked, int):
        return [asked]
    if not (_all(asked, str) or (_all(asked, list) and all(_all(ids, int) for ids in asked))):
        raise Refusal(
            "prompt must be a string, a list of strings, a list of token ids or a list of lists of token ids, "
            f"got {shown(asked)}",
            "prompt",
            code="invalid_type",
        )
    if len(asked) > MAX_SEQUENCES:
        raise Refusal(f"prompt holds {len(asked)} prompts, at most {MAX_SEQUENCES} are allowed", "prompt")
    return asked


def _all(values: list[Any], kind: type) -> bool:
    return set(map(type, values)) <= {kind}  # a prompt may be thousands of token ids: no Python for each
