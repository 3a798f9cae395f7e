"""POST /v1/chat/completions"""

from __future__ import annotations

import time

from fastapi import Request
from starlette.responses import Response

from router.http.asked import ChatBody, chat_decoder, chat_logprobs, check_chat
from router.http.body import decode_body, read_body
from router.http.chat_format import ChatFormat
from router.http.front import Front
from router.http.gate import caller_of
from router.http.plan import make_plan
from router.http.reply import Reply
from router.serving import served_model


class ChatEndpoint:
    def __init__(self, front: Front) -> None:
        self._front = front

    async def __call__(self, request: Request) -> Response:
        arrived = time.perf_counter()
        front = self._front
        body = decode_body(await read_body(request, front.config.max_body), ChatBody, chat_decoder)
        check_chat(body)
        model = served_model(front.dispatcher, body.model)
        prompt = await front.prompts.of_chat(
            body.messages,
            model,
            add_generation_prompt=body.add_generation_prompt is not False,
            add_special_tokens=bool(body.add_special_tokens),
        )
        plan = make_plan(
            body,
            "chatcmpl",
            model,
            [prompt],
            chat_logprobs(body),
            caller_of(request.scope),
            prompt_param="messages",
            max_tokens_param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        )
        return Reply(plan, ChatFormat(plan), "chat", arrived, front)
