"""The least of an OpenAI-compatible server: streamed /v1/completions over anything that turns ids into ids.

For benchmarks only. It lets an engine in one process be driven by the same load generator over the same HTTP as whole
servers, so that the cost of HTTP, tokenizer and detokenizer is counted for all. It checks nothing a client may do wrong.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from router.chat.detokenize import detokenizer
from router.chat.tokenizer import TextTokenizer


@dataclass
class Answer:
    """Where a writer puts what it has written, from its own thread."""

    max_tokens: int
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    arrived: asyncio.Queue[list[int] | None] = field(default_factory=asyncio.Queue)

    def put(self, token_ids: list[int] | None) -> None:
        """On the event loop's thread. None: the writer has failed."""
        self.arrived.put_nowait(token_ids)

    def put_from_thread(self, token_ids: list[int] | None) -> None:
        self.loop.call_soon_threadsafe(self.put, token_ids)


class Writer(Protocol):
    def submit(self, prompt: list[int], answer: Answer) -> None:
        """Begin to write `answer.max_tokens` tokens, whatever ends the text, and return at once."""


def completions_app(writer: Writer, model_path: Path, model_name: str) -> Starlette:
    tokenizer = TextTokenizer(model_path)

    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()
        prompt = body["prompt"]
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        answer = Answer(int(body["max_tokens"]))
        writer.submit(ids, answer)
        events = _events(answer, tokenizer, {"object": "text_completion", "model": model_name}, len(ids))
        return StreamingResponse(events, media_type="text/event-stream")

    async def models(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": model_name, "object": "model"}]})

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({})

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ]
    )


async def _events(
    answer: Answer, tokenizer: TextTokenizer, envelope: dict[str, Any], prompt_tokens: int
) -> AsyncIterator[bytes]:
    text = detokenizer(tokenizer)
    written = 0
    while written < answer.max_tokens:
        ids = await answer.arrived.get()
        if ids is None:
            yield _event(envelope | {"error": {"message": "the writer failed; its log says why"}})
            return
        written += len(ids)
        piece = "".join(map(text.push, ids))
        choice = {"index": 0, "text": piece, "token_ids": ids, "finish_reason": None}
        if written >= answer.max_tokens:
            choice |= {"text": piece + text.finish(), "finish_reason": "length"}
        yield _event(envelope | {"choices": [choice]})
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }
    yield _event(envelope | {"choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def serve(app: Starlette, port: int) -> None:
    """Until SIGTERM or SIGINT."""
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
