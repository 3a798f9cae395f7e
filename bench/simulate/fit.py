"""A cost model of the engine on this machine: steps of many kinds are timed, fitted, and held against other steps.

Then the same requests go to the engine and to a simulated worker with the fitted model, and what comes out is compared.
On a machine with other work, `--clock cpu` with one thread times the processor instead of the wall; requests then
come on that clock, too.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.engine.drive import BLOCK_SIZE, fill_kv, running_engine
from bench.simulate.cost import StepCost
from bench.simulate.jobs import Asked, Job
from bench.simulate.least_squares import fit_positive
from bench.simulate.timeline import Timeline
from bench.simulate.worker import Limits, Seq, Worker
from bench.spread import percentile
from workers.engine.engine import Engine
from workers.engine.plan import Plan, StepResult
from workers.engine.request import Request
from workers.models.catalog import PreparedModel
from workers.protocol.messages import Sampling, Work

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
_FAR = 65536.0  # tokens: the line of the prompt goes on beyond what was measured


@dataclass(frozen=True)
class Grid:
    """What is timed: prompts alone, streams alone, and prompts beside streams."""

    prompts: tuple[int, ...] = (16, 64, 256, 1024)
    batches: tuple[int, ...] = (1, 4, 16)
    contexts: tuple[int, ...] = (64, 512, 1500)
    chunk: int = 256
    steps: int = 6
    runs: int = 3

    def blocks(self) -> int:
        tokens = max(self.batches) * (max(self.contexts) + 4 * self.steps) + max(self.prompts) + 64
        return tokens // BLOCK_SIZE + 4 * max(self.batches) + 8


@dataclass(frozen=True)
class Step:
    """One step: what was in it, and how long it took."""

    tokens: int
    pairs: float
    sequences: int
    context: int
    seconds: float

    @property
    def kind(self) -> str:
        if not self.sequences:
            return "prompts"
        return "mixed" if self.tokens else "streams"


def measure(engine: Engine, grid: Grid, clock: Clock) -> list[Step]:
    """Each kind of step `runs` times; of these the median."""
    times: dict[tuple[int, float, int, int], list[float]] = {}
    for run in range(grid.runs):
        for batch in (0, *grid.batches):
            for context in grid.contexts if batch else (0,):
                for step in _drive(engine, batch, context, grid, clock, random.Random(run)):
                    key = (step.tokens, step.pairs, step.sequences, step.context)
                    times.setdefault(key, []).append(step.seconds)
    return [Step(*key, statistics.median(seconds)) for key, seconds in times.items()]


def _drive(
    engine: Engine, batch: int, context: int, grid: Grid, clock: Clock, rng: random.Random
) -> list[Step]:
    """Streams as if their context had come from elsewhere; then, beside them, one prompt after the other."""
    streams = []
    with engine.lock:
        for _ in range(batch):
            stream = _request(engine, rng, context, 10_000)
            if engine.scheduler.reserve(stream) is None:
                raise ValueError(f"no room for {batch} streams of {context} tokens")
            engine.scheduler.commit(stream, rng.randrange(engine.vocab_size), None, 0)
            streams.append(stream)
    watch = Watch(engine, clock)
    steps = []
    if batch:
        watch.step()  # buffers grow to their size
        steps += [watch.step() for _ in range(grid.steps)]
    for prompt in grid.prompts if batch in (0, *grid.batches[-2:]) else ():
        with engine.lock:
            engine.scheduler.add(_request(engine, rng, prompt, 1))
        steps += [watch.step() for _ in range(-(-prompt // (grid.chunk - batch)))]
    with engine.lock:
        for stream in streams:
            engine.scheduler.cancel(stream.request_id)
    while engine.scheduler.has_work:  # a step may have been scheduled ahead
        engine.step()
    return steps


class Watch:
    """Times the steps of an engine and tells what was in them."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._plans: deque[Plan] = deque()  # begun and not ended
        self._to_read: dict[tuple[str, int], int] = {}

    def step(self, deliver: Callable[[StepResult], None] = lambda result: None) -> Step:
        began = self._clock()
        self._engine.step(deliver, self._begin)
        seconds = self._clock() - began
        assert self._plans, "there was nothing to compute"
        tokens = sequences = context = 0
        pairs = 0.0
        for item in self._plans.popleft().items:
            request = item.request
            known = self._to_read[request.request_id, request.preemptions]
            if item.start < known:
                tokens += item.count
                pairs += item.count * (item.start + item.count / 2)
            else:
                sequences += 1
                context += item.start + 1
        return Step(tokens, pairs, sequences, context, seconds)

    def _begin(self, plan: Plan, layers_done: Any) -> None:
        self._plans.append(plan)
        for item in plan.items:
            request = item.request
            # What is known when it is first seen is its prompt; a stream that was committed has one token more.
            known = request.num_tokens - (1 if request.num_computed_tokens == request.num_tokens - 1 else 0)
            self._to_read.setdefault((request.request_id, request.preemptions), known)


def fit(steps: Sequence[Step], kv_token_bytes: float, source: str) -> StepCost:
    """Raises ValueError when there are no prompts or no streams among the steps."""
    prompts = [step for step in steps if step.kind == "prompts"]
    streams = [step for step in steps if step.kind == "streams"]
    if not prompts or not streams:
        raise ValueError("to fit, steps with prompts alone and steps with streams alone are needed")
    base_s, token_s, pair_s = fit_positive(
        [(1.0, float(step.tokens), step.pairs) for step in prompts], [step.seconds for step in prompts]
    )
    stream_s, sequence_s, context_s = fit_positive(
        [(1.0, float(step.sequences), float(step.context)) for step in streams],
        [step.seconds for step in streams],
    )
    return StepCost(
        prompt=((0.0, base_s), (_FAR, base_s + _FAR * token_s)),
        pair_s=pair_s,
        decode_base_s=stream_s,
        sequence_s=sequence_s,
        context_s=context_s,
        kv_token_bytes=kv_token_bytes,
        source=source,
    )


def errors(cost: StepCost, steps: Sequence[Step]) -> dict[str, dict[str, float]]:
    """By kind of step: model over measured, less 1. Mixed steps took no part in the fit."""
    found = {}
    for kind in ("prompts", "streams", "mixed"):
        inside = [step for step in steps if step.kind == kind]
        if inside:
            off = sorted(
                abs(cost.step_s(s.tokens, s.pairs, s.sequences, s.context) / s.seconds - 1) for s in inside
            )
            found[kind] = {"steps": len(off), "median": statistics.median(off), "p90": percentile(off, 0.9)}
    return found


# --- the whole, held against the engine -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """One request of the check."""

    at_s: float
    prompt: list[int]
    output_tokens: int


def small_load(vocab_size: int, count: int, per_s: float, seed: int = 0) -> list[Small]:
    rng = random.Random(f"fit/{seed}")
    now, found = 0.0, []
    for _ in range(count):
        now += rng.expovariate(per_s)
        prompt = rng.choices(range(vocab_size), k=rng.randint(32, 600))
        found.append(Small(now, prompt, rng.randint(8, 64)))
    return found


Times = dict[int, tuple[float, float]]  # first token, end


def serve(engine: Engine, load: Sequence[Small], clock: Clock) -> Times:
    """The engine on a clock that runs while it steps and jumps while it is idle."""
    now, coming = 0.0, list(enumerate(load))
    times: Times = {}
    first: dict[str, float] = {}
    watch = Watch(engine, clock)
    results: list[StepResult] = []
    while coming or engine.scheduler.has_work:
        while coming and coming[0][1].at_s <= now:
            number, small = coming.pop(0)
            sampling = Sampling(max_tokens=small.output_tokens, seed=0, temperature=0.0, ignore_eos=True)
            with engine.lock:
                engine.scheduler.add(Request(Work(f"fit-{number}", small.prompt, sampling)))
        if not engine.scheduler.has_work:
            now = coming[0][1].at_s
            continue
        now += watch.step(results.append).seconds
        for new in results.pop().tokens:
            name = new.request.request_id
            first.setdefault(name, now)
            if new.request.finish_reason is not None:
                times[int(name.removeprefix("fit-"))] = (first[name], now)
    return times


def simulate(cost: StepCost, limits: Limits, load: Sequence[Small]) -> Times:
    """The same requests on a simulated worker."""
    timeline = Timeline()
    worker = Worker(
        "w", 1, "decode", timeline, cost, limits, on_cache=lambda worker: None, on_room=lambda worker: None
    )
    times: Times = {}
    first: dict[int, float] = {}

    def arrive(number: int, small: Small) -> None:
        job = Job(number, Asked(small.at_s, len(small.prompt), small.output_tokens, ()), limits.block_size)
        seq = Seq(job, limits.block_size, timeline.now)

        def began(seq: Seq) -> None:
            first.setdefault(number, timeline.now)

        def ended(seq: Seq) -> None:
            times[number] = (first[number], timeline.now)

        seq.on_first, seq.on_end = began, ended
        worker.add(seq)

    for number, small in enumerate(load):
        timeline.at(small.at_s, arrive, number, small)
    timeline.run(lambda: True)
    return times


def figures(load: Sequence[Small], times: Times) -> dict[str, float]:
    ttft = sorted(times[number][0] - small.at_s for number, small in enumerate(load))
    tpot = sorted(
        (times[number][1] - times[number][0]) / (small.output_tokens - 1) for number, small in enumerate(load)
    )
    span_s = max(end for _, end in times.values()) - load[0].at_s
    return {
        "output_tokens_per_s": sum(small.output_tokens for small in load) / span_s,
        "ttft_mean_s": statistics.fmean(ttft),
        "ttft_p50_s": statistics.median(ttft),
        "ttft_p90_s": percentile(ttft, 0.9),
        "tpot_mean_s": statistics.fmean(tpot),
        "tpot_p50_s": statistics.median(tpot),
    }


def fit_engine(
    model: PreparedModel,
    configuration: str,
    threads: int,
    grid: Grid,
    clock_name: str,
    say: Callable[[str], None],
) -> tuple[StepCost, dict[str, Any]]:
    """The model, and how far it is off: of single steps, and of three loads of small requests."""
    clock = CLOCKS[clock_name]
    with running_engine(configuration, model, threads, grid.blocks(), grid.chunk) as engine:
        fill_kv(engine)
        say("timing steps")
        steps = measure(engine, grid, clock)
        token_bytes = engine.layout.block_bytes / BLOCK_SIZE
        source = f"{model.served_name}, {configuration}, {threads} threads, {clock_name} clock"
        cost = fit(steps, token_bytes, source)
        limits = Limits(engine.num_blocks, BLOCK_SIZE, engine.max_num_seqs, grid.chunk)
        checks = []
        alone_s = cost.step_s(256, 256 * 300 / 2, 0, 0) + 36 * cost.step_s(0, 0, 8, 8 * 350) / 8
        for share in (0.3, 0.6, 0.9):
            load = small_load(engine.vocab_size, 40, share / alone_s)
            say(f"serving {len(load)} requests at {share:.0%} of what the model says can be served")
            measured = figures(load, serve(engine, load, clock))
            simulated = figures(load, simulate(cost, limits, load))
            checks.append(
                {
                    "load": share,
                    "measured": measured,
                    "simulated": simulated,
                    "off": {name: simulated[name] / measured[name] - 1 for name in measured},
                }
            )
    return cost, {"steps": [vars(step) for step in steps], "errors": errors(cost, steps), "checks": checks}


def _request(engine: Engine, rng: random.Random, tokens: int, output_tokens: int) -> Request:
    sampling = Sampling(max_tokens=output_tokens, seed=0, temperature=0.0, ignore_eos=True)
    prompt = rng.choices(range(engine.vocab_size), k=tokens)
    name = f"fit-{tokens}-{rng.getrandbits(64):x}"
    return Request(Work(name, prompt, sampling))
