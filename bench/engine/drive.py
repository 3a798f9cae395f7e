"""An engine in this process, brought to a given batch and context, and its steps timed."""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.configurations import check_in_force, engine_config
from workers.engine.engine import Engine
from workers.engine.request import Request
from workers.models.catalog import PreparedModel
from workers.protocol.messages import Sampling, Work

BLOCK_SIZE = 16
WARM_STEPS = 2

# 60 in int8, about 0.0115 in bfloat16 and float32, 1.06 in float16: a finite, normal number in every KV format, its
# scales included. Untouched pages would all be the same page of zeros, and be read from the cache.
_KV_BYTE = 0x3C

_names = (f"bench-{number}" for number in itertools.count())


@dataclass(frozen=True)
class Case:
    """decode: steps of `batch` sequences with `context` tokens each; prefill: one prompt of `context` tokens."""

    kind: str
    batch: int
    context: int

    def blocks(self, steps: int) -> int:
        return self.batch * -(-(self.context + steps + WARM_STEPS + 2) // BLOCK_SIZE)


def cases(batches: list[int], contexts: list[int]) -> list[Case]:
    prefills = [Case("prefill", 1, context) for context in contexts]
    return prefills + [Case("decode", batch, context) for context in contexts for batch in batches]


@contextmanager
def running_engine(
    configuration: str, model: PreparedModel, threads: int, num_blocks: int, chunk: int
) -> Iterator[Engine]:
    """Prefix caching is off: every token is computed. Raises ValueError when the configuration cannot run here."""
    config = engine_config(
        configuration,
        num_threads=threads,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_num_seqs=min(64, chunk),
        max_num_batched_tokens=chunk,
        prefix_caching=False,
    )
    engine = Engine(config, model)
    check_in_force(configuration, engine)
    try:
        yield engine
    finally:
        del engine
        gc.collect()  # its KV cache may be most of the memory


def fill_kv(engine: Engine) -> None:
    import torch

    engine.runner.kv_cache.view(torch.uint8).fill_(_KV_BYTE)


def decode(engine: Engine, case: Case, steps: int, step: Callable[[], object] | None = None) -> list[float]:
    """Seconds of each step. The context is taken as if it had come from a prefill worker: no prompt is computed.

    `step`: what makes one; None: `engine.step`.
    """
    step = step or engine.step
    rng = random.Random(0)
    requests = []
    with engine.lock:
        for _ in range(case.batch):
            request = _request(engine, rng, case.context, WARM_STEPS + steps + 2)
            if engine.scheduler.reserve(request) is None:
                raise ValueError(f"no room for {case}")
            requests.append(request)
        for request in requests:
            engine.scheduler.commit(request, rng.randrange(engine.vocab_size), None, 0)
    times = []
    for _ in range(WARM_STEPS + steps):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    with engine.lock:
        for request in requests:
            engine.scheduler.cancel(request.request_id)
    while engine.scheduler.has_work:  # a step may have been scheduled ahead
        engine.step()
    return times[WARM_STEPS:]


def prefill(engine: Engine, case: Case) -> float:
    """Seconds from the prompt to its first token, through all its chunks."""
    with engine.lock:
        engine.scheduler.add(_request(engine, random.Random(0), case.context, 1))
    began = time.perf_counter()
    while engine.scheduler.has_work:
        engine.step()
    return time.perf_counter() - began


def _request(engine: Engine, rng: random.Random, context: int, max_tokens: int) -> Request:
    prompt = rng.choices(range(engine.vocab_size), k=context)
    sampling = Sampling(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True)
    work = Work(request_id=next(_names), prompt=prompt, sampling=sampling)
    engine.check(work)
    return Request(work)
