"""Load for any OpenAI-compatible server, and what it answered: `headrace bench serve`, or python -m bench.serve.

Open loop (the default): requests come when they come, however slow the answers are; --rate with --arrivals, or
--trace. Closed loop: --concurrency users, each asks again when it has its answer. Latencies count from when a request
was due, so an open loop hides no waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import resource
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop

from bench.load import GREEDY
from bench.machine import describe
from bench.results import write_results
from bench.serve.arrivals import KINDS, Arrivals
from bench.serve.drive import Run, closed_loop, open_loop, told
from bench.serve.figures import each, figures
from bench.serve.prompts import PromptMaker
from bench.serve.report import Progress, plot, table
from bench.serve.server import Server, ServerError, find_out, first_model
from bench.serve.wire import Wire
from bench.serve.work import Range, Session, Synthetic, replayed, until
from cluster.planner.slo import Slo
from cluster.planner.trace import TraceError, read_trace


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="headrace bench serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    server = parser.add_argument_group("the server")
    server.add_argument("--url", default="http://127.0.0.1:8000")
    server.add_argument("--model", help="default: the first that /v1/models lists")
    server.add_argument("--api-key")
    server.add_argument("--api", choices=("completions", "chat"), default="completions")
    server.add_argument("--timeout", type=_positive, default=600.0, help="seconds for a whole answer")
    server.add_argument(
        "--prompts",
        choices=("auto", "ids", "text"),
        default="auto",
        help="auto: token ids where they are taken",
    )
    server.add_argument("--vocab-size", type=int, help="token ids are below; default: found out by asking")
    when = parser.add_argument_group("when requests come")
    when.add_argument(
        "--rate", type=_positive, help="sessions per second on the average (open loop; default 1)"
    )
    when.add_argument("--arrivals", choices=KINDS, default="poisson")
    when.add_argument(
        "--cv", type=_positive, default=2.0, help="gamma: deviation of the gaps over their mean"
    )
    when.add_argument("--on", type=_positive, default=5.0, help="onoff: seconds of load")
    when.add_argument("--off", type=float, default=5.0, help="onoff: seconds of silence")
    when.add_argument("--trace", type=Path, help="Mooncake JSONL or Azure CSV, replayed")
    when.add_argument("--speedup", type=_positive, default=1.0, help="of the trace")
    when.add_argument("--scale", type=_positive, default=1.0, help="of the trace's lengths")
    when.add_argument("--max-tokens", type=int, help="of the trace: prompt and answer together")
    when.add_argument("--concurrency", type=int, help="closed loop with so many users")
    when.add_argument(
        "--duration", type=_positive, help="seconds in which requests come (with --trace: of it)"
    )
    when.add_argument("--requests", type=int, help="at most so many; default 100 unless there is another end")
    when.add_argument(
        "--warmup", type=float, default=0.0, help="seconds at the beginning that are not counted"
    )
    what = parser.add_argument_group("what is asked (without --trace); numbers of tokens, N or LOW:HIGH")
    what.add_argument("--prompt-tokens", type=_range, default=Range(512, 512), help="of a prompt's own")
    what.add_argument(
        "--shared-tokens", type=int, default=0, help="that prompts have in common, before their own"
    )
    what.add_argument("--shared-kinds", type=int, default=1, help="different beginnings")
    what.add_argument("--output-tokens", type=_range, default=Range(128, 128))
    what.add_argument("--turns", type=int, default=1, help="of a session; the history is sent again")
    what.add_argument("--turn-tokens", type=_range, default=Range(64, 64), help="that a further turn adds")
    what.add_argument(
        "--think", type=float, default=0.0, help="mean seconds between an answer and the next turn"
    )
    how = parser.add_argument_group("what comes of it")
    how.add_argument("--slo", type=_slo, help="for goodput, e.g. ttft=1.0,tpot=0.05 (also e2e=)")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--out", type=Path, default=Path("bench-out/serve"))
    how.add_argument("--every-request", action="store_true", help="all requests in the JSON too")
    options = parser.parse_args(given)
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.concurrency is not None and options.rate is not None:
        parser.error("--rate is of an open loop, --concurrency of a closed one: give one of them")
    if options.trace is not None and options.rate is not None:
        parser.error("--trace has its own times: use --speedup instead of --rate")
    for name in ("concurrency", "requests", "turns", "shared_kinds", "vocab_size", "max_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, it must be at least 1")
    if options.max_tokens is not None and options.max_tokens < 2:
        parser.error("--max-tokens is 1, it must hold a token of prompt and one of answer")
    for name in ("shared_tokens", "warmup", "think", "off"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, it must be at least 0")
    if not options.shared_tokens and not options.prompt_tokens.low:
        parser.error("--prompt-tokens is 0 without --shared-tokens: a prompt needs a token")
    if options.requests is None and options.duration is None and options.trace is None:
        options.requests = 100
    if options.rate is None and options.concurrency is None and options.trace is None:
        options.rate = 1.0


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _range(text: str) -> Range:
    try:
        return Range.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _slo(text: str) -> Slo:
    try:
        return Slo.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def sessions(options: argparse.Namespace) -> Iterator[Session]:
    """Raises TraceError, ValueError."""
    rng = random.Random(options.seed)
    if options.trace is not None:
        trace = read_trace(options.trace).changed(speedup=options.speedup, scale=options.scale)
        made = replayed(trace, options.max_tokens)
    else:
        due: Iterator[float] = itertools.repeat(0.0)
        if options.concurrency is None:
            due = Arrivals(options.arrivals, options.rate, options.cv, options.on, options.off).times(rng)
        synthetic = Synthetic(
            options.shared_tokens,
            options.shared_kinds,
            options.prompt_tokens,
            options.output_tokens,
            options.turns,
            options.turn_tokens,
            options.think,
        )
        made = synthetic.sessions(random.Random(f"{options.seed}/lengths"), due)
    closed = options.concurrency is not None
    return until(made, requests=options.requests, due_s=None if closed else options.duration)


def describe_load(options: argparse.Namespace) -> str:
    if options.trace is not None:
        speed = f" × {options.speedup:g}" if options.speedup != 1 else ""
        what = f"{options.trace.name}{speed}"
        return what if options.concurrency is None else f"{what}, {options.concurrency} users"
    if options.concurrency is not None:
        return f"closed loop, {options.concurrency} users"
    detail = {"gamma": f" (cv {options.cv:g})", "onoff": f" ({options.on:g} s on, {options.off:g} s off)"}
    return f"open loop, {options.rate:g}/s {options.arrivals}{detail.get(options.arrivals, '')}"


async def drive(options: argparse.Namespace) -> tuple[Run, Server, PromptMaker]:
    """Raises ServerError, TraceError, ValueError."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    work = sessions(options)
    wire = Wire(options.url, headers)
    try:
        model = options.model or await first_model(wire)
        asked = Server(wire, model, options.api, options.timeout, GREEDY)
        form = None if options.prompts == "auto" else options.prompts
        server, maker = await find_out(asked, form, options.vocab_size, options.seed)
        progress = Progress()
        run = Run(time.perf_counter())
        teller = asyncio.create_task(told(run, progress))
        try:
            if options.concurrency is None:
                await open_loop(server, maker, work, run)
            else:
                await closed_loop(
                    server, maker, work, run, users=options.concurrency, until_s=options.duration
                )
        finally:
            teller.cancel()
            with suppress(asyncio.CancelledError):
                await teller
            progress(run)
            progress.over()
        return run, server, maker
    finally:
        wire.close()


def found_by(options: argparse.Namespace, run: Run, server: Server, maker: PromptMaker) -> dict[str, Any]:
    good = [r for r in run.records if not r.error and r.started >= run.began + options.warmup]
    found: dict[str, Any] = {
        "what": describe_load(options),
        "loop": "open" if options.concurrency is None else "closed",
        "options": {name: _plain(value) for name, value in vars(options).items() if name != "api_key"},
        "server": {
            "url": options.url,
            "model": server.model,
            "api": server.api,
            "prompts": maker.form,
            "fields": dict(server.fields),
        },
        "machine": describe(),
        "run": figures(run, options.slo, options.warmup),
        "slo_s": asdict(options.slo) if options.slo else None,
        "curves": {"ttft_s": [r.ttft for r in good], "tpot_s": [r.tpot for r in good if r.tokens > 1]},
        "connections": server.wire.opened,
    }
    if options.every_request:
        found["requests"] = each(run)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return asdict(value) if isinstance(value, Range | Slo) else value


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection for each request under way
    try:
        run, server, maker = uvloop.run(drive(options))
    except (ServerError, TraceError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    found = found_by(options, run, server, maker)
    if not run.records:
        raise SystemExit("error: no request was due; is --duration shorter than the first gap?")
    write_results(options.out, "serve", found, table(found), plot)
    if found["run"]["errors"] == found["run"]["requests"]:
        raise SystemExit(f"error: every request failed; the first: {json.dumps(found['run']['first_error'])}")


if __name__ == "__main__":
    main()
