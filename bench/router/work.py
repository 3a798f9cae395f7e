"""What is asked of the router and of the plain app: the same requests, and for the plain app the answers to give."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.prompts import Book
from bench.router.clock_tokens import clock_tokens
from router.chat.tokenizer import TextTokenizer

PROMPT_TOKENS = 512
OUTPUT_TOKENS = 16  # of an answer that is not streamed
STREAM_PROMPT_TOKENS = 64
STREAM_TOKENS = 512
_PROMPTS = 1024  # different ones


@dataclass(frozen=True)
class Scenario:
    name: str
    path: str
    bodies: list[dict[str, Any]]
    streams: bool
    step_s: float  # between two steps of the workers; 0: as fast as asked
    connections: int

    def requests(self, path: str | None = None) -> list[bytes]:
        return [request(path or self.path, body) for body in self.bodies]


def request(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body, separators=(",", ":")).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer none\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


class Work:
    def __init__(self, tokenizer: TextTokenizer, seed: int) -> None:
        rng = random.Random(seed)
        self.clock = clock_tokens(tokenizer)
        book = Book(_Plain(tokenizer))
        self._texts = [book.passage(PROMPT_TOKENS, rng) for _ in range(_PROMPTS)]
        self._ids = [tokenizer.encode(text, False) for text in self._texts]
        self._short = [book.passage(STREAM_PROMPT_TOKENS, rng) for _ in range(_PROMPTS)]

    def clock_of_text(self) -> dict[bytes, int]:
        return {json.dumps(text).encode(): number for number, (_, text) in enumerate(self.clock)}

    def whole(self, kind: str, connections: int) -> Scenario:
        """Answers that are not streamed, to prompts of text or of token ids."""
        prompts: Sequence[Any] = self._texts if kind == "text" else self._ids
        bodies = [
            {"model": "simulated", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0}
            for prompt in prompts
        ]
        return Scenario(f"whole, {kind}", "/v1/completions", bodies, False, 0.0, connections)

    def stream(self, name: str, connections: int, step_s: float, tokens: int = STREAM_TOKENS) -> Scenario:
        """Chats, an event for each token."""
        bodies = [
            {
                "model": "simulated",
                "messages": [{"role": "user", "content": text}],
                "max_tokens": tokens,
                "temperature": 0,
                "stream": True,
            }
            for text in self._short
        ]
        return Scenario(name, "/v1/chat/completions", bodies, True, step_s, connections)

    def plain_answers(self, whole: bytes, stream: bytes) -> dict[str, Any]:
        """For the plain app: the router's own answers, with every token that can be in them."""
        first, *rest = stream.decode().split("\n\n")  # the role; tokens; how it ended; [DONE]; ""
        token = json.loads(rest[0].removeprefix("data: "))["choices"][0]["delta"]["content"]
        before, after = rest[0].split(json.dumps(token))
        return {
            "whole": whole.decode(),
            "head": first + "\n\n",
            "events": [f"{before}{json.dumps(text)}{after}\n\n" for _, text in self.clock],
            "tail": "\n\n".join(rest[-3:]),
        }


class _Plain:
    """As bench.prompts wants it: without special tokens."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, False)

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, False)
