"""Brute force: prefill and decode workers played request by request and step by step, to hold the planner's formulas to.

Written from the description of the system, with nothing of the planner but the worker's times.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.planner.profile import Profile
from cluster.planner.workload import Shape


@dataclass
class Job:
    shape: Shape
    at: float
    ttft: float = 0.0
    first: float = 0.0
    last: float = 0.0
    left: int = 0  # tokens still to be written
    unread: int = 0  # prompt tokens still to be read
    chunks: int = 0

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / (self.shape.output_tokens - 1)


def arrivals(
    shapes: Sequence[Shape], rate: float, count: int, rng: random.Random, cv2: float = 1.0
) -> list[Job]:
    jobs, now = [], 0.0
    for _ in range(count):
        now += rng.gammavariate(1 / cv2, cv2 / rate)
        jobs.append(Job(rng.choice(list(shapes)), now))
    return jobs


def prefill_queue(jobs: Sequence[Job], workers: int, service_s: Callable[[Shape], float]) -> None:
    """One line, first come first served: fills `ttft` and `first`."""
    free = [0.0] * workers
    for job in jobs:
        began = max(job.at, heapq.heappop(free))
        job.first = began + service_s(job.shape)
        job.ttft = job.first - job.at
        heapq.heappush(free, job.first)


@dataclass
class _Worker:
    batch: list[Job] = field(default_factory=list)
    joining: list[Job] = field(default_factory=list)
    stepping: bool = False

    @property
    def held(self) -> int:
        return len(self.batch) + len(self.joining)


def decode_pool(jobs: Sequence[Job], workers: int, seats: int, profile: Profile) -> None:
    """Jobs come at `first`, go where fewest are, join between two steps, and get a token a step: fills `last`.

    A job that finds no seat waits in one line; its first token counts from when it has one, and is late by that.
    """
    pool = [_Worker() for _ in range(workers)]
    events: list[tuple[float, int, int]] = [(job.first, 0, number) for number, job in enumerate(jobs)]
    heapq.heapify(events)
    waiting: deque[Job] = deque()

    def seat(job: Job, now: float) -> None:
        worker = min(pool, key=lambda one: one.held)
        job.ttft += now - job.first
        job.first = now
        job.left = job.shape.output_tokens - 1
        if not job.left:
            job.last = now
            return
        worker.joining.append(job)
        if not worker.stepping:
            begin(worker, now)

    def begin(worker: _Worker, now: float) -> None:
        worker.batch += worker.joining
        worker.joining = []
        worker.stepping = bool(worker.batch)
        if worker.batch:
            held = sum(j.shape.prompt_tokens + j.shape.output_tokens - j.left for j in worker.batch)
            step_s = profile.step_s(len(worker.batch), held / len(worker.batch))
            heapq.heappush(events, (now + step_s, 1, pool.index(worker)))

    while events:
        now, kind, number = heapq.heappop(events)
        if kind == 0:
            if min(one.held for one in pool) < seats:
                seat(jobs[number], now)
            else:
                waiting.append(jobs[number])
            continue
        worker = pool[number]
        for job in worker.batch:
            job.left -= 1
            if not job.left:
                job.last = now
        worker.batch = [job for job in worker.batch if job.left]
        while waiting and min(one.held for one in pool) < seats:
            seat(waiting.popleft(), now)
        begin(worker, now)


def unified_pool(jobs: Sequence[Job], workers: int, seats: int, profile: Profile) -> None:
    """Each step reads a chunk of the oldest prompts and writes a token for every running answer."""
    lines: list[deque[Job]] = [deque() for _ in range(workers)]
    running: list[list[Job]] = [[] for _ in range(workers)]
    stepping: list[tuple[Job, int] | bool | None] = [False] * workers
    events: list[tuple[float, int, int]] = [(job.at, 0, number) for number, job in enumerate(jobs)]
    heapq.heapify(events)

    def begin(number: int, now: float) -> None:
        reading: tuple[Job, int] | None = None
        seconds = 0.0
        if lines[number] and len(running[number]) < seats:
            job = lines[number][0]
            chunk = min(job.unread, profile.chunk_tokens)
            done = job.shape.new_tokens - job.unread
            before = profile.prefill_s(done, job.shape.cached_tokens) if done else 0.0
            seconds += profile.prefill_s(done + chunk, job.shape.cached_tokens) - before
            reading = (job, chunk)
        if running[number]:
            held = sum(j.shape.prompt_tokens + j.shape.output_tokens - j.left for j in running[number])
            seconds += profile.step_s(len(running[number]), held / len(running[number]))
        if not seconds:
            stepping[number] = False
            return
        stepping[number] = reading
        heapq.heappush(events, (now + seconds, 1, number))

    while events:
        now, kind, number = heapq.heappop(events)
        if kind == 0:
            job = jobs[number]
            job.unread = job.shape.new_tokens
            where = min(range(workers), key=lambda w: (sum(j.unread for j in lines[w]), len(running[w])))
            lines[where].append(job)
            if stepping[where] is False:
                begin(where, now)
            continue
        for job in running[number]:
            job.left -= 1
            if not job.left:
                job.last = now
        running[number] = [job for job in running[number] if job.left]
        reading = stepping[number]
        if isinstance(reading, tuple):
            job, chunk = reading
            job.unread -= chunk
            if not job.unread:
                lines[number].popleft()
                job.first = job.last = now
                job.ttft = now - job.at
                job.left = job.shape.output_tokens - 1
                if job.left:
                    running[number].append(job)
        begin(number, now)
