"""A dispatcher without workers: answers what a test tells it to, and records what was asked and what was closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from router.generation import Generation, ModelInfo, TokenChunk
from workers.protocol.messages import TokenLogprobs

ANSWER = "Water falls, wheels turn 🙂 größer."

Script = Callable[[Generation], AsyncIterator[TokenChunk]]


class FakeDispatcher:
    """Without a script it answers `answer`, cut to max_tokens, one token a chunk, token by token as an engine would."""

    def __init__(self, vocab_size: int, answer: list[int], eos: int) -> None:
        self.info: ModelInfo | None = ModelInfo("tiny", 512, vocab_size)
        self.is_ready = True
        self.answer = answer
        self.eos = eos
        self.delay_s = 0.0
        self.error: Exception | None = None
        self.error_after = 0  # tokens
        self.script: Script | None = None
        self.expositions: list[bytes] = []
        self.explained: dict[str, dict[str, Any]] = {}
        self.experts: dict[str, Any] = {"groups": []}
        self.asked: list[Generation] = []
        self.open = 0
        self.closed_early: list[str] = []

    def model(self) -> ModelInfo | None:
        return self.info

    def ready(self) -> bool:
        return self.is_ready

    async def status(self) -> dict[str, Any]:
        return {"workers": [{"worker_id": "d0", "epoch": 1}]}

    def explain(self, request_id: str) -> dict[str, Any] | None:
        return self.explained.get(request_id)

    async def experts_view(self) -> dict[str, Any]:
        return self.experts

    async def worker_metrics(self) -> list[bytes]:
        return self.expositions

    async def generate(self, generation: Generation) -> AsyncIterator[TokenChunk]:
        self.asked.append(generation)
        self.open += 1
        finished = False
        try:
            async for chunk in (self.script or self._answer)(generation):
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            self.open -= 1
            if not finished:
                self.closed_early.append(generation.request_id)

    async def _answer(self, generation: Generation) -> AsyncIterator[TokenChunk]:
        sampling = generation.sampling
        tokens = [*self.answer, self.eos]
        for index, token in enumerate(tokens):
            if self.error is not None and index == self.error_after:
                raise self.error
            await asyncio.sleep(self.delay_s)
            stops = token == self.eos or token in sampling.stop_token_ids
            last = index + 1 == sampling.max_tokens
            reason = "stop" if stops else "length" if last else None
            yield TokenChunk(
                [token],
                self._logprobs(token, index, sampling.logprobs),
                reason,
                token if stops else None,
                cached_tokens=len(generation.prompt) // 2,
            )
            if reason is not None:
                return

    def _logprobs(self, token: int, index: int, count: int | None) -> list[TokenLogprobs]:
        if count is None:
            return []
        assert self.info is not None
        others = [((token + rank) % self.info.vocab_size, -0.25 - rank) for rank in range(count)]
        return [TokenLogprobs(-0.25 - index / 1000, others)]

    async def until_asked(self, count: int) -> None:
        for _ in range(500):
            if len(self.asked) >= count:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{len(self.asked)} generations were asked, not {count}")

    async def until_idle(self) -> None:
        """A moment later, everything that was asked must be closed."""
        for _ in range(200):
            if not self.open:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{self.open} generations are still open")
