"""A simulated worker against the real scheduler, stepped one step at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.simulate.jobs import Asked, Job
from bench.simulate.timeline import Timeline
from bench.simulate.worker import Limits, Seq, Worker
from tests.bench.simulate.clusters import BLOCK, COST
from workers.engine.block_pool import BlockPool
from workers.engine.plan import Sampled
from workers.engine.request import Request
from workers.engine.scheduler import Scheduler
from workers.protocol.hashes import block_hashes
from workers.protocol.messages import Sampling, Work

ROOT = bytes(16)
TOKEN = 7  # what every step samples


@dataclass
class Case:
    at_s: float
    prompt: list[int]
    output_tokens: int


def random_cases(rng: random.Random) -> list[Case]:
    shared = [rng.choices(range(100), k=rng.randint(1, 120)) for _ in range(3)]
    cases, now = [], 0.0
    for _ in range(rng.randint(1, 25)):
        now += rng.expovariate(1 / rng.choice([0.001, 0.05, 0.5]))
        own = rng.choices(range(100), k=rng.randint(1, 90))
        cases.append(Case(now, rng.choice([[], *shared]) + own, rng.randint(1, 70)))
    return cases


def real(cases: list[Case], limits: Limits) -> tuple[dict[int, tuple[float, float]], int, int]:
    """(first token, end) of each; preemptions; tokens found in the cache."""
    pool = BlockPool(limits.num_blocks)
    scheduler = Scheduler(
        pool,
        block_size=BLOCK,
        hash_root=ROOT,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
    )
    now, coming = 0.0, list(enumerate(cases))
    found: dict[int, tuple[float, float]] = {}
    first: dict[int, float] = {}
    to_read: dict[tuple[str, int], int] = {}
    while coming or scheduler.has_work:
        while coming and coming[0][1].at_s <= now:
            number, case = coming.pop(0)
            sampling = Sampling(max_tokens=case.output_tokens, seed=0, ignore_eos=True)
            scheduler.add(Request(Work(str(number), case.prompt, sampling)))
        plan = scheduler.schedule()
        if not plan.items:
            now = coming[0][1].at_s
            continue
        tokens = pairs = sequences = context = 0.0
        for item in plan.items:
            request = item.request
            known = to_read.setdefault((request.request_id, request.preemptions), request.num_tokens)
            if item.start < known:
                tokens += item.count
                pairs += item.count * (item.start + item.count / 2)
            else:
                sequences += 1
                context += item.start + 1
        now += COST.step_s(tokens, pairs, int(sequences), context)
        for new in scheduler.update(plan, [Sampled(TOKEN, None)] * plan.num_samples).tokens:
            number = int(new.request.request_id)
            first.setdefault(number, now)
            if new.request.finish_reason is not None:
                found[number] = (first[number], now)
    scheduler.check()
    return found, scheduler.preemptions, scheduler.hit_tokens


def simulated(
    cases: list[Case], limits: Limits, watch: bool
) -> tuple[dict[int, tuple[float, float]], int, int]:
    timeline = Timeline()
    worker = Worker(
        "w", 1, "decode", timeline, COST, limits, on_cache=lambda worker: None, on_room=lambda worker: None
    )
    found: dict[int, tuple[float, float]] = {}
    first: dict[int, float] = {}
    seqs = []

    def arrive(number: int, case: Case) -> None:
        tokens = case.prompt + [TOKEN] * case.output_tokens
        hashes = block_hashes(tokens, BLOCK, ROOT)
        job = Job(number, Asked(case.at_s, len(case.prompt), case.output_tokens, hashes), BLOCK)
        seq = Seq(job, BLOCK, timeline.now)
        seq.on_first = lambda seq: first.setdefault(number, timeline.now) and None
        seq.on_end = lambda seq: found.update({number: (first[number], timeline.now)})
        seqs.append(seq)
        worker.add(seq)

    for number, case in enumerate(cases):
        timeline.at(case.at_s, arrive, number, case)
    if watch:  # looking changes nothing
        for tick in range(2000):
            timeline.at(tick * 0.00731, worker.load)
    timeline.run(lambda: True)
    worker.pool.check([])
    assert worker.output_tokens == sum(case.output_tokens for case in cases)
    return found, worker.preemptions, sum(seq.cached_tokens for seq in seqs)


@given(st.integers(0, 100_000))
@settings(max_examples=150, deadline=None)
def test_it_does_what_the_real_scheduler_does(seed: int) -> None:
    rng = random.Random(seed)
    cases = random_cases(rng)
    longest = max(-(-(len(case.prompt) + case.output_tokens) // BLOCK) for case in cases)
    limits = Limits(
        num_blocks=longest + rng.choice([0, 3, 40, 400]),
        block_size=BLOCK,
        max_num_seqs=rng.choice([1, 4, 16]),
        max_num_batched_tokens=rng.choice([16, 64, 512]),
    )
    times, preemptions, cached = real(cases, limits)
    mine, my_preemptions, my_cached = simulated(cases, limits, watch=rng.random() < 0.3)
    assert my_preemptions == preemptions
    assert my_cached == cached
    assert mine.keys() == times.keys()
    for number, expected in times.items():
        assert mine[number] == pytest.approx(expected, rel=1e-9), number
