"""Closed-loop load against an OpenAI-compatible server: N requests at a time, streamed, timed token by token.

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
from dataclasses import asdict, dataclass, field

import httpx


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
    token_times: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.started

    @property
    def tpot(self) -> float:
        return (self.token_times[-1] - self.token_times[0]) / max(1, len(self.token_times) - 1)


@dataclass(frozen=True)
class Result:
    requests: int
    errors: int
    output_tokens: int
    seconds: float
    output_tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    itl_p99_s: float


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
    limits = httpx.Limits(max_connections=shape.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        work = prompts(shape, await text_tokens(client, model))
        gate = asyncio.Semaphore(shape.concurrency)
        began = time.perf_counter()
        timed = await asyncio.gather(*(_one(client, model, p, shape.output_tokens, gate) for p in work))
        seconds = time.perf_counter() - began
    good = [t for t in timed if not t.error]
    if not good:
        raise RuntimeError(f"every request failed: {timed[0].error}")
    gaps = sorted(b - a for t in good for a, b in zip(t.token_times, t.token_times[1:], strict=False)) or [
        0.0
    ]
    ttfts = sorted(t.ttft for t in good)
    tokens = sum(len(t.token_times) for t in good)
    return Result(
        requests=len(timed),
        errors=len(timed) - len(good),
        output_tokens=tokens,
        seconds=seconds,
        output_tokens_per_s=tokens / seconds,
        ttft_p50_s=statistics.median(ttfts),
        ttft_p99_s=_percentile(ttfts, 0.99),
        tpot_p50_s=statistics.median(t.tpot for t in good),
        itl_p99_s=_percentile(gaps, 0.99),
    )


async def _one(
    client: httpx.AsyncClient, model: str, prompt: list[int], output_tokens: int, gate: asyncio.Semaphore
) -> Timed:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    async with gate:
        timed = Timed(time.perf_counter())
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                timed.error = (await answer.aread()).decode()
                return timed
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    timed.error = str(event["error"])
                    return timed
                now = time.perf_counter()
                for choice in event["choices"]:
                    timed.token_times += [now] * len(choice.get("token_ids") or ())
    if len(timed.token_times) != output_tokens:
        timed.error = f"{len(timed.token_times)} tokens instead of {output_tokens}"
    return timed


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


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
