"""Closed-loop load against an OpenAI-compatible server: N requests at a time, streamed, every arrival timed.

python -m bench.load --url http://127.0.0.1:8000 --concurrency 16 --requests 64
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import random
import statistics
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from bench.spread import percentile

# What makes everybody write the same number of tokens, and return_token_ids, where it is known, says how many
# tokens an arrival has. Servers that do not know a field ignore it; those that refuse it bring a body of their own.
GREEDY: Mapping[str, Any] = {
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
    "stream_options": {"include_usage": True},
}
TIMEOUT_S = 1800


@dataclass(frozen=True)
class Target:
    """A server, the name of its model and what its requests hold besides prompt and max_tokens."""

    url: str
    model: str
    fields: Mapping[str, Any] = field(default_factory=lambda: GREEDY)


@dataclass(frozen=True)
class Shape:
    """What is asked: every prompt is `shared` tokens that all have and a number of its own from a range."""

    requests: int
    concurrency: int
    shared_tokens: int
    own_tokens: tuple[int, int]
    output_tokens: int
    seed: int = 0


@dataclass
class Timed:
    """One request; seconds."""

    started: float
    arrivals: list[float] = field(default_factory=list)  # when text or tokens came, not their count
    tokens: int = 0  # of output: counted by the server where it says so
    prompt_tokens: int | None = None  # as the server counted them
    ended: float = 0.0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # where the server tells them
    error: str = ""

    def take(self, event: dict[str, Any], now: float) -> None:
        """An event of the stream, of completions or chat, that came at `now`."""
        if event.get("error"):
            self.error = str(event["error"])
            return
        for choice in event.get("choices") or ():
            token_ids, text = choice.get("token_ids"), choice.get("text")
            if delta := choice.get("delta"):
                text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
            if token_ids or text:
                self.arrivals.append(now)
                self.tokens += len(token_ids) if token_ids else 1
                self.text += text or ""
                self.token_ids += token_ids or ()
        if usage := event.get("usage"):
            self.tokens = usage["completion_tokens"]
            self.prompt_tokens = usage["prompt_tokens"]

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.started

    @property
    def tpot(self) -> float:
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Between two arrivals: what a reader waits, whether one token comes or two at once."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]


@dataclass(frozen=True)
class Result:
    requests: int
    errors: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    output_tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    itl_p50_s: float
    itl_p99_s: float
    first_error: str = ""


def result_of(timed: Sequence[Timed], seconds: float) -> Result:
    """Failed requests are counted and leave no other trace. Raises RuntimeError when every one failed."""
    good = [t for t in timed if not t.error]
    if not good:
        raise RuntimeError(f"every request failed: {timed[0].error if timed else 'there was none'}")
    gaps = sorted(gap for t in good for gap in t.gaps) or [0.0]
    ttfts = sorted(t.ttft for t in good)
    tokens = sum(t.tokens for t in good)
    return Result(
        requests=len(timed),
        errors=len(timed) - len(good),
        prompt_tokens=sum(t.prompt_tokens or 0 for t in good),
        output_tokens=tokens,
        seconds=seconds,
        output_tokens_per_s=tokens / seconds,
        ttft_p50_s=statistics.median(ttfts),
        ttft_p99_s=percentile(ttfts, 0.99),
        tpot_p50_s=statistics.median(t.tpot for t in good),
        itl_p50_s=percentile(gaps, 0.5),
        itl_p99_s=percentile(gaps, 0.99),
        first_error=next((t.error for t in timed if t.error), ""),
    )


def client_for(target: Target, concurrency: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=concurrency)
    return httpx.AsyncClient(base_url=target.url, timeout=TIMEOUT_S, limits=limits)


async def closed_loop(
    client: httpx.AsyncClient,
    target: Target,
    prompts: Sequence[str | list[int]],
    output_tokens: int,
    concurrency: int,
) -> tuple[list[Timed], float]:
    """All prompts, `concurrency` at a time; the requests and the seconds they took together."""
    gate = asyncio.Semaphore(concurrency)

    async def one(prompt: str | list[int]) -> Timed:
        async with gate:
            return await ask(client, target, prompt, output_tokens)

    began = time.perf_counter()
    timed = await asyncio.gather(*(one(prompt) for prompt in prompts))
    return list(timed), time.perf_counter() - began


async def ask(
    client: httpx.AsyncClient,
    target: Target,
    prompt: str | list[int],
    output_tokens: int,
    timed: Timed | None = None,
) -> Timed:
    """One streamed completion. A `timed` that is given is filled while the answer comes."""
    body = {"model": target.model, "prompt": prompt, "max_tokens": output_tokens, "stream": True}
    body |= target.fields
    timed = timed or Timed(time.perf_counter())
    timed.started = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                timed.error = (await answer.aread()).decode(errors="replace")[:500]
                return timed
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    timed.take(json.loads(line[6:]), time.perf_counter())
    except httpx.HTTPError as error:
        timed.error = f"{type(error).__name__}: {error}"
    timed.ended = time.perf_counter()
    if not timed.error and timed.tokens != output_tokens:
        timed.error = f"{timed.tokens} tokens instead of {output_tokens}"
    if not timed.error and not timed.arrivals:
        timed.arrivals.append(timed.ended)  # all its text was held back to the end
    return timed


async def text_tokens(client: httpx.AsyncClient, model: str) -> list[int]:
    """Token ids of text that every Python has: source code and prose."""
    text = inspect.getsource(argparse) + inspect.getsource(textwrap)
    answer = await client.post("/tokenize", json={"model": model, "prompt": text})
    answer.raise_for_status()
    return list(answer.json()["tokens"])


def prompts(shape: Shape, text: list[int]) -> list[list[int]]:
    rng = random.Random(shape.seed)
    start = rng.randrange(len(text) - shape.shared_tokens)
    shared = text[start : start + shape.shared_tokens]
    made = []
    for _ in range(shape.requests):
        length = rng.randint(*shape.own_tokens)
        own = rng.randrange(len(text) - length)
        made.append(shared + text[own : own + length])
    return made


async def run(url: str, shape: Shape) -> Result:
    """Drive the shape once. Prompts differ with `shape.seed`, so that runs do not answer from each other's cache."""
    async with client_for(Target(url, ""), shape.concurrency) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        work = prompts(shape, await text_tokens(client, model))
        timed, seconds = await closed_loop(
            client, Target(url, model), work, shape.output_tokens, shape.concurrency
        )
    return result_of(timed, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--shared-tokens", type=int, default=256)
    parser.add_argument("--own-tokens", type=int, nargs=2, default=(128, 512), metavar=("MIN", "MAX"))
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    shape = Shape(
        given.requests,
        given.concurrency,
        given.shared_tokens,
        (given.own_tokens[0], given.own_tokens[1]),
        given.output_tokens,
        given.seed,
    )
    print(json.dumps(asdict(asyncio.run(run(given.url, shape))), indent=2))


if __name__ == "__main__":
    main()
