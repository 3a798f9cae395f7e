"""The workloads by name. Each drives one server through the load generator and answers with figures."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from bench.load import Result, Target, Timed, ask, client_for, closed_loop, result_of
from bench.prompts import Book
from bench.spread import percentile

Figures = dict[str, float]


@dataclass(frozen=True)
class Scale:
    """How much of a workload is done; `QUICK` proves that everything works and measures nothing."""

    requests_one: int = 4
    requests_sixteen: int = 64
    sessions: int = 8
    turns: int = 5
    prefill_prompts: int = 8
    output_tokens: int = 128
    stream_tokens: int = 256
    long_prompt: int = 2048
    long_every_s: float = 2.0
    long_most: int = 30


FULL = Scale()
QUICK = Scale(
    requests_one=1,
    requests_sixteen=4,
    sessions=2,
    turns=2,
    prefill_prompts=1,
    output_tokens=16,
    stream_tokens=32,
    long_prompt=512,
    long_most=3,
)


@dataclass(frozen=True)
class Workload:
    what: str
    headline: str  # the figure that the table shows first and the plot draws
    more_is_better: bool
    columns: Mapping[str, tuple[str, float, int]]  # figure: (title with unit, scale, digits)
    drive: Callable[[Target, Book, int, Scale], Coroutine[Any, Any, Figures]]


async def one(target: Target, book: Book, seed: int, scale: Scale) -> Figures:
    rng = random.Random(f"one/{seed}")
    prompts = [book.passage(128, rng) for _ in range(scale.requests_one)]
    return _served(await _closed(target, prompts, scale.output_tokens, 1))


async def sixteen(target: Target, book: Book, seed: int, scale: Scale) -> Figures:
    rng = random.Random(f"sixteen/{seed}")
    own = [rng.randint(128, 512) for _ in range(scale.requests_sixteen)]
    return _served(await _closed(target, book.sharing(256, own, rng), scale.output_tokens, 16))


async def sessions(target: Target, book: Book, seed: int, scale: Scale) -> Figures:
    """Each session resends all it has said and heard, and adds 64 tokens; 256 tokens are the same in all of them."""
    rng = random.Random(f"sessions/{seed}")
    histories = book.sharing(256, [128] * scale.sessions, rng)
    questions = [[book.passage(64, rng) for _ in range(scale.turns - 1)] for _ in histories]

    async def session(client: httpx.AsyncClient, history: str, asked: list[str]) -> list[Timed]:
        answers = []
        for question in [*asked, ""]:
            answers.append(await ask(client, target, history, 64))
            history += answers[-1].text + question
        return answers

    began = time.perf_counter()
    async with client_for(target, scale.sessions) as client:
        talks = await asyncio.gather(*map(session, [client] * len(histories), histories, questions))
    return _served(result_of([answer for talk in talks for answer in talk], time.perf_counter() - began))


async def prefill(target: Target, book: Book, seed: int, scale: Scale) -> Figures:
    rng = random.Random(f"prefill/{seed}")
    prompts = [book.passage(scale.long_prompt, rng) for _ in range(scale.prefill_prompts)]
    result = await _closed(target, prompts, 1, 1)
    read = (result.requests - result.errors) * scale.long_prompt
    return _served(result) | {"prompt_tokens_per_s": read / result.seconds}


async def interference(target: Target, book: Book, seed: int, scale: Scale) -> Figures:
    """Eight streams alone, then eight while long prompts arrive at a steady pace, however slowly they are read.

    After `long_most` prompts no more come: a server that puts prompts first and reads them too slowly would never end.
    """
    rng = random.Random(f"interference/{seed}")
    async with client_for(target, 64) as client:
        alone = await _streams(client, target, book, rng, scale)
        running = [Timed(0.0) for _ in alone]
        streams = asyncio.ensure_future(_streams(client, target, book, rng, scale, running))
        long_prompts: list[asyncio.Future[Timed]] = []
        # Eight requests fill these; asking now and then is simpler than an event in each.
        while not streams.done() and not all(t.arrivals for t in running):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        while not streams.done() and len(long_prompts) < scale.long_most:
            prompt = book.passage(scale.long_prompt, rng)
            long_prompts.append(asyncio.ensure_future(ask(client, target, prompt, 1)))
            await asyncio.wait([streams], timeout=scale.long_every_s)
        disturbed = await streams
        arrived = await asyncio.gather(*long_prompts)
    quiet, loud = _gaps(alone), _gaps(disturbed)
    ttfts = sorted(t.ttft for t in arrived if not t.error) or [0.0]
    return {
        "itl_p50_alone_s": percentile(quiet, 0.5),
        "itl_p99_alone_s": percentile(quiet, 0.99),
        "itl_p50_s": percentile(loud, 0.5),
        "itl_p99_s": percentile(loud, 0.99),
        "itl_max_s": loud[-1],
        "long_ttft_p50_s": percentile(ttfts, 0.5),
        "long_prompts": float(len(arrived)),
        "requests": float(len(alone) + len(disturbed) + len(arrived)),
        "errors": float(sum(bool(t.error) for t in [*alone, *disturbed, *arrived])),
    }


async def _streams(
    client: httpx.AsyncClient,
    target: Target,
    book: Book,
    rng: random.Random,
    scale: Scale,
    running: list[Timed] | None = None,
) -> list[Timed]:
    running = running or [Timed(0.0) for _ in range(8)]
    prompts = [book.passage(128, rng) for _ in running]
    return await asyncio.gather(
        *(ask(client, target, p, scale.stream_tokens, t) for p, t in zip(prompts, running, strict=True))
    )


def _gaps(streams: list[Timed]) -> list[float]:
    good = sorted(gap for t in streams if not t.error for gap in t.gaps)
    if not good:
        raise RuntimeError(f"no stream gave a gap: {streams[0].error or 'one arrival each'}")
    return good


async def _closed(target: Target, prompts: list[str], output_tokens: int, concurrency: int) -> Result:
    async with client_for(target, concurrency) as client:
        timed, seconds = await closed_loop(client, target, prompts, output_tokens, concurrency)
    return result_of(timed, seconds)


def _served(result: Result) -> Figures:
    figures = {name: value for name, value in vars(result).items() if isinstance(value, int | float)}
    if result.first_error:
        print(
            f"    {result.errors} of {result.requests} failed, the first: {result.first_error[:300]}",
            flush=True,
        )
    return figures


_SERVED = {
    "output_tokens_per_s": ("output tokens/s", 1.0, 0),
    "ttft_p50_s": ("TTFT p50, ms", 1e3, 0),
    "tpot_p50_s": ("TPOT p50, ms", 1e3, 1),
    "itl_p99_s": ("ITL p99, ms", 1e3, 0),
}

WORKLOADS: dict[str, Workload] = {
    "one": Workload("one at a time, 128 tokens in, 128 out", "output_tokens_per_s", True, _SERVED, one),
    "sixteen": Workload(
        "16 at a time, 64 requests, 256 shared + 128 to 512 own tokens in, 128 out",
        "output_tokens_per_s",
        True,
        _SERVED,
        sixteen,
    ),
    "sessions": Workload(
        "8 sessions of 5 turns, the history resent, 64 tokens out a turn",
        "output_tokens_per_s",
        True,
        _SERVED,
        sessions,
    ),
    "prefill": Workload(
        "prompts of 2,048 tokens, one at a time, 1 token out",
        "prompt_tokens_per_s",
        True,
        {"prompt_tokens_per_s": ("prompt tokens/s", 1.0, 0), "ttft_p50_s": ("TTFT p50, ms", 1e3, 0)},
        prefill,
    ),
    "interference": Workload(
        "8 streams of 256 tokens, alone and while a prompt of 2,048 tokens arrives every 2 s",
        "itl_p99_s",
        False,
        {
            "itl_p99_s": ("ITL p99 with, ms", 1e3, 0),
            "itl_p50_s": ("ITL p50 with, ms", 1e3, 1),
            "itl_p99_alone_s": ("ITL p99 alone, ms", 1e3, 0),
            "itl_p50_alone_s": ("ITL p50 alone, ms", 1e3, 1),
            "long_ttft_p50_s": ("TTFT p50 of the long prompts, ms", 1e3, 0),
        },
        interference,
    ),
}
