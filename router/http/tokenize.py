"""POST /tokenize and /detokenize, with vLLM's fields."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import Request
from msgspec import Struct
from starlette.responses import Response

from router.chat.messages import Message
from router.http.body import decode_body, read_body
from router.http.front import Front
from router.refusal import Refusal
from router.sampling import check_token_ids
from router.serving import served_model


class TokenizeBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None  # null: as the completions and chat endpoints do
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeBody(Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: list[int]


_tokenize_decoder = msgspec.json.Decoder(TokenizeBody)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeBody)


class TokenizeEndpoint:
    def __init__(self, front: Front) -> None:
        self._front = front

    async def tokenize(self, request: Request) -> Response:
        front = self._front
        raw = await read_body(request, front.config.max_body)
        body = decode_body(raw, TokenizeBody, _tokenize_decoder)
        model = served_model(front.dispatcher, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise Refusal("exactly one of prompt and messages must be given", "prompt")
        if body.messages is not None:
            tokens = await front.prompts.of_chat(
                body.messages,
                model,
                add_generation_prompt=body.add_generation_prompt,
                add_special_tokens=bool(body.add_special_tokens),
            )
        else:
            tokens = await front.prompts.encode(body.prompt or "", body.add_special_tokens is not False)
        strings = [front.prompts.tokenizer.token_string(token) for token in tokens]
        return _json(
            {
                "count": len(tokens),
                "max_model_len": model.max_model_len,
                "tokens": tokens,
                "token_strs": strings if body.return_token_strs else None,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        front = self._front
        raw = await read_body(request, front.config.max_body)
        body = decode_body(raw, DetokenizeBody, _detokenize_decoder)
        model = served_model(front.dispatcher, body.model)
        check_token_ids("tokens", body.tokens, model.vocab_size)
        text = await asyncio.to_thread(front.prompts.tokenizer.decode, body.tokens, False)
        return _json({"prompt": text})


def _json(content: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
